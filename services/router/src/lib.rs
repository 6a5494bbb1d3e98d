//! The router: decides which replica takes a request, by prefix overlap and load. It holds no request data.
//!
//! [`Router::start`] wires two actors: the replica table (load, readiness, circuit breakers) and the prefix index
//! (which replica is believed to have which KV blocks, fed by numbered events). The decision itself is
//! [`policy::choose`], a pure function. In a cluster, [`grpc`] finds the replicas and takes the requests, and
//! [`PlacementLeader`] places experts on their shards.
#![forbid(unsafe_code)]

pub mod actors;
mod app;
pub mod breaker;
pub mod config;
pub mod grpc;
pub mod index;
mod metrics;
pub mod placement;
pub mod policy;
pub mod process;

pub use app::Router;
pub use config::Config;
pub use placement::PlacementLeader;
pub use process::RouterProcess;
