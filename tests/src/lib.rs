//! Support of the scenarios: real processes on loopback, and a small HTTP client that can hang up.
#![forbid(unsafe_code)]

pub mod http;
pub mod process;

use std::path::PathBuf;

/// The root of the checkout.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().map(PathBuf::from).unwrap_or_default()
}
