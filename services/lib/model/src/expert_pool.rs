//! The boundary between a replica and the experts: dispatch a layer's tokens, await the combined result.
use crate::{Result, backend::Backend};

/// Which experts each token goes to (compressed rows) and with what weight.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routing {
    /// `tokens + 1` offsets into `experts` and `weights`.
    pub offsets: Vec<u32>,
    /// Expert ids; in one token, in the gate's order (best first).
    pub experts: Vec<u32>,
    /// The weight of each expert's output.
    pub weights: Vec<f32>,
}

impl Routing {
    /// Tokens that are routed.
    pub fn tokens(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }
}

/// A dispatched layer; redeem it with [`ExpertPool::combine`].
pub struct Ticket<B: Backend> {
    /// What the pool needs to find the result again: the result itself in process, a stream's tag over the network.
    pub state: TicketState<B>,
}

/// State of a dispatched layer.
pub enum TicketState<B: Backend> {
    /// Computed already.
    Ready(B::Tensor),
    /// Under way elsewhere, under this number.
    Remote(u64),
}

/// Executes experts somewhere. `dispatch` and `combine` are separate so that two micro-batches can overlap.
pub trait ExpertPool<B: Backend>: Send + Sync {
    /// Sends tokens `x` `[tokens, hidden]` of MoE layer `layer` (the decoder's layer index) to their experts.
    /// Each token's result is summed in the order of its experts in `routing`, so it does not depend on the batch.
    fn dispatch(&self, layer: usize, x: &B::Tensor, routing: &Routing) -> Result<Ticket<B>>;
    /// The weighted sums `[tokens, hidden]`.
    fn combine(&self, ticket: Ticket<B>) -> Result<B::Tensor>;
    /// Into how many micro-batches a step of so many tokens is worth being cut, so that attention of one runs while
    /// the experts of another compute; 1 where the experts run on the caller's thread.
    fn micro_batches(&self, _tokens: usize) -> usize {
        1
    }
}
