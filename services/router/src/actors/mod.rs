//! One file an actor.
pub mod prefix_index;
pub mod replica_table;
