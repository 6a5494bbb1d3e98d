//! Processes that are killed, frozen, and restarted one after another, and the servers that all of them share.
use crate::cluster::{Cluster, Kind};
use crate::hosts::Hosts;
use crate::load::Outcome;
use crate::suite::{
    EXPERT_TOKENS, Fault, GENERATED, LEADER, MIGRATIONS, PLACED, RUNNING, STEP_RETRIES, Suite, leader, stores_are_used,
};
use anyhow::Result;
use moesaic_tests::until;
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
    suite.undisturbed();
    kill(&mut suite);
    freeze(&mut suite);
    servers(&mut suite);
    restart_all(&mut suite);
    suite.finish().unwrap();
}

fn kill(suite: &mut Suite) {
    let fault = |what: &str, expected| Fault::new(format!("kill -9 {what}"), expected).lasting_shortly();
    let scheduler = fault("a scheduler", "its streams go on at the other").goes_on().grows(&["g0", "g1"], MIGRATIONS);
    let scheduler = scheduler.leaves_one(&["r0", "r1"]);
    let begin = |c: &mut Cluster| {
        works(c, "s0")?;
        c.kill("s0")
    };
    suite.fault(scheduler.then_works("s0", GENERATED), begin, |c| c.start("s0"));
    let shard = fault("a shard, its experts have copies", "the copies answer").goes_on().grows(&["e1"], EXPERT_TOKENS);
    suite.fault(shard.then_works("e0", EXPERT_TOKENS), |c| c.kill("e0"), |c| c.start("e0"));
    let leading = leader(&suite.cluster).unwrap();
    let router = another_leads(fault("the leading router", "the other places and leads"), leading);
    suite.fault(router.then_works(leading, PLACED), |c| c.kill(leading), |c| c.start(leading));
    let store = fault("a kv-store", "its blocks are computed or come from the other").goes_on();
    suite.fault(
        store,
        |c| {
            c.kill("k0")?;
            stores_are_used(c, "s0", &["k1"])
        },
        |c| c.start("k0"),
    );
    let door = suite.cluster.member("g0").address;
    let gateway = fault("a gateway", "its connections break, clients ask again at the other; no other is lost");
    suite.fault(gateway.losing(door).goes_on(), |c| c.kill("g0"), |c| c.start("g0"));
    both(suite);
}

/// Waits until a scheduler works, so that who is lost next has something to lose.
pub fn works(cluster: &Cluster, scheduler: &str) -> Result<()> {
    until(&format!("{scheduler} works"), || Ok(cluster.member(scheduler).metric(RUNNING)? > 0.0))
}

/// The router that is not `leading` leads while the fault lasts, and places.
fn another_leads(fault: Fault, leading: &'static str) -> Fault {
    let other = if leading == "r0" { "r1" } else { "r0" };
    fault.goes_on().grows(&[other], PLACED).meanwhile(move |watch| {
        until("the other router leads", || Ok(watch.cluster.member(other).metric(LEADER)? > 0.0))
    })
}

/// Nobody is left of a kind.
fn both(suite: &mut Suite) {
    let kill = |names: [&'static str; 2]| move |c: &mut Cluster| names.iter().try_for_each(|name| c.kill(name));
    let start = |names: [&'static str; 2]| move |c: &mut Cluster| names.iter().try_for_each(|name| c.start(name));
    let fault = |what: &str, expected| Fault::new(format!("kill -9 {what}"), expected).lasting_shortly();
    let (schedulers, shards, routers, stores) = (["s0", "s1"], ["e0", "e1"], ["r0", "r1"], ["k0", "k1"]);
    let door = suite.cluster.member("g0").address;
    let all =
        fault("all schedulers", "what is new is refused with `unavailable`; what runs waits, and goes on or ends so");
    let all = all.unavailable().refuses(door);
    suite.fault(all.then_works("s0", GENERATED), kill(schedulers), start(schedulers));
    let all = fault("all shards", "streams wait until they are back and go on").grows(&schedulers, STEP_RETRIES);
    suite.fault(all.then_works("e0", EXPERT_TOKENS), kill(shards), start(shards));
    let all = fault("all routers", "what is new is refused with `unavailable`; what runs goes on");
    let all = all.allowing(|ended| matches!(ended.outcome, Outcome::Refused { status: Some(503), .. }));
    suite.fault(all.refuses(door).then_works("r0", PLACED), kill(routers), start(routers));
    let all = fault("all kv-stores", "their blocks are computed").goes_on();
    suite.fault(all, kill(stores), move |c| {
        start(stores)(c)?;
        stores_are_used(c, "s0", &stores)
    });
}

fn freeze(suite: &mut Suite) {
    let fault = |what: &str, expected| Fault::new(format!("SIGSTOP {what}"), expected);
    let freeze = |name: &'static str| move |c: &mut Cluster| c.signal(name, "STOP");
    let thaw = |name: &'static str| move |c: &mut Cluster| c.signal(name, "CONT");
    let scheduler = fault("a scheduler", "its streams go on at the other").goes_on().grows(&["g0", "g1"], MIGRATIONS);
    let scheduler = scheduler.leaves_one(&["r0", "r1"]);
    let begin = |c: &mut Cluster| {
        works(c, "s1")?;
        c.signal("s1", "STOP")
    };
    suite.fault(scheduler.then_works("s1", GENERATED), begin, thaw("s1"));
    let shard = fault("a shard, its experts have copies", "the copies answer").goes_on().grows(&["e0"], EXPERT_TOKENS);
    suite.fault(shard.then_works("e1", EXPERT_TOKENS), freeze("e1"), thaw("e1"));
    let leading = leader(&suite.cluster).unwrap();
    let router = another_leads(fault("the leading router", "the other places and leads"), leading);
    suite.fault(router.then_works(leading, PLACED), freeze(leading), thaw(leading));
    let store = fault("a kv-store", "its blocks are computed or come from the other").goes_on();
    suite.fault(store, freeze("k1"), thaw("k1"));
    let door = suite.cluster.member("g0").address;
    let gateway = fault("a gateway", "its streams stand still and go on; the other's go on");
    let gateway = gateway.meanwhile(move |watch| watch.load.answered_at(door, watch.begun));
    suite.fault(gateway, freeze("g1"), thaw("g1"));
    for (name, what) in [("redis", "Redis"), ("nats", "NATS")] {
        suite.fault(fault(what, "all go on with what they know").goes_on(), freeze(name), thaw(name));
    }
}

fn servers(suite: &mut Suite) {
    for (name, what) in [("redis", "Redis"), ("nats", "NATS")] {
        let fault = |how: &str| Fault::new(format!("{what} {how}"), "all go on with what they know").goes_on();
        suite.fault(fault("killed and restarted").lasting_shortly(), move |c| c.kill(name), move |c| c.start(name));
        suite.fault(fault("killed and restarted empty"), move |c| c.kill(name), move |c| c.start_empty(name));
    }
    let fault = Fault::new("Redis and NATS gone, then a scheduler killed", "its streams go on at the other");
    let fault = fault.goes_on().grows(&["g0", "g1"], MIGRATIONS);
    let begin = |c: &mut Cluster| {
        c.kill("redis")?;
        c.kill("nats")?;
        works(c, "s0")?;
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
    // a client that finds no door goes to the other one: nothing of its was accepted
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
