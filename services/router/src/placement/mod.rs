//! Which expert-parallel groups hold which experts: computed by the router that leads, from the load that the shards
//! measure.
//!
//! Routers seek a [`lease`]; the one that holds it looks at the shards and at the record ([`state`]), [`plan`]s, has
//! all shards load what a new placement wants of them, writes the record, and has them switch. A record is written over
//! the version that was read, so that a router that was deposed meanwhile writes nothing; each placement has an epoch of
//! its own, so that what a shard loaded for one never passes for another's.
pub mod config;
mod leader;
pub mod lease;
pub mod plan;
mod procedure;
pub mod seen;
pub mod shard;
pub mod state;

pub use config::Config;
pub use leader::PlacementLeader;
pub(crate) use procedure::{Ground, Looked};
