//! `moesaic service`: one service as a process of a cluster, as its own program runs it.
use crate::args::{Service, ServiceName};
use moesaic_expert_shard::ShardProcess;
use moesaic_gateway::GatewayProcess;
use moesaic_kv_store::KvStoreProcess;
use moesaic_router::RouterProcess;
use moesaic_scheduler::SchedulerProcess;
use std::io::{ErrorKind, Read};
use std::process::ExitCode;

pub fn run(args: Service) -> ExitCode {
    if args.end_with_stdin {
        std::thread::spawn(end_with_stdin);
    }
    let own = moesaic_service::Args { settings: args.settings, dump_config: args.dump_config };
    match args.name {
        ServiceName::Gateway => moesaic_service::run::<GatewayProcess>("moesaic-gateway", &own),
        ServiceName::Router => moesaic_service::run::<RouterProcess>("moesaic-router", &own),
        ServiceName::Scheduler => moesaic_service::run::<SchedulerProcess>("moesaic-scheduler", &own),
        ServiceName::ExpertShard => moesaic_service::run::<ShardProcess>("moesaic-expert-shard", &own),
        ServiceName::KvStore => moesaic_service::run::<KvStoreProcess>("moesaic-kv-store", &own),
    }
}

fn end_with_stdin() {
    wait_for_end_of_stdin();
    eprintln!("moesaic service: standard input ended, and with it this process");
    std::process::exit(1);
}

/// Blocks until whoever holds the other end of standard input closes it, or is gone.
pub fn wait_for_end_of_stdin() {
    let (mut stdin, mut buffer) = (std::io::stdin().lock(), [0; 256]);
    loop {
        match stdin.read(&mut buffer) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}
