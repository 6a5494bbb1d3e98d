//! One file an actor.
pub mod block_pool;
