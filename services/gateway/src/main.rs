//! `moesaic-gateway`: the door as a process of a cluster.
#![forbid(unsafe_code)]
use moesaic_gateway::GatewayProcess;
use std::process::ExitCode;

fn main() -> ExitCode {
    moesaic_service::main::<GatewayProcess>(
        "moesaic-gateway",
        "The only door: HTTP as OpenAI's clients speak it, and gRPC.",
    )
}
