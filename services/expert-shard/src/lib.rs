//! The expert-shard: executes experts and returns, for each token, the weighted sum over the experts that it holds.
//!
//! In embedded mode it is called in process, through [`ExpertPool`](moesaic_model::expert_pool::ExpertPool).
#![forbid(unsafe_code)]

pub mod actors;
mod app;
pub mod config;
pub mod load;

pub use app::ExpertShard;
pub use config::Config;
