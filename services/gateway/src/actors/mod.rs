//! One file an actor.
pub mod admission;
