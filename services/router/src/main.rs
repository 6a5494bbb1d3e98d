//! `moesaic-router`: the router as a process of a cluster.
#![forbid(unsafe_code)]
use moesaic_router::RouterProcess;
use std::process::ExitCode;

fn main() -> ExitCode {
    moesaic_service::main::<RouterProcess>("moesaic-router", "Decides which replica takes a request.")
}
