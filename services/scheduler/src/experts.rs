//! The experts of a cluster as the decoder sees them.
use moesaic_model::backend::Backend;
use moesaic_model::expert_pool::{ExpertPool, Ticket};
use moesaic_transport::RemoteExperts;
use moesaic_types::Routing;
use std::sync::Arc;

/// From so many tokens on a step is worth two micro-batches: below, a shard's time for one is not much longer than for
/// half of it, so that the overlap would not pay for the second message.
const MICRO_BATCH_TOKENS: usize = 8;

/// Experts in other processes.
pub struct RemotePool<B: Backend> {
    experts: Arc<RemoteExperts>,
    backend: Arc<B>,
    hidden: usize,
}

impl<B: Backend> RemotePool<B> {
    /// The experts of a model with rows of `hidden` columns; `backend` runs the rest of it.
    pub fn new(experts: Arc<RemoteExperts>, backend: Arc<B>, hidden: usize) -> Self {
        Self { experts, backend, hidden }
    }
}

impl<B: Backend> ExpertPool<B> for RemotePool<B> {
    fn dispatch(&self, layer: usize, x: &B::Tensor, routing: &Routing) -> moesaic_model::Result<Ticket<B>> {
        let dispatched = self.experts.dispatch(layer, self.backend.to_host(x)?, self.hidden, routing);
        let (backend, hidden) = (Arc::clone(&self.backend), self.hidden);
        Ok(Ticket::Pending(Box::new(move || {
            let sums = dispatched.wait();
            let sums = sums.map_err(|error| moesaic_model::Error::Experts { layer, reason: error.to_string() })?;
            backend.to_device(sums, hidden)
        })))
    }

    fn micro_batches(&self, tokens: usize) -> usize {
        if tokens >= MICRO_BATCH_TOKENS { 2 } else { 1 }
    }
}
