//! The kv-store: finished KV blocks in RAM and on disk, by the name of their content, for all replicas to share.
#![forbid(unsafe_code)]

pub mod actors;
mod app;
mod budget;
mod cluster;
pub mod config;
pub mod disk;
pub mod groups;
mod grpc;
pub mod pool;
pub mod process;
pub mod shelf;
mod telling;

pub use app::KvStore;
pub use cluster::{Cluster, Joined};
pub use config::Config;
pub use grpc::{KvService, kv_service};
pub use process::KvStoreProcess;
