//! How services reach each other: the boundary traits' implementations that need no model.
//!
//! [`memory`] has those of embedded mode; the cluster's (gRPC, NATS, Redis) stand beside it.
#![forbid(unsafe_code)]

pub mod memory;
pub mod subjects;

pub use memory::{MemoryBus, MemoryMetadata};
