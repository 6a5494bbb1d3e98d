//! The kv-store: finished KV blocks in RAM, by the name of their content, for all replicas to share.
#![forbid(unsafe_code)]

pub mod actors;
mod app;
pub mod config;
pub mod lru;
pub mod process;

pub use app::KvStore;
pub use config::Config;
pub use process::KvStoreProcess;
