//! Where a shard's experts come from.
use moesaic_model::LoadOptions;
use moesaic_model::backend::Backend;
use moesaic_model::decoder::ExpertStore;
use moesaic_model::decoder::Progress;
use moesaic_model::source::WeightSource;
use moesaic_model::spec::ModelSpec;
use moesaic_types::cluster::Shares;
use moesaic_types::{Error, ErrorCode, Result, WeightFormat};

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
}

impl Library {
    /// Experts of a layer; `None` where it has none.
    pub fn experts(&self, layer: usize) -> Option<usize> {
        self.spec.moe(layer).map(|moe| moe.experts)
    }

    /// A store of just `shares`; what `from` has already is shared with it.
    ///
    /// # Errors
    /// `InvalidArgument` naming `shares` when the model has no such expert; `Unavailable` when the files cannot be read.
    pub fn load<B: Backend>(
        &self,
        from: &ExpertStore<B>,
        shares: &Shares,
        progress: &dyn Fn(Progress),
    ) -> Result<ExpertStore<B>> {
        let options = LoadOptions {
            weights: self.weights,
            threads: self.threads,
            progress: Some(progress),
            ..LoadOptions::default()
        };
        let loaded = from.holding(&*self.source, &self.spec, &options, shares);
        loaded.map_err(|error| match error {
            moesaic_model::Error::Experts { .. } => Error::invalid("shares", format!("shares: {error}")),
            error => Error::new(ErrorCode::Unavailable, error.to_string()),
        })
    }
}
