//! Support for tests, and for nothing else: one conformance suite for each boundary trait, and real servers.
//!
//! A suite panics at the first promise of the trait that an implementation breaks. Run it on every implementation.
#![forbid(unsafe_code)]

pub mod conformance;
mod open;
pub mod otlp;
pub mod servers;
mod severed;
mod wait;

pub use open::Open;
pub use severed::Severed;
pub use wait::{DEADLINE, soon, until};
