//! Measures Moesaic from outside: benchmark models, loads, the services as processes, and records of what came out.
//!
//! Nothing that serves requests depends on this crate. Each scenario is one subcommand of `moesaic-loadtest`.
#![forbid(unsafe_code)]

pub mod breakdown;
pub mod client;
pub mod cluster;
pub mod events;
pub mod generator;
pub mod load;
pub mod machine;
pub mod mock;
pub mod model;
pub mod origin;
pub mod peers;
pub mod random;
pub mod report;
pub mod scenarios;
pub mod scrape;
pub mod stats;
pub mod trace;

use std::io::Write;

/// Says on stderr what is being done.
pub fn tell(what: &str) {
    // a terminal that is gone is no reason to stop
    let _ = writeln!(std::io::stderr(), "moesaic-loadtest: {what}");
}
