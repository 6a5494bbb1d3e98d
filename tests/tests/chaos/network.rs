//! Networks that are cut, in both directions or in one, hosts that vanish, and slow links. Packets are lost without a
//! word: connections stay half-open.
use crate::cluster::{Cluster, Kind};
use crate::hosts::Hosts;
use crate::load::Outcome;
use crate::processes::two_of_everything;
use crate::suite::{EPOCH, EXPERT_TOKENS, Fault, GENERATED, Suite, leader};
use anyhow::{Result, bail};
use moesaic_tests::until;
use std::time::Duration;

#[test]
fn cut_and_slow_networks() {
    let hosts = match Hosts::namespaces().unwrap() {
        Ok(hosts) => hosts,
        Err(why) => return Suite::skip_all("2-network", "all faults of the network", &why).unwrap(),
    };
    let mut suite = Suite::start("2-network", two_of_everything(hosts, 2).unwrap()).unwrap();
    suite.undisturbed();
    between_services(&mut suite);
    from_servers(&mut suite);
    one_way(&mut suite);
    vanished_and_slow(&mut suite);
    suite.finish().unwrap();
}

/// Cuts pairs of members off from one another.
pub fn cut(suite: &mut Suite, fault: Fault, pairs: &[(&'static str, &'static str)]) {
    let begin = |c: &mut Cluster| {
        let mut hosts = pairs.iter().map(|(one, other)| (c.host(one), c.host(other))).collect::<Vec<_>>().into_iter();
        hosts.try_for_each(|(one, other)| c.hosts.cut(one, other))
    };
    suite.fault(disturbing(fault), begin, heal);
}

/// A fault of the network that somebody notices: packets were lost, or came late.
fn disturbing(fault: Fault) -> Fault {
    fault.meanwhile(|watch| watch.cluster.hosts.disturb())
}

fn heal(cluster: &mut Cluster) -> Result<()> {
    cluster.hosts.heal()
}

fn between_services(suite: &mut Suite) {
    let leading = leader(&suite.cluster).unwrap();
    let all = [
        ("a gateway and a router", "the other router places", ("g0", "r0")),
        ("a gateway and a scheduler", "its streams go on at the other", ("g0", "s0")),
        ("a router and a scheduler", "streams go on; it places at the other", ("r0", "s0")),
        ("a scheduler and a shard, its experts have copies", "the copies answer", ("s0", "e0")),
        ("a scheduler and a kv-store", "its blocks are computed or come from the other", ("s0", "k0")),
        ("two kv-stores", "no copies are made meanwhile", ("k0", "k1")),
    ];
    for (name, expected, pair) in all {
        let fault = Fault::new(format!("cut: {name}"), expected).goes_on();
        let fault = if pair == ("r0", "s0") { fault.leaves_one(&["r0"]) } else { fault };
        cut(suite, fault, &[pair]);
    }
    let epoch = suite.cluster.member(leading).metric(EPOCH).unwrap();
    let fault = Fault::new("cut: the leading router and a shard", "the placement stands").goes_on();
    let fault = fault.meanwhile(move |watch| match watch.cluster.member(leading).metric(EPOCH)? {
        now if now == epoch => Ok(()),
        now => bail!("the placement's epoch was {epoch} and is {now}"),
    });
    cut(suite, fault, &[(leading, "e0")]);
    let door = suite.cluster.member("g0").address;
    let fault = Fault::new("cut: a gateway and all routers", "it refuses what is new with 503; what runs goes on");
    let fault = fault.refuses(door).allowing(move |ended| {
        ended.door == door && matches!(ended.outcome, Outcome::Refused { status: Some(503), .. })
    });
    cut(suite, fault, &[("g0", "r0"), ("g0", "r1")]);
}

/// Longer than a lease, and than those are kept whose lease is over.
const LONG: Duration = Duration::from_secs(8);

fn from_servers(suite: &mut Suite) {
    let kinds = [
        (Kind::Gateway, "the gateways"),
        (Kind::Router, "the routers"),
        (Kind::Scheduler, "the schedulers"),
        (Kind::Shard, "the shards"),
        (Kind::Store, "the kv-stores"),
    ];
    for (kind, who) in kinds {
        let pairs: Vec<_> = suite.cluster.names(kind).into_iter().map(|name| (name, "redis")).collect();
        let expected = "they are heard by events; all go on with what they know";
        cut(suite, Fault::new(format!("cut: {who} and Redis"), expected).lasting(LONG).goes_on(), &pairs);
    }
    for (kind, who) in kinds {
        let pairs: Vec<_> = suite.cluster.names(kind).into_iter().map(|name| (name, "nats")).collect();
        let fault = Fault::new(format!("cut: {who} and NATS"), "changes are seen later").goes_on();
        cut(suite, fault, &pairs);
    }
}

fn one_way(suite: &mut Suite) {
    let all = [
        ("from a gateway to a scheduler", "its streams go on at the other", ("g0", "s0")),
        ("from a scheduler to a gateway", "its streams go on at the other", ("s0", "g0")),
        ("from a scheduler to a shard with copies", "the copies answer", ("s0", "e0")),
        ("from a shard with copies to a scheduler", "the copies answer", ("e0", "s0")),
        ("from Redis to a scheduler", "its lease runs out; it is back when it is heard", ("redis", "s0")),
    ];
    for (name, expected, (from, to)) in all {
        let fault = disturbing(Fault::new(format!("half-open: packets {name} are lost"), expected).goes_on());
        let fault = match from {
            "redis" => fault.meanwhile(|watch| until("its lease runs out", || Ok(!watch.cluster.has_lease("s0")?))),
            _ => fault,
        };
        let begin = |c: &mut Cluster| {
            let (from, to) = (c.host(from), c.host(to));
            c.hosts.lose(from, to)
        };
        suite.fault(fault, begin, heal);
    }
}

fn vanished_and_slow(suite: &mut Suite) {
    for (name, what, expected, metric) in [
        ("s0", "a scheduler's host", "its streams go on at the other", GENERATED),
        ("e0", "a shard's host, its experts have copies", "the copies answer", EXPERT_TOKENS),
    ] {
        let fault = Fault::new(format!("unplugged: {what}"), expected).goes_on().then_works(name, metric);
        let fault = if name == "s0" { fault.leaves_one(&["r0", "r1"]) } else { fault };
        suite.fault(fault, |c| c.hosts.unplug(c.host(name)), |c| c.hosts.plug_in(c.host(name)));
    }
    let slow = [
        ("g0", "a gateway"),
        ("r0", "a router"),
        ("s0", "a scheduler"),
        ("e0", "a shard"),
        ("k0", "a kv-store"),
        ("redis", "Redis"),
        ("nats", "NATS"),
    ];
    for (name, what) in slow {
        let fault = Fault::new(format!("slow link of {what}: 2 Mbit/s, 2 % lost"), "slower, nothing fails");
        // a scheduler's streams crawl, for each step's activations have to go through: one may not end for a minute
        let fault = disturbing(if name == "s0" { fault } else { fault.goes_on() });
        let begin = |c: &mut Cluster| {
            let host = c.host(name);
            c.hosts.slow(host)
        };
        suite.fault(fault, begin, heal);
    }
}
