//! One file an actor.
pub mod shard_control;
