//! How fast the router decides, and what its policies come to. Prints two tables; nothing is asserted.
//!
//!     cargo bench -p moesaic-router --bench decisions
#![allow(clippy::print_stdout, reason = "a bench prints")]
#![allow(clippy::unwrap_used, reason = "a bench fails there")]
mod simulation;

use futures::FutureExt;
use futures::future::BoxFuture;
use moesaic_config::HumanDuration;
use moesaic_router::index::{Owner, PrefixIndex};
use moesaic_router::policy::Policy;
use moesaic_router::table::{Decision, Table};
use moesaic_router::{Config, Router};
use moesaic_transport::MemoryBus;
use moesaic_transport::kv::Tier;
use moesaic_transport::subjects::Subject;
use moesaic_types::boundary::{DeltaStream, EventBus, KvEvent, PlaceRequest, Placer, Replica, ReplicaLoad};
use moesaic_types::{BLOCK_TOKENS, BlockHash, Error, GenerateRequest, ReplicaId, RequestId, Result};
use simulation::{Cluster, Machine, POLICIES, Random, chain, prefix_heavy, summary};
use std::sync::Arc;
use std::time::{Duration, Instant};

const REPLICAS: usize = 1000;
/// Of a prompt of 100,000 tokens, rounded down.
const BLOCKS: usize = 100_000 / BLOCK_TOKENS;
/// System prompts, each at one replica in ten; of them documents at one or two, and parts of these in kv-stores.
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

fn line(what: &str, mut times: Vec<Duration>) {
    let total: Duration = times.iter().sum();
    times.sort_unstable();
    let rate = times.len() as f64 / total.as_secs_f64();
    let [p50, p99] = [0.5, 0.99].map(|share| percentile(&times, share));
    println!("{what:<44} {rate:>10.0} {p50:>9.1} {p99:>9.1}");
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
fn known(mut apply: impl FnMut(&Owner, KvEvent)) {
    let mut random = Random(5);
    for replica in 0..REPLICAS {
        let owner = Owner::Replica(id(replica));
        for prompt in 0..SYSTEM_PROMPTS {
            if random.below(10) == 0 {
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
        running: random.below(60),
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

/// A replica that says its load and nothing else.
struct Still(ReplicaLoad);

impl Replica for Still {
    fn generate(&self, _: GenerateRequest) -> BoxFuture<'_, Result<DeltaStream>> {
        async { Err(Error::internal("it says its load and nothing else")) }.boxed()
    }

    fn load(&self) -> BoxFuture<'_, Result<ReplicaLoad>> {
        async { Ok(self.0.clone()) }.boxed()
    }
}

fn decisions(samples: usize) {
    let build = if cfg!(debug_assertions) { "a debug build" } else { "a release build" };
    println!("Decisions, {REPLICAS} replicas, prompts of 100,000 tokens ({BLOCKS} blocks), {build}, one core\n");
    println!("{:<44} {:>10} {:>9} {:>9}", "", "per second", "p50 us", "p99 us");
    let mut index = PrefixIndex::new(2_000_000);
    let (life, mut sequences) = (Arc::from("life"), std::collections::HashMap::new());
    known(|owner, event| {
        let sequence = sequences.entry(owner.clone()).or_insert(0);
        *sequence += 1;
        index.apply(owner, &life, *sequence, &event);
    });
    let requests: Vec<PlaceRequest> = prompts().iter().map(|prompt| request(prompt)).collect();
    let of = |sample: usize| &requests[sample % requests.len()];
    let timed = |mut work: Box<dyn FnMut(usize) + '_>| -> Vec<Duration> {
        (0..samples)
            .map(|sample| {
                let start = Instant::now();
                work(sample);
                start.elapsed()
            })
            .collect()
    };
    let looked_up = timed(Box::new(|sample| drop(std::hint::black_box(index.prefixes(&of(sample).blocks)))));
    line("  prefix lookup alone", looked_up);
    for (name, policy) in POLICIES {
        let config = Config { policy, canary_interval: HumanDuration::default(), ..Config::default() };
        let mut table: Table<()> = Table::new(config.rules());
        let (mut random, start) = (Random(9), Instant::now());
        for number in 0..REPLICAS {
            table.add(id(number), None);
            table.heard(&id(number), Ok(load(&mut random)), start, start);
        }
        let decided = timed(Box::new(|sample| {
            let request = of(sample);
            let prefixes = match policy {
                Policy::PrefixAware => index.prefixes(&request.blocks),
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
        }));
        line(&format!("  {name}, lookup and choice"), decided);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    line(
        "  prefix-aware, through the router's actors",
        runtime.block_on(through_actors(&requests, index.len(), samples)),
    );
    println!();
}

async fn through_actors(requests: &[PlaceRequest], entries: usize, samples: usize) -> Vec<Duration> {
    let config = Config {
        canary_interval: HumanDuration::default(),
        poll_interval: HumanDuration::from_secs(1),
        index_entries: 2_000_000,
        ..Config::default()
    };
    let bus = Arc::new(MemoryBus::new());
    let router = Router::start(&config, bus.clone()).unwrap();
    let mut random = Random(9);
    for number in 0..REPLICAS {
        router.register(id(number), Arc::new(Still(load(&mut random))));
    }
    let mut events = Vec::new();
    known(|owner, event| {
        let subject = match owner {
            Owner::Replica(id) => Subject::kv(&id.0),
            Owner::Store(id, Tier::Ram) => Subject::kv_store(id, "ram"),
            Owner::Store(id, Tier::Disk) => Subject::kv_store(id, "disk"),
        };
        events.push((subject.to_string(), serde_json::to_vec(&event).unwrap()));
    });
    for (count, (subject, payload)) in events.into_iter().enumerate() {
        bus.publish("life", &subject, payload.into()).await.unwrap();
        if count % 100 == 99 {
            // no more than the bus holds for a reader
            while router.indexed().await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
    let is_settled = async || {
        let all = router.replicas().await.is_ok_and(|all| all.iter().all(|status| status.load.is_some()));
        all && router.indexed().await == Ok(entries)
    };
    while !is_settled().await {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut times = Vec::with_capacity(samples);
    for sample in 0..samples {
        let request = requests[sample % requests.len()].clone();
        let start = Instant::now();
        router.place(request).await.unwrap();
        times.push(start.elapsed());
    }
    times
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
