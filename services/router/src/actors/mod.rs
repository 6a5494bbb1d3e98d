//! One file an actor.
pub mod expert_placement;
pub mod prefix_index;
pub mod replica_table;
