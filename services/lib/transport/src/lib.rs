//! How services reach each other: the boundary traits' implementations that need no model.
//!
//! [`memory`] and [`file_queue`] have those of embedded mode; the cluster's (gRPC, NATS, Redis) stand beside it.
#![forbid(unsafe_code)]

pub mod file_queue;
pub mod memory;
pub mod redis_metadata;
pub mod subjects;

pub use file_queue::FileQueue;
pub use memory::{MemoryBus, MemoryMetadata};
pub use redis_metadata::RedisMetadata;
