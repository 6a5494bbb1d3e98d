//! Experts in this process.
use super::weights::Weights;
use super::{LoadOptions, Part};
use crate::backend::Backend;
use crate::expert_pool::{ExpertPool, Routing, Ticket, TicketState};
use crate::source::WeightSource;
use crate::spec::ModelSpec;
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// All layers' experts, or some of them, on one backend.
pub struct ExpertStore<B: Backend> {
    backend: Arc<B>,
    layers: BTreeMap<usize, B::Experts>,
}

/// Loads the experts for which `select(layer, expert)` holds; expert weights are apart from the decoder's.
pub fn load_experts<B: Backend>(
    source: &dyn WeightSource,
    spec: &ModelSpec,
    backend: Arc<B>,
    options: &LoadOptions<'_>,
    select: &(dyn Fn(usize, usize) -> bool + Sync),
) -> Result<ExpertStore<B>> {
    let weights = Weights::new(source, spec, options.weights);
    let total = spec.moe_layers().count();
    let mut layers = BTreeMap::new();
    for (done, layer) in spec.moe_layers().enumerate() {
        options.report(Part::Experts, done, total);
        let moe = spec.moe(layer).expect("moe_layers yields layers with experts");
        let load = |expert: usize| -> Result<Option<B::Ffn>> {
            if !select(layer, expert) {
                return Ok(None);
            }
            backend.load_ffn(weights.expert(layer, expert, moe.experts, moe.expert)?).map(Some)
        };
        // The first alone: its shapes and names fail before threads and memory are spent.
        let first = load(0)?;
        let rest = in_parallel(moe.experts - 1, options.threads, &|index| load(index + 1))?;
        let experts = std::iter::once(first).chain(rest).collect();
        layers.insert(layer, backend.gather_experts(experts, spec.hidden)?);
    }
    options.report(Part::Experts, total, total);
    Ok(ExpertStore { backend, layers })
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
        self.backend.experts(experts, x, routing)
    }

    /// The backend that they are on.
    pub fn backend(&self) -> &Arc<B> {
        &self.backend
    }
}

impl<B: Backend> ExpertPool<B> for ExpertStore<B> {
    fn dispatch(&self, layer: usize, x: &B::Tensor, routing: &Routing) -> Result<Ticket<B>> {
        Ok(Ticket { state: TicketState::Ready(self.run(layer, x, routing)?) })
    }

    fn combine(&self, ticket: Ticket<B>) -> Result<B::Tensor> {
        match ticket.state {
            TicketState::Ready(output) => Ok(output),
            TicketState::Remote(tag) => Err(self.backend.error(format!("ticket {tag} is not of this pool"))),
        }
    }
}
