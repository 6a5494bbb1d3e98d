//! Processes that are killed, frozen, and restarted one after another, and the servers that all of them share.
use crate::cluster::{Cluster, Kind};
use crate::hosts::Hosts;
use crate::load::Outcome;
use crate::suite::{EXPERT_TOKENS, Fault, GENERATED, PLACED, Suite, leader, stores_are_used};
use anyhow::Result;
use std::time::Duration;

/// Two of everything; each expert is in both groups where `copies` is 2.
pub fn two_of_everything(hosts: Hosts, copies: usize) -> Result<Cluster> {
    let mut cluster = Cluster::new(hosts, None)?;
    add_two_of_everything(&mut cluster, copies, &[])?;
    Ok(cluster)
}

/// The same, in a cluster that is there; `stores` are settings of the kv-stores.
pub fn add_two_of_everything(cluster: &mut Cluster, copies: usize, stores: &[&str]) -> Result<()> {
    let copies = format!("router.placement.min_copies={copies}");
    let router = [&copies, "router.placement.min_groups=2", "router.placement.settle=200ms"];
    let scheduler = ["scheduler.experts=shards", "scheduler.kv_blocks=32", "scheduler.prefix_store_fetch=always"];
    for (name, group) in [("e0", "expert_shard.group=0"), ("e1", "expert_shard.group=1")] {
        cluster.add(Kind::Shard, name, &[group])?;
    }
    for name in ["k0", "k1"] {
        cluster.add(Kind::Store, name, &[&["kv_store.replication=2"], stores].concat())?;
    }
    for name in ["s0", "s1"] {
        cluster.add(Kind::Scheduler, name, &scheduler)?;
    }
    for name in ["r0", "r1"] {
        cluster.add(Kind::Router, name, &router)?;
    }
    for name in ["g0", "g1"] {
        // so that the same blocks belong to the same kv-store in each run
        cluster.add(Kind::Gateway, name, &["gateway.salt_secret=chaos"])?;
    }
    Ok(())
}

#[test]
fn killed_frozen_and_restarted_processes() {
    let cluster = two_of_everything(Hosts::loopback(), 2).unwrap();
    let mut suite = Suite::start("1-processes", cluster).unwrap();
    kill(&mut suite);
    freeze(&mut suite);
    servers(&mut suite);
    restart_all(&mut suite);
    suite.finish().unwrap();
}

fn kill(suite: &mut Suite) {
    let leading = leader(&suite.cluster).unwrap();
    let all = [
        ("s0", "a scheduler", "its streams go on at the other", GENERATED),
        ("e0", "a shard, its experts have copies", "the copies answer", EXPERT_TOKENS),
        (leading, "the leading router", "the other places and leads", PLACED),
    ];
    for (name, what, expected, metric) in all {
        let fault = Fault::new(format!("kill -9 {what}"), expected).lasting_shortly().then_works(name, metric);
        suite.fault(fault, move |c| c.kill(name), move |c| c.start(name));
    }
    let fault = Fault::new("kill -9 a kv-store", "its blocks are computed or come from the other").lasting_shortly();
    suite.fault(
        fault,
        |c| {
            c.kill("k0")?;
            stores_are_used(c, "s0")
        },
        |c| c.start("k0"),
    );
    let door = suite.cluster.member("g0").address;
    let expected = "its connections break, clients ask again at the other; no other is lost";
    let fault = Fault::new("kill -9 a gateway", expected).lasting_shortly().losing(door);
    suite.fault(fault, |c| c.kill("g0"), |c| c.start("g0"));
    both(suite);
}

/// Nobody is left of a kind.
fn both(suite: &mut Suite) {
    let kill = |names: [&'static str; 2]| move |c: &mut Cluster| names.iter().try_for_each(|name| c.kill(name));
    let start = |names: [&'static str; 2]| move |c: &mut Cluster| names.iter().try_for_each(|name| c.start(name));
    let fault = |what: &str, expected| Fault::new(format!("kill -9 {what}"), expected).lasting_shortly();
    let (schedulers, shards, routers, stores) = (["s0", "s1"], ["e0", "e1"], ["r0", "r1"], ["k0", "k1"]);
    let all = fault("all schedulers", "requests end with the error `unavailable`, at once").unavailable();
    suite.fault(all.then_works("s0", GENERATED), kill(schedulers), start(schedulers));
    let all = fault("all shards", "streams wait until they are back and go on");
    suite.fault(all.then_works("e0", EXPERT_TOKENS), kill(shards), start(shards));
    let all = fault("all routers", "what is new is refused with `unavailable`; what runs goes on");
    let all = all.allowing(|ended| matches!(ended.outcome, Outcome::Refused { status: Some(503), .. }));
    suite.fault(all.then_works("r0", PLACED), kill(routers), start(routers));
    let all = fault("all kv-stores", "their blocks are computed");
    suite.fault(all, kill(stores), move |c| {
        start(stores)(c)?;
        stores_are_used(c, "s0")
    });
}

fn freeze(suite: &mut Suite) {
    let leading = leader(&suite.cluster).unwrap();
    let all = [
        ("s1", "a scheduler", "its streams go on at the other", Some(GENERATED)),
        ("e1", "a shard, its experts have copies", "the copies answer", Some(EXPERT_TOKENS)),
        (leading, "the leading router", "the other places and leads", Some(PLACED)),
        ("k1", "a kv-store", "its blocks are computed or come from the other", None),
        ("g1", "a gateway", "its streams stand still and go on", None),
        ("redis", "Redis", "all go on with what they know", None),
        ("nats", "NATS", "all go on with what they know", None),
    ];
    for (name, what, expected, works) in all {
        let fault = Fault::new(format!("SIGSTOP {what}"), expected);
        let fault = works.into_iter().fold(fault, |fault, metric| fault.then_works(name, metric));
        suite.fault(fault, move |c| c.signal(name, "STOP"), move |c| c.signal(name, "CONT"));
    }
}

fn servers(suite: &mut Suite) {
    for (name, what) in [("redis", "Redis"), ("nats", "NATS")] {
        let fault = |how: &str| Fault::new(format!("{what} {how}"), "all go on with what they know");
        suite.fault(fault("killed and restarted").lasting_shortly(), move |c| c.kill(name), move |c| c.start(name));
        suite.fault(fault("killed and restarted empty"), move |c| c.kill(name), move |c| c.start_empty(name));
    }
    let fault = Fault::new("Redis and NATS gone, then a scheduler killed", "its streams go on at the other");
    let begin = |c: &mut Cluster| {
        c.kill("redis")?;
        c.kill("nats")?;
        c.kill("s0")
    };
    let end = |c: &mut Cluster| {
        c.start_empty("redis")?;
        c.start_empty("nats")?;
        c.start("s0")
    };
    suite.fault(fault.then_works("s0", GENERATED), begin, end);
}

/// Each process in turn, as an upgrade does it.
fn restart_all(suite: &mut Suite) {
    let fault = Fault::new(
        "rolling restart of everything (SIGTERM)",
        "a gateway that ends takes no new connections; no request fails",
    );
    // a client that is not let in goes to the other gateway: nothing of its was accepted
    let fault = fault.allowing(|ended| matches!(ended.outcome, Outcome::Refused { status: None, .. }));
    let all = |c: &mut Cluster| {
        for name in c.members().iter().map(|member| member.name).collect::<Vec<_>>() {
            if matches!(c.member(name).kind, Kind::Redis | Kind::Nats) {
                c.kill(name)?;
            } else {
                c.stop(name)?;
            }
            c.start(name)?;
            c.becomes_whole()?;
        }
        Ok(())
    };
    suite.fault(fault.lasting(Duration::ZERO), all, |_| Ok(()));
}
