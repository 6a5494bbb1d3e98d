//! A whole router under traffic: events come over the bus while clients ask where their requests go.
use super::simulation::{Random, chain};
use super::{REPLICAS, id, known, load};
use futures::FutureExt;
use futures::future::{BoxFuture, join_all};
use moesaic_config::HumanDuration;
use moesaic_router::index::{Owner, PrefixIndex};
use moesaic_router::{Config, Router};
use moesaic_transport::MemoryBus;
use moesaic_transport::kv::{Tier, in_parts};
use moesaic_transport::subjects::Subject;
use moesaic_types::boundary::{DeltaStream, EventBus, KvEvent, PlaceRequest, Placer, Replica, ReplicaLoad};
use moesaic_types::{Error, GenerateRequest, Result};
use std::cell::Cell;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Blocks of an event.
const EVENT_BLOCKS: usize = 512;

/// Events that are made up before, and told again and again.
const EVENTS: usize = 128;

/// What comes in besides requests.
#[derive(Clone, Copy, Default)]
pub struct Traffic {
    /// Loads a second, of all replicas together.
    pub loads: usize,
    /// KV events of 512 blocks a second: stored ones, and the same ones evicted.
    pub kv: usize,
    /// Every replica has every system prompt.
    pub is_everywhere: bool,
}

/// What a run came to.
pub struct Run {
    /// How long each decision took.
    pub times: Vec<Duration>,
    /// How long all of them took.
    pub wall: Duration,
    /// Loads and KV events a second that were told meanwhile.
    pub told: (f64, f64),
    /// Requests that found an actor's mailbox full.
    pub refused: usize,
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

async fn publish(bus: &MemoryBus, subject: &Subject, payload: impl Into<bytes::Bytes>) {
    bus.publish("life", &subject.to_string(), payload.into()).await.unwrap();
}

/// A router that knows what [`known`] says.
async fn router(bus: &Arc<MemoryBus>, is_everywhere: bool) -> Arc<Router> {
    let config = Config {
        canary_interval: HumanDuration::default(),
        poll_interval: HumanDuration::from_secs(1),
        index_entries: 4_000_000,
        ..Config::default()
    };
    let router = Router::start(&config, bus.clone()).unwrap();
    let mut random = Random(9);
    for number in 0..REPLICAS {
        router.register(id(number), Arc::new(Still(load(&mut random))));
    }
    let mut events = Vec::new();
    known(is_everywhere, |owner, event| {
        events.extend(in_parts(event).into_iter().map(|part| (owner.clone(), part)));
    });
    // all of it is waited for now and then: no more comes than the bus holds for a reader
    let (mut same, mut sequences) = (PrefixIndex::new(4_000_000), HashMap::new());
    let knows = async |entries: usize| {
        while router.indexed().await != Ok(entries) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    for (number, (owner, event)) in events.into_iter().enumerate() {
        let sequence = sequences.entry(owner.clone()).and_modify(|sequence| *sequence += 1).or_insert(1);
        same.apply(&owner, &"life".into(), *sequence, &event);
        let subject = match &owner {
            Owner::Replica(id) => Subject::kv(&id.0),
            Owner::Store(id, Tier::Ram) => Subject::kv_store(id, "ram"),
            Owner::Store(id, Tier::Disk) => Subject::kv_store(id, "disk"),
        };
        publish(bus, &subject, serde_json::to_vec(&event).unwrap()).await;
        if number % 1000 == 999 {
            knows(same.len()).await;
        }
    }
    knows(same.len()).await;
    while !router.replicas().await.is_ok_and(|all| all.iter().all(|status| status.load.is_some())) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    router
}

/// Tells loads at a steady rate.
async fn tell_loads(bus: Arc<MemoryBus>, rate: usize, told: Arc<AtomicUsize>) {
    let (mut random, mut pace) = (Random(11), Pace::new(rate));
    loop {
        pace.next().await;
        let payload = serde_json::to_vec(&load(&mut random)).unwrap();
        publish(&bus, &Subject::load(&id(random.below(REPLICAS)).0), payload).await;
        told.fetch_add(1, Ordering::Relaxed);
    }
}

/// Tells KV events at a steady rate, of one replica after another: blocks that it stores, then that it evicts them.
async fn tell_kv(bus: Arc<MemoryBus>, rate: usize, told: Arc<AtomicUsize>) {
    let event = |number: usize| {
        let (which, blocks) = (number / 2, chain(5_000_000 + (number / 2) as u64, EVENT_BLOCKS));
        let event = if number.is_multiple_of(2) { KvEvent::Stored { blocks } } else { KvEvent::Evicted { blocks } };
        (Subject::kv(&id(which * 7 % REPLICAS).0), bytes::Bytes::from(serde_json::to_vec(&event).unwrap()))
    };
    let events: Vec<_> = (0..EVENTS).map(event).collect();
    let mut pace = Pace::new(rate);
    for (subject, payload) in events.iter().cycle() {
        pace.next().await;
        publish(&bus, subject, payload.clone()).await;
        told.fetch_add(1, Ordering::Relaxed);
    }
}

/// So many times a second; who was late catches up.
struct Pace {
    rate: usize,
    start: Instant,
    done: usize,
}

impl Pace {
    fn new(rate: usize) -> Self {
        Self { rate, start: Instant::now(), done: 0 }
    }

    async fn next(&mut self) {
        while self.done >= (self.start.elapsed().as_secs_f64() * self.rate as f64) as usize {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.done += 1;
    }
}

/// So many decisions, asked for by so many clients, each one after another.
pub async fn run(requests: &[PlaceRequest], traffic: Traffic, clients: usize, samples: usize) -> Run {
    let bus = Arc::new(MemoryBus::new());
    let router = router(&bus, traffic.is_everywhere).await;
    let told = [0, 0].map(|_| Arc::new(AtomicUsize::new(0)));
    let tasks = [
        tokio::spawn(tell_loads(bus.clone(), traffic.loads, told[0].clone())),
        tokio::spawn(tell_kv(bus, traffic.kv, told[1].clone())),
    ];
    let start = Instant::now();
    let refused = Cell::new(0);
    let client = async |number: usize| {
        let mut times = Vec::with_capacity(samples / clients);
        for sample in 0..samples / clients {
            let request = requests[(sample * clients + number) % requests.len()].clone();
            let start = Instant::now();
            match router.place(request).await {
                Ok(_) => times.push(start.elapsed()),
                Err(_) => refused.set(refused.get() + 1),
            }
        }
        times
    };
    let times = join_all((0..clients).map(client)).await.concat();
    let wall = start.elapsed();
    tasks.iter().for_each(tokio::task::JoinHandle::abort);
    let [loads, kv] = told.map(|told| told.load(Ordering::Relaxed) as f64 / wall.as_secs_f64());
    Run { times, wall, told: (loads, kv), refused: refused.get() }
}
