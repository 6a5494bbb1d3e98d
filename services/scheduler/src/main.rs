//! `moesaic-scheduler`: a replica as a process of a cluster.
#![forbid(unsafe_code)]
use moesaic_scheduler::SchedulerProcess;
use std::process::ExitCode;

fn main() -> ExitCode {
    moesaic_service::main::<SchedulerProcess>("moesaic-scheduler", "Runs a replica of the model.")
}
