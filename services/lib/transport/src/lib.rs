//! How services reach each other: the boundary traits' implementations that need no model.
//!
//! [`memory`] and [`file_queue`] have those of embedded mode; the cluster's ([`grpc`], [`nats`], [`redis_metadata`])
//! stand beside them. [`membership`] says who is there, [`placement`] which experts are where, and
//! [`channel`](mod@channel) connects to a member.
#![forbid(unsafe_code)]

pub mod channel;
pub mod config;
mod cues;
pub mod experts;
pub mod file_queue;
pub mod grpc;
pub mod host;
pub mod kv;
pub mod membership;
pub mod memory;
pub mod nats;
pub mod placement;
pub mod pulse;
pub mod redis_metadata;
pub mod serve;
pub mod subjects;

pub use channel::channel;
pub use config::ClusterConfig;
pub use experts::{ExpertsOptions, RemoteExperts};
pub use file_queue::FileQueue;
pub use grpc::{GrpcPlacer, GrpcReplica};
pub use kv::RemotePrefixStore;
pub use membership::{Directory, Registration};
pub use memory::{MemoryBus, MemoryMetadata};
pub use nats::{JetStreamQueue, JobLimits, Nats, NatsBus};
pub use redis_metadata::RedisMetadata;
pub use serve::{SocketListener, serve, stopped};
