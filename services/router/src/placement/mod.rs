//! Which expert-parallel groups hold which experts: computed by the router that leads, from the load that the shards
//! measure.
//!
//! [`plan`] decides, without a clock or a server.
pub mod plan;
