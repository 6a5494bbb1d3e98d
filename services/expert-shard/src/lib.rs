//! The expert-shard: executes experts and returns, for each token, the weighted sum over the experts that it holds.
//!
//! In embedded mode it is called in process, through [`ExpertPool`](moesaic_model::expert_pool::ExpertPool); in a
//! cluster [`grpc`] takes what schedulers send, and [`executor`] computes it.
#![forbid(unsafe_code)]

pub mod actors;
mod app;
pub mod config;
pub mod executor;
pub mod grpc;
mod leaving;
pub mod library;
pub mod load;
mod process;
pub mod shelf;

pub use app::ExpertShard;
pub use config::Config;
pub use process::{Settings, ShardProcess};
