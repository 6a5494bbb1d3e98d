//! `moesaic-expert-shard`: a shard as a process of a cluster.
#![forbid(unsafe_code)]
use moesaic_expert_shard::ShardProcess;
use std::process::ExitCode;

fn main() -> ExitCode {
    moesaic_service::main::<ShardProcess>("moesaic-expert-shard", "Executes experts of the model.")
}
