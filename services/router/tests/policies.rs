//! The router's decisions over simulated replicas: prefixes, fairness, priorities, and no replica without work while
//! somebody waits.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)] // A test fails by panicking, in its helpers too.
#[path = "../benches/simulation/mod.rs"]
mod simulation;

use moesaic_config::HumanDuration;
use moesaic_router::Config;
use simulation::{Arrival, Cluster, Machine, Outcome, POLICIES, Random, chain, prefix_heavy, summary};

const MACHINE: Machine = Machine { max_running: 8, blocks: 512, prefill_tokens: 256 };

fn waited(outcome: &Outcome) -> u64 {
    outcome.placed - outcome.came
}

#[test]
fn a_prefix_aware_router_finds_more_below_and_at_saturation() {
    for (name, per_second) in [("below", 20.0), ("at", 60.0)] {
        let arrivals = prefix_heavy(7, 64, 1500, per_second);
        let [aware, least, robin] = POLICIES.map(|(_, policy)| {
            let mut cluster = Cluster::new(&Config { policy, ..Config::default() }, 8, MACHINE);
            let summary = summary(&cluster.play(&arrivals));
            assert_eq!(cluster.refused, 0);
            summary
        });
        let rates = format!("{name} saturation: {aware:?} {least:?} {robin:?}");
        assert!(aware.hit_rate > 1.3 * robin.hit_rate && aware.hit_rate > 1.3 * least.hit_rate, "{rates}");
        assert!(aware.first_p50 <= robin.first_p50, "{rates}");
    }
}

#[test]
fn nobody_waits_while_a_replica_has_nothing_to_do() {
    for seed in 0..20 {
        let mut random = Random(seed);
        let machine = Machine { max_running: 1 + random.below(6), blocks: 200, prefill_tokens: 64 + random.below(512) };
        let replicas = 1 + random.below(6);
        let arrivals: Vec<Arrival> = (0..300)
            .map(|number| Arrival {
                step: number / 10 * random.below(8) as u64 / 2,
                tenant: random.below(4) as u8,
                priority: random.below(3) as i32,
                prompt: chain(random.next() % 20, 1 + random.below(30)),
                output: 1 + random.below(60),
            })
            .collect();
        let mut arrivals = arrivals;
        arrivals.sort_by_key(|arrival| arrival.step);
        let mut cluster = Cluster::new(&Config::default(), replicas, machine);
        let outcomes = cluster.play(&arrivals);
        assert_eq!(cluster.idle_while_others_wait, 0, "seed {seed}: {machine:?}");
        assert_eq!(outcomes.len(), 300);
        assert!(outcomes.iter().any(|outcome| waited(outcome) > 0), "seed {seed}: nobody waited, so nothing was shown");
    }
}

/// One request a second of a tenant beside another's hundreds at once.
fn flood(light_priority: i32) -> Vec<Arrival> {
    let arrival =
        |step, tenant, priority, number: u64| Arrival { step, tenant, priority, prompt: chain(number, 4), output: 50 };
    let heavy = (0..600).map(|number| arrival(0, 1, 0, number));
    let light = (0..20).map(|number| arrival(100 * number, 2, light_priority, 10_000 + number));
    let mut arrivals: Vec<_> = heavy.chain(light).collect();
    arrivals.sort_by_key(|arrival| arrival.step);
    arrivals
}

#[test]
fn a_tenant_that_floods_does_not_keep_others_waiting() {
    let mut cluster = Cluster::new(&Config::default(), 2, MACHINE);
    let outcomes = cluster.play(&flood(0));
    let longest = |tenant: u8| outcomes.iter().filter(|outcome| outcome.tenant == tenant).map(waited).max().unwrap();
    // sixteen run at a time for half a second each: one has room about every 30 ms
    assert!(longest(1) > 1500, "the flood takes a while: {} steps", longest(1));
    assert!(longest(2) <= 60, "the other waits for one or two to end: {} steps", longest(2));
}

#[test]
fn a_low_priority_waits_and_is_not_forgotten() {
    let promote = HumanDuration::from_secs(2);
    let mut cluster = Cluster::new(&Config { queue_promote_after: promote, ..Config::default() }, 2, MACHINE);
    let outcomes = cluster.play(&flood(-1));
    let mut low: Vec<u64> =
        outcomes.iter().filter(|outcome| outcome.tenant == 2).map(|outcome| outcome.placed).collect();
    let flood_ends = outcomes.iter().filter(|outcome| outcome.tenant == 1).map(|outcome| outcome.placed).max().unwrap();
    low.sort_unstable();
    let during: Vec<_> = low.iter().filter(|placed| **placed > 100 && **placed < flood_ends).collect();
    assert!(during.len() >= 3, "some go during the flood: {low:?}, it ends at {flood_ends}");
    let gaps: Vec<u64> = during.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(gaps.iter().all(|gap| (195..=260).contains(gap)), "one each two seconds: {gaps:?}");
}
