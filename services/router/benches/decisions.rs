//! How fast the router decides, and what its policies come to. Prints two tables; nothing is asserted.
//!
//!     cargo bench -p moesaic-router --bench decisions
#![allow(clippy::print_stdout, reason = "a bench prints")]
#![allow(clippy::unwrap_used, reason = "a bench fails there")]
mod live;
mod simulation;

use live::{Run, Traffic};
use moesaic_config::HumanDuration;
use moesaic_router::Config;
use moesaic_router::index::{Owner, PrefixIndex};
use moesaic_router::policy::Policy;
use moesaic_router::table::{Decision, Table};
use moesaic_transport::kv::Tier;
use moesaic_types::boundary::{KvEvent, PlaceRequest, ReplicaLoad};
use moesaic_types::{BLOCK_TOKENS, BlockHash, ReplicaId, RequestId};
use simulation::{Cluster, Machine, POLICIES, Random, chain, prefix_heavy, summary};
use std::sync::Arc;
use std::time::{Duration, Instant};

const REPLICAS: usize = 1000;
/// Of a prompt of 100,000 tokens.
const BLOCKS: usize = 100_000_usize.div_ceil(BLOCK_TOKENS);
/// Requests in line.
const LINE: usize = 1024;
/// System prompts, each at one replica in ten or at all; of them documents at one or two, parts of these in kv-stores.
const SYSTEM_PROMPTS: u64 = 20;
const SYSTEM_BLOCKS: usize = 32;
const DOCUMENTS: u64 = 400;

fn main() {
    // cargo passes flags of its own harness
    let samples = if cfg!(debug_assertions) { 300 } else { 5000 };
    decisions(samples);
    policies();
}

fn percentile(sorted: &[Duration], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6
}

fn line(what: &str, mut times: Vec<Duration>, wall: Duration) {
    times.sort_unstable();
    let rate = times.len() as f64 / wall.as_secs_f64();
    let [p50, p99] = [0.5, 0.99].map(|share| percentile(&times, share));
    println!("{what:<58} {rate:>10.0} {p50:>9.1} {p99:>9.1}");
}

/// The same for calls one after another, without what is between them.
fn line_of_calls(what: &str, times: Vec<Duration>) {
    let wall = times.iter().sum();
    line(what, times, wall);
}

/// Times calls, each by itself.
fn timed(samples: usize, mut work: impl FnMut(usize)) -> Vec<Duration> {
    let call = |sample| {
        let start = Instant::now();
        work(sample);
        start.elapsed()
    };
    (0..samples).map(call).collect()
}

fn id(number: usize) -> ReplicaId {
    ReplicaId::new(format!("replica-{number:04}"))
}

/// A document behind its system prompt.
fn document(number: u64) -> Vec<BlockHash> {
    let mut blocks = chain(number % SYSTEM_PROMPTS, SYSTEM_BLOCKS);
    blocks.extend(chain(10_000 + number, BLOCKS - SYSTEM_BLOCKS));
    blocks
}

/// A prompt that asks about a document that some replica knows, whole or in part, or about a new one.
fn prompts() -> Vec<Vec<BlockHash>> {
    let mut random = Random(3);
    let prompt = |number: u64| match number % 4 {
        0 => document(1_000_000 + number),
        1 => {
            let mut blocks = document(random.next() % DOCUMENTS);
            let at = BLOCKS / 2;
            blocks.truncate(at);
            blocks.extend(chain(random.next(), BLOCKS - at));
            blocks
        }
        _ => document(random.next() % DOCUMENTS),
    };
    (0..200).map(prompt).collect()
}

/// Feeds `apply` what replicas and kv-stores have.
fn known(is_everywhere: bool, mut apply: impl FnMut(&Owner, KvEvent)) {
    let mut random = Random(5);
    for replica in 0..REPLICAS {
        let owner = Owner::Replica(id(replica));
        for prompt in 0..SYSTEM_PROMPTS {
            if is_everywhere || random.below(10) == 0 {
                apply(&owner, KvEvent::Stored { blocks: chain(prompt, SYSTEM_BLOCKS) });
            }
        }
    }
    for number in 0..DOCUMENTS {
        for _ in 0..1 + random.below(2) {
            let owner = Owner::Replica(id(random.below(REPLICAS)));
            apply(&owner, KvEvent::Stored { blocks: document(number) });
        }
        if number % 2 == 0 {
            let tier = if number % 4 == 0 { Tier::Ram } else { Tier::Disk };
            let owner = Owner::Store(format!("kv-{}", number % 3).into(), tier);
            apply(&owner, KvEvent::Stored { blocks: document(number) });
        }
    }
}

fn load(random: &mut Random) -> ReplicaLoad {
    ReplicaLoad {
        running: random.below(30),
        waiting: 0,
        kv_blocks_total: 16_384,
        kv_blocks_used: random.below(8000),
        max_context: 131_072,
        max_running: 64,
    }
}

fn request(blocks: &[BlockHash]) -> PlaceRequest {
    let blocks = blocks.to_vec();
    PlaceRequest { blocks, ..PlaceRequest::new(RequestId::new("r"), 100_000, 512) }
}

fn index(is_everywhere: bool) -> PrefixIndex {
    let mut index = PrefixIndex::new(4_000_000);
    let (life, mut sequences) = (Arc::from("life"), std::collections::HashMap::new());
    known(is_everywhere, |owner, event| {
        let sequence = sequences.entry(owner.clone()).or_insert(0);
        *sequence += 1;
        index.apply(owner, &life, *sequence, &event);
    });
    index
}

/// A table whose replicas have told their loads.
fn table<R>(policy: Policy, random: &mut Random, start: Instant) -> Table<R> {
    let config = Config { policy, canary_interval: HumanDuration::default(), ..Config::default() };
    let mut table = Table::new(config.rules());
    for number in 0..REPLICAS {
        table.add(id(number), None);
        table.heard(&id(number), Ok(load(random)), start, start);
    }
    table
}

fn decisions(samples: usize) {
    let build = if cfg!(debug_assertions) { "a debug build" } else { "a release build" };
    println!("Decisions, {REPLICAS} replicas, prompts of 100,000 tokens ({BLOCKS} blocks), {build}\n");
    println!("{:<58} {:>10} {:>9} {:>9}", "", "per second", "p50 us", "p99 us");
    let requests: Vec<PlaceRequest> = prompts().iter().map(|prompt| request(prompt)).collect();
    let of = |sample: usize| &requests[sample % requests.len()];
    let indexes = [false, true].map(index);
    for (index, where_at) in indexes.iter().zip(["10%", "all"]) {
        let what = format!("lookup, system prompts at {where_at} of the replicas");
        line_of_calls(&what, timed(samples, |sample| drop(std::hint::black_box(index.prefixes(&of(sample).blocks)))));
    }
    for (name, policy) in POLICIES {
        let (mut random, start) = (Random(9), Instant::now());
        let mut table: Table<()> = table(policy, &mut random, start);
        let decided = timed(samples, |sample| {
            let request = of(sample);
            let prefixes = match policy {
                Policy::PrefixAware => indexes[0].prefixes(&request.blocks),
                Policy::LeastLoaded | Policy::RoundRobin => Default::default(),
            };
            let decision = table.decide(request, &prefixes, start);
            assert!(matches!(decision, Decision::Placed(_)), "{decision:?}");
            if sample % 500 == 499 {
                let later = start + Duration::from_secs(1);
                for number in 0..REPLICAS {
                    table.heard(&id(number), Ok(load(&mut random)), later, start);
                }
            }
        });
        line_of_calls(&format!("{name}, lookup and choice"), decided);
    }
    line_of_calls(&format!("a load gives one of {LINE} in line a place"), from_line(&requests, &indexes[0], samples));
    drop(indexes);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let quiet = Traffic::default();
    let rows = [
        ("router, nothing else", quiet, 1),
        ("router, system prompts at all replicas", Traffic { is_everywhere: true, ..quiet }, 1),
        ("router, loads", Traffic { loads: 4000, ..quiet }, 1),
        ("router, KV events", Traffic { kv: 200, ..quiet }, 1),
        (
            "router, 8 clients, loads and KV events, prompts at all",
            Traffic { loads: 4000, kv: 200, is_everywhere: true },
            8,
        ),
    ];
    for (what, traffic, clients) in rows {
        let Run { times, wall, told, refused } = runtime.block_on(live::run(&requests, traffic, clients, samples));
        line(what, times, wall);
        if traffic.loads + traffic.kv > 0 {
            let (loads, kv) = told;
            println!("    beside {loads:.0} loads and {kv:.0} KV events of 512 blocks a second; {refused} refused");
        }
    }
    println!();
}

/// All replicas are full and the line too; one says that it has room, one request goes there, another comes.
fn from_line(requests: &[PlaceRequest], index: &PrefixIndex, samples: usize) -> Vec<Duration> {
    let (mut random, mut now) = (Random(9), Instant::now());
    let mut table = table(Policy::PrefixAware, &mut random, now);
    let full = ReplicaLoad { running: 64, waiting: 2, ..load(&mut random) };
    for number in 0..REPLICAS {
        table.heard(&id(number), Ok(full.clone()), now, now);
    }
    let requests: Vec<Arc<PlaceRequest>> = requests.iter().cloned().map(Arc::new).collect();
    let mut coming = requests.iter().cycle();
    let mut come = |table: &mut Table<()>, now| table.wait(Arc::clone(coming.next().unwrap()), (), now).unwrap();
    (0..LINE).for_each(|_| {
        come(&mut table, now);
    });
    timed(samples.min(1000), |sample| {
        now += Duration::from_secs(1);
        let free = id(sample % REPLICAS);
        table.heard(&free, Ok(ReplicaLoad { waiting: 1, ..full.clone() }), now, now);
        let waiting = table.next(now).unwrap();
        let prefixes = index.prefixes(&waiting.request.request.blocks);
        table.bind(waiting, &prefixes, now, |(), _| true).unwrap();
        table.heard(&free, Ok(full.clone()), now, now);
        come(&mut table, now);
    })
}

fn policies() {
    const MACHINE: Machine = Machine { max_running: 8, blocks: 512, prefill_tokens: 256 };
    println!(
        "Policies, simulated: 8 replicas, 64 system prompts of 2,048 tokens (each replica's cache holds 12 to 16 of them)\n"
    );
    println!("{:<28} {:>9} {:>14} {:>14}", "", "hit rate", "TTFT p50 ms", "TTFT p99 ms");
    for (load, per_second) in [("half of saturation", 20.0), ("saturation", 60.0)] {
        let arrivals = prefix_heavy(7, 64, 3000, per_second);
        for (name, policy) in POLICIES {
            let mut cluster = Cluster::new(&Config { policy, ..Config::default() }, 8, MACHINE);
            let summary = summary(&cluster.play(&arrivals));
            let what = format!("{load}, {name}");
            let rate = summary.hit_rate * 100.0;
            println!("{what:<34} {rate:>6.1}% {:>12.0} {:>14.0}", summary.first_p50, summary.first_p99);
        }
    }
}
