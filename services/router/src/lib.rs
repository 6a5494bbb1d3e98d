//! The router: decides which replica takes a request, by prefix overlap and load. It holds no request data.
//!
//! [`Router::start`] wires two actors: the replica table (load, readiness, circuit breakers, and the line of requests that
//! wait for a replica with room) and the prefix index (which replica and which kv-store is believed to have which KV
//! blocks, fed by numbered events). The decisions themselves are pure: [`policy::choose`] which replica, [`queue`] who is
//! next, [`table::Table`] both together. In a cluster, [`grpc`] finds the replicas and takes the requests, and
//! [`PlacementLeader`] places experts on their shards.
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate self as moesaic_router;

pub mod actors;
mod app;
pub mod breaker;
pub mod canary;
pub mod config;
mod feeds;
pub mod grpc;
pub mod index;
mod metrics;
pub mod news;
pub mod placement;
pub mod policy;
pub mod prefixes;
pub mod process;
pub mod queue;
pub mod replica;
pub mod table;

pub use app::Router;
pub use config::Config;
pub use placement::PlacementLeader;
pub use process::RouterProcess;
