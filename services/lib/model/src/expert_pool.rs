//! The boundary between a replica and the experts: dispatch a layer's tokens, await the combined result.
use crate::{Result, backend::Backend};
use moesaic_types::Routing;

/// A dispatched layer: what its tokens' experts give, now or when they have computed it.
pub enum Ticket<B: Backend> {
    /// Computed already.
    Ready(B::Tensor),
    /// Under way elsewhere; the call waits for it.
    Pending(Box<dyn FnOnce() -> Result<B::Tensor> + Send>),
}

impl<B: Backend> Ticket<B> {
    /// The weighted sums `[tokens, hidden]`.
    ///
    /// # Errors
    /// `Experts` when some could not be reached; the backend's own.
    pub fn combine(self) -> Result<B::Tensor> {
        match self {
            Self::Ready(output) => Ok(output),
            Self::Pending(wait) => wait(),
        }
    }
}

/// Executes experts somewhere. Dispatch and [`Ticket::combine`] are separate so that two micro-batches can overlap.
pub trait ExpertPool<B: Backend>: Send + Sync {
    /// Sends tokens `x` `[tokens, hidden]` of MoE layer `layer` (the decoder's layer index) to their experts.
    /// Each token's result is summed in an order that its experts in `routing` decide, so that it does not depend on
    /// the batch.
    ///
    /// # Errors
    /// `Experts` when some cannot be reached now, or `layer` has none.
    fn dispatch(&self, layer: usize, x: &B::Tensor, routing: &Routing) -> Result<Ticket<B>>;
    /// Grows while a dispatched layer is waited for, where that gets on; any thread may look.
    fn advanced(&self) -> u64 {
        0
    }
    /// Into how many micro-batches a step of so many tokens is worth being cut, so that attention of one runs while
    /// the experts of another compute; 1 where the experts run on the caller's thread.
    fn micro_batches(&self, _tokens: usize) -> usize {
        1
    }
}
