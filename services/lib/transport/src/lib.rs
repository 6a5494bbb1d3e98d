//! How services reach each other: the boundary traits' implementations that need no model.
//!
//! [`memory`] and [`file_queue`] have those of embedded mode; the cluster's (NATS, Redis) stand beside them.
#![forbid(unsafe_code)]

pub mod config;
pub mod file_queue;
pub mod host;
pub mod membership;
pub mod memory;
pub mod nats;
pub mod redis_metadata;
pub mod subjects;

pub use config::ClusterConfig;
pub use file_queue::FileQueue;
pub use membership::{Directory, Registration};
pub use memory::{MemoryBus, MemoryMetadata};
pub use nats::{JetStreamQueue, JobLimits, Nats, NatsBus};
pub use redis_metadata::RedisMetadata;
