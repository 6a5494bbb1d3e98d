//! `moesaic-kv-store`: the kv-store as a process of a cluster.
#![forbid(unsafe_code)]
use moesaic_kv_store::KvStoreProcess;
use std::process::ExitCode;

fn main() -> ExitCode {
    moesaic_service::main::<KvStoreProcess>("moesaic-kv-store", "Keeps finished KV blocks for all replicas.")
}
