//! Where a shard's experts come from.
use moesaic_model::LoadOptions;
use moesaic_model::backend::Backend;
use moesaic_model::decoder::ExpertStore;
use moesaic_model::decoder::Progress;
use moesaic_model::source::WeightSource;
use moesaic_model::spec::ModelSpec;
use moesaic_types::cluster::Shares;
use moesaic_types::{Error, ErrorCode, Result, WeightFormat};
use std::time::Duration;

/// Of what is loaded, the share that must be free beyond it: for buffers, and what the estimate leaves out.
const MARGIN: u64 = 16;

/// Memory is not expected to be there sooner.
const FULL_FOR: Duration = Duration::from_secs(10);

/// A model's files, and how its experts are held.
pub struct Library {
    /// The files.
    pub source: Box<dyn WeightSource>,
    /// What they describe.
    pub spec: ModelSpec,
    /// How weights are held; `None`: as they are stored.
    pub weights: Option<WeightFormat>,
    /// Threads that load.
    pub threads: usize,
    /// Bytes of memory that can be had now.
    pub available: fn() -> u64,
}

impl Library {
    /// Experts of a layer; `None` where it has none.
    pub fn experts(&self, layer: usize) -> Option<usize> {
        self.spec.moe(layer).map(|moe| moe.experts)
    }

    /// A store of just `shares`; what `from` or `also` has already is shared with it.
    ///
    /// # Errors
    /// `InvalidArgument` naming `shares` when the model has no such expert; `ResourceExhausted` when there is no memory
    /// for the rest; `Unavailable` when the files cannot be read.
    pub fn load<B: Backend>(
        &self,
        from: &ExpertStore<B>,
        also: Option<&ExpertStore<B>>,
        shares: &Shares,
        progress: &dyn Fn(Progress),
    ) -> Result<ExpertStore<B>> {
        let options = LoadOptions {
            weights: self.weights,
            threads: self.threads,
            progress: Some(progress),
            ..LoadOptions::default()
        };
        let failed = |error| match error {
            moesaic_model::Error::Experts { .. } => Error::invalid("shares", format!("shares: {error}")),
            error => Error::new(ErrorCode::Unavailable, error.to_string()),
        };
        let missing = from.missing_bytes(also, &*self.source, &self.spec, &options, shares).map_err(failed)?;
        let (needed, available) = (missing.saturating_add(missing / MARGIN), (self.available)());
        if missing > 0 && needed > available {
            let message = format!(
                "the experts of a placement need {needed} bytes of memory and {available} are available; add groups or \
                 memory, or bound a group's experts by router.placement.max_experts"
            );
            return Err(Error::exhausted(message, FULL_FOR));
        }
        from.holding(also, &*self.source, &self.spec, &options, shares).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moesaic_model::backend::TensorSlice;
    use moesaic_model::backend::native::NativeBackend;
    use moesaic_model::{Activations, source, spec};
    use std::path::Path;
    use std::sync::Arc;

    fn library(available: fn() -> u64) -> Library {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/mixtral");
        let source = source::open(&path).expect("it is in the checkout");
        let spec = spec::read(&path, &*source).expect("it is in the checkout");
        Library { source, spec, weights: Some(WeightFormat::F32), threads: 1, available }
    }

    #[test]
    fn experts_that_do_not_fit_are_refused_and_those_that_are_here_need_nothing() {
        let empty = ExpertStore::empty(Arc::new(NativeBackend::new(1, Activations::F32)), TensorSlice::WHOLE);
        let (some, more) = (Shares::from([(0, vec![0, 1])]), Shares::from([(0, vec![0, 1]), (1, vec![2])]));
        let full = library(|| 1000);
        let error = full.load(&empty, None, &some, &|_| {}).err().expect("it does not fit");
        assert_eq!(error.code, ErrorCode::ResourceExhausted);
        let needed = |shares: &Shares, also: Option<&ExpertStore<_>>| {
            let options = LoadOptions { weights: full.weights, ..LoadOptions::default() };
            let missing = empty.missing_bytes(also, &*full.source, &full.spec, &options, shares);
            missing.expect("it can be read")
        };
        let moe = full.spec.moe(0).expect("all its layers have experts");
        assert!(needed(&some, None) >= (2 * 3 * 4 * full.spec.hidden * moe.expert.intermediate) as u64);
        let bytes = needed(&some, None) + needed(&some, None) / MARGIN;
        assert!(error.message.contains(&format!("need {bytes} bytes")), "{error}");
        assert!(error.message.contains("1000 are available"), "{error}");

        let held = library(|| u64::MAX).load(&empty, None, &some, &|_| {}).expect("it fits");
        assert_eq!(needed(&some, Some(&held)), 0);
        assert_eq!(needed(&more, Some(&held)), needed(&more, None) - needed(&some, None));
        for (from, also) in [(&held, None), (&empty, Some(&held))] {
            let again = full.load(from, also, &some, &|_| {}).expect("it is here");
            assert_eq!(again.shares(), some);
            assert!(full.load(from, also, &more, &|_| {}).is_err());
        }
    }
}
