//! What every service has in common as a process: arguments, configuration, telemetry, its place in the cluster, the
//! admin server, and the way from the start to the end.
//!
//! A service implements [`Process`]; its `main.rs` is one call of [`main`].
#![forbid(unsafe_code)]

mod admin;
mod args;
mod cluster;
mod doors;
mod process;
mod run;
mod settings;
mod status;

pub use args::{Args, SettingsArgs};
pub use cluster::Cluster;
pub use doors::Doors;
pub use process::{Process, Settings};
pub use run::{main, run};
pub use settings::{SECTIONS, UNSET, check_drain, load};
