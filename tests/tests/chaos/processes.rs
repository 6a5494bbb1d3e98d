//! Processes that are killed, frozen, and restarted.
use crate::cluster::{Cluster, Kind};
use crate::hosts::Hosts;
use crate::suite::{Fault, Suite};
use anyhow::Result;

/// Two of everything; each expert is in both groups where `copies` is 2.
pub fn two_of_everything(hosts: Hosts, copies: usize) -> Result<Cluster> {
    let copies = format!("router.placement.min_copies={copies}");
    let router = [&copies, "router.placement.min_groups=2", "router.placement.settle=200ms"];
    let scheduler = ["scheduler.experts=shards", "scheduler.kv_blocks=96", "scheduler.prefix_store_fetch=always"];
    let mut cluster = Cluster::new(hosts, "")?;
    for (name, group) in [("e0", "expert_shard.group=0"), ("e1", "expert_shard.group=1")] {
        cluster.add(Kind::Shard, name, &[group])?;
    }
    for name in ["k0", "k1"] {
        cluster.add(Kind::Store, name, &[])?;
    }
    for name in ["s0", "s1"] {
        cluster.add(Kind::Scheduler, name, &scheduler)?;
    }
    for name in ["r0", "r1"] {
        cluster.add(Kind::Router, name, &router)?;
    }
    for name in ["g0", "g1"] {
        cluster.add(Kind::Gateway, name, &[])?;
    }
    Ok(cluster)
}

const GENERATED: &str = "vllm:generation_tokens_total";

#[test]
fn killed_and_frozen_processes() {
    let mut suite = Suite::start("processes", two_of_everything(Hosts::loopback(), 2).unwrap()).unwrap();
    let fault = Fault::new("kill -9 of a scheduler", "its streams go on at the other; no request fails");
    suite.fault(fault.then_works("s0", GENERATED), |c| c.kill("s0"), |c| c.start("s0"));
    suite.finish().unwrap();
}
