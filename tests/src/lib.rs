//! Support of the scenarios: real processes on loopback, and a small HTTP client that can hang up.
#![forbid(unsafe_code)]

pub mod cluster;
pub mod http;
pub mod process;
pub mod steady;

use anyhow::{Result, bail};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long a scenario waits for what must happen. Only a broken one waits that long.
const DEADLINE: Duration = Duration::from_secs(120);

/// The root of the checkout.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().map(PathBuf::from).unwrap_or_default()
}

/// Looks again and again until the condition holds.
///
/// # Errors
/// What the condition says, and that it does not come to hold in time.
pub fn until(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + DEADLINE;
    while !condition()? {
        if Instant::now() > deadline {
            bail!("{what}: not within {DEADLINE:?}");
        }
        std::thread::sleep(Duration::from_millis(5)); // between two looks at the condition
    }
    Ok(())
}
