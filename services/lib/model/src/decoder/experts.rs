//! Experts in this process.
use super::weights::Weights;
use super::{LoadOptions, Part};
use crate::backend::{Backend, TensorSlice};
use crate::expert_pool::{ExpertPool, Ticket};
use crate::source::WeightSource;
use crate::spec::ModelSpec;
use crate::{Error, Result};
use moesaic_types::Routing;
use moesaic_types::cluster::Shares;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// All layers' experts, or some of them, on one backend; whole, or a slice of each.
pub struct ExpertStore<B: Backend> {
    backend: Arc<B>,
    slice: TensorSlice,
    layers: BTreeMap<usize, LayerExperts<B>>,
}

struct LayerExperts<B: Backend> {
    held: Vec<Option<B::Ffn>>,
    gathered: B::Experts,
}

/// Loads all experts; their weights are apart from the decoder's.
pub fn load_experts<B: Backend>(
    source: &dyn WeightSource,
    spec: &ModelSpec,
    backend: Arc<B>,
    options: &LoadOptions<'_>,
) -> Result<ExpertStore<B>> {
    load_experts_of(source, spec, backend, options, 0..spec.layers.len())
}

/// Loads all experts of the layers `range`.
pub fn load_experts_of<B: Backend>(
    source: &dyn WeightSource,
    spec: &ModelSpec,
    backend: Arc<B>,
    options: &LoadOptions<'_>,
    range: Range<usize>,
) -> Result<ExpertStore<B>> {
    let all = |layer: usize| (0..spec.moe(layer).map_or(0, |moe| moe.experts) as u32).collect();
    let layers = spec.moe_layers().filter(|layer| range.contains(layer));
    let shares = layers.map(|layer| (layer, all(layer))).collect();
    ExpertStore::empty(backend, TensorSlice::WHOLE).holding(None, source, spec, options, &shares)
}

impl<B: Backend> ExpertStore<B> {
    /// A store that holds nothing yet.
    pub fn empty(backend: Arc<B>, slice: TensorSlice) -> Self {
        Self { backend, slice, layers: BTreeMap::new() }
    }

    /// An expert that is here, or in `also`.
    fn find<'a>(&'a self, also: Option<&'a Self>, layer: usize, expert: u32) -> Option<&'a B::Ffn> {
        let held = |store: &'a Self| store.layers.get(&layer)?.held.get(expert as usize)?.as_ref();
        held(self).or_else(|| also.and_then(held))
    }

    /// Bytes of memory, about, that [`Self::holding`] would take for what is neither here nor in `also`. A layer's
    /// experts are taken to be as large as one of them.
    ///
    /// # Errors
    /// What looking at the files says.
    pub fn missing_bytes(
        &self,
        also: Option<&Self>,
        source: &dyn WeightSource,
        spec: &ModelSpec,
        options: &LoadOptions<'_>,
        shares: &Shares,
    ) -> Result<u64> {
        let weights = Weights::new(source, spec, options.weights);
        let mut bytes = 0_u64;
        for (&layer, share) in shares {
            let Some(moe) = spec.moe(layer) else { continue };
            let is_missing =
                |expert: &u32| (*expert as usize) < moe.experts && self.find(also, layer, *expert).is_none();
            let mut missing = share.iter().copied().filter(is_missing);
            let Some(first) = missing.next() else { continue };
            let matrices = weights.expert(layer, first as usize, moe.experts, moe.expert)?.slice(self.slice)?;
            bytes = bytes.saturating_add(matrices.bytes().saturating_mul(1 + missing.count() as u64));
        }
        Ok(bytes)
    }

    /// A store that holds just `shares`: what is here already, or in `also`, is shared, the rest is loaded.
    ///
    /// # Errors
    /// `Experts` when a share names a layer without experts or an expert that it does not have; what loading says.
    pub fn holding(
        &self,
        also: Option<&Self>,
        source: &dyn WeightSource,
        spec: &ModelSpec,
        options: &LoadOptions<'_>,
        shares: &Shares,
    ) -> Result<Self> {
        let weights = Weights::new(source, spec, options.weights);
        let total = shares.len();
        let mut layers = BTreeMap::new();
        for (done, (&layer, share)) in shares.iter().enumerate() {
            options.report(Part::Experts, done, total);
            let unknown = |reason: String| Error::Experts { layer, reason };
            let moe = spec.moe(layer).ok_or_else(|| unknown("the layer has no experts".into()))?;
            if let Some(expert) = share.iter().find(|&&expert| expert as usize >= moe.experts) {
                return Err(unknown(format!("expert {expert} is asked for; the layer has {}", moe.experts)));
            }
            let load = |index: usize| -> Result<B::Ffn> {
                let expert = share[index];
                if let Some(held) = self.find(also, layer, expert) {
                    return Ok(held.clone());
                }
                let matrices = weights.expert(layer, expert as usize, moe.experts, moe.expert)?;
                self.backend.load_ffn(matrices.slice(self.slice)?)
            };
            // The first alone: its shapes and names fail before threads and memory are spent.
            let first = if share.is_empty() { None } else { Some(load(0)?) };
            let rest = in_parallel(share.len().saturating_sub(1), options.threads, &|index| load(index + 1))?;
            let mut held = vec![None; moe.experts];
            for (expert, loaded) in share.iter().zip(first.into_iter().chain(rest)) {
                held[*expert as usize] = Some(loaded);
            }
            let gathered = self.backend.gather_experts(held.clone(), spec.hidden)?;
            layers.insert(layer, LayerExperts { held, gathered });
        }
        options.report(Part::Experts, total, total);
        Ok(Self { backend: self.backend.clone(), slice: self.slice, layers })
    }

    /// The experts that are here, by layer.
    pub fn shares(&self) -> Shares {
        let held = |experts: &LayerExperts<B>| {
            experts.held.iter().enumerate().filter(|(_, ffn)| ffn.is_some()).map(|(expert, _)| expert as u32).collect()
        };
        self.layers.iter().map(|(layer, experts)| (*layer, held(experts))).collect()
    }
}

/// `work(0..count)` on some threads, in order.
fn in_parallel<T: Send>(count: usize, threads: usize, work: &(dyn Fn(usize) -> Result<T> + Sync)) -> Result<Vec<T>> {
    let next = AtomicUsize::new(0);
    let run = || -> Result<Vec<(usize, T)>> {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return Ok(done);
            }
            done.push((index, work(index)?));
        }
    };
    let mut all = Vec::with_capacity(count);
    std::thread::scope(|scope| {
        let handles: Vec<_> = (1..threads.min(count)).map(|_| scope.spawn(run)).collect();
        all.extend(run()?);
        for handle in handles {
            match handle.join() {
                Ok(done) => all.extend(done?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok::<_, Error>(())
    })?;
    all.sort_unstable_by_key(|(index, _)| *index);
    Ok(all.into_iter().map(|(_, value)| value).collect())
}

impl<B: Backend> ExpertStore<B> {
    /// Runs a layer's experts on `x`; an error if a token is routed to one that is not here.
    pub fn run(&self, layer: usize, x: &B::Tensor, routing: &Routing) -> Result<B::Tensor> {
        let experts = self
            .layers
            .get(&layer)
            .ok_or_else(|| Error::Experts { layer, reason: "no expert of this layer is loaded".into() })?;
        self.backend.experts(&experts.gathered, x, routing)
    }

    /// The backend that they are on.
    pub fn backend(&self) -> &Arc<B> {
        &self.backend
    }
}

impl<B: Backend> ExpertPool<B> for ExpertStore<B> {
    fn dispatch(&self, layer: usize, x: &B::Tensor, routing: &Routing) -> Result<Ticket<B>> {
        Ok(Ticket::Ready(self.run(layer, x, routing)?))
    }
}
