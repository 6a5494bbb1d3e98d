//! Support for tests, and for nothing else: one conformance suite for each boundary trait.
//!
//! A suite panics at the first promise of the trait that an implementation breaks. Run it on every implementation.
#![forbid(unsafe_code)]

pub mod conformance;
mod wait;

pub use wait::{DEADLINE, soon, until};
