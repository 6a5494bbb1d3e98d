//! A cluster of simulated replicas under the router's own decisions: the table with its line, the policies and the prefix
//! index are the real ones; time, replicas and requests are made up from a seed.
//!
//! A replica computes prompts in chunks and one token for each running sequence in steps of ten milliseconds, keeps the
//! blocks of prompts in an LRU cache, tells its load when that changes and every 50 ms, and its blocks at once.
#![allow(dead_code, reason = "tests and benches use what they need")]
use moesaic_router::index::{Owner, PrefixIndex};
use moesaic_router::policy::Policy;
use moesaic_router::table::{Decision, Table};
use moesaic_router::{Config, policy};
use moesaic_types::boundary::{KvEvent, PlaceRequest, ReplicaLoad};
use moesaic_types::{BLOCK_TOKENS, BlockHash, Priority, ReplicaId, RequestId, TenantId};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A step of all engines.
pub const STEP: Duration = Duration::from_millis(10);

/// Steps between two loads that are told whether they changed or not.
const POLL: u64 = 5;

/// SplitMix64: small, seeded, the same everywhere.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Below a number.
    pub fn below(&mut self, end: usize) -> usize {
        (self.unit() * end as f64) as usize
    }
}

/// What a replica can do.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Sequences in the batch.
    pub max_running: usize,
    /// Blocks of its pool.
    pub blocks: usize,
    /// Prompt tokens of one step.
    pub prefill_tokens: usize,
}

/// A request that is to come.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// In this step.
    pub step: u64,
    /// Whose.
    pub tenant: u8,
    /// Higher goes first.
    pub priority: i32,
    /// The prompt's blocks.
    pub prompt: Vec<BlockHash>,
    /// Tokens to generate.
    pub output: usize,
}

/// What came of a request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// Whose.
    pub tenant: u8,
    /// When it came, in steps.
    pub came: u64,
    /// When it was placed.
    pub placed: u64,
    /// When its first token came.
    pub first: u64,
    /// Blocks of the prompt that the replica had.
    pub hits: usize,
    /// Blocks of the prompt.
    pub blocks: usize,
}

struct Sequence {
    request: usize,
    prompt: Vec<BlockHash>,
    to_compute: usize,
    to_generate: usize,
}

struct Replica {
    id: ReplicaId,
    machine: Machine,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    /// When each cached block was used last.
    cache: HashMap<BlockHash, u64>,
    by_age: BTreeMap<u64, BlockHash>,
    uses: u64,
    told: (usize, usize),
    sequence: u64,
}

impl Replica {
    fn load(&self) -> ReplicaLoad {
        ReplicaLoad {
            running: self.running.len(),
            waiting: self.waiting.len(),
            kv_blocks_total: self.machine.blocks,
            kv_blocks_used: self.running.iter().map(|sequence| sequence.prompt.len() + 1).sum(),
            max_context: 0,
            max_running: self.machine.max_running,
        }
    }

    fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    fn touch(&mut self, hash: BlockHash) {
        self.uses += 1;
        if let Some(before) = self.cache.insert(hash, self.uses) {
            self.by_age.remove(&before);
        }
        self.by_age.insert(self.uses, hash);
    }
}

/// The cluster.
pub struct Cluster {
    table: Table<usize>,
    index: PrefixIndex,
    replicas: Vec<Replica>,
    start: Instant,
    life: Arc<str>,
    /// Requests by number.
    outcomes: Vec<Outcome>,
    prompts: Vec<Vec<BlockHash>>,
    outputs: Vec<usize>,
    step: u64,
    /// Steps in which a replica had nothing to do while somebody waited in line.
    pub idle_while_others_wait: u64,
    /// Requests that found the line full.
    pub refused: usize,
}

impl Cluster {
    /// So many equal replicas under a router of this configuration.
    pub fn new(config: &Config, replicas: usize, machine: Machine) -> Self {
        let config = Config { canary_interval: Default::default(), ..config.clone() };
        let mut table = Table::new(config.rules());
        let replica = |number: usize| Replica {
            id: ReplicaId::new(format!("replica-{number:04}")),
            machine,
            waiting: VecDeque::new(),
            running: Vec::new(),
            cache: HashMap::new(),
            by_age: BTreeMap::new(),
            uses: 0,
            told: (0, 0),
            sequence: 0,
        };
        let replicas: Vec<Replica> = (0..replicas).map(replica).collect();
        let start = Instant::now();
        for replica in &replicas {
            table.add(replica.id.clone(), None);
            table.heard(&replica.id, Ok(replica.load()), start, start);
        }
        Self {
            table,
            index: PrefixIndex::new(config.index_entries),
            replicas,
            start,
            life: "life".into(),
            outcomes: Vec::new(),
            prompts: Vec::new(),
            outputs: Vec::new(),
            step: 0,
            idle_while_others_wait: 0,
            refused: 0,
        }
    }

    fn now(&self) -> Instant {
        self.start + STEP * self.step as u32
    }

    /// Plays the arrivals, in the order of their steps, until all are answered; what came of each.
    pub fn play(&mut self, arrivals: &[Arrival]) -> Vec<Outcome> {
        let mut next = 0;
        loop {
            while next < arrivals.len() && arrivals[next].step <= self.step {
                self.arrive(&arrivals[next]);
                next += 1;
            }
            self.compute();
            self.tell();
            if self.table.waiting() > 0 {
                self.idle_while_others_wait += self.replicas.iter().filter(|replica| replica.is_idle()).count() as u64;
            }
            let is_over = next == arrivals.len() && self.replicas.iter().all(Replica::is_idle);
            if is_over && self.table.waiting() == 0 {
                return std::mem::take(&mut self.outcomes);
            }
            self.step += 1;
        }
    }

    fn arrive(&mut self, arrival: &Arrival) {
        let number = self.outcomes.len();
        let blocks = arrival.prompt.len();
        self.outcomes.push(Outcome { tenant: arrival.tenant, came: self.step, blocks, ..Outcome::default() });
        self.prompts.push(arrival.prompt.clone());
        self.outputs.push(arrival.output);
        let request = PlaceRequest {
            blocks: arrival.prompt.clone(),
            tenant: TenantId([arrival.tenant; 16]),
            priority: Priority(arrival.priority),
            ..PlaceRequest::new(RequestId::new("r"), blocks * BLOCK_TOKENS, arrival.output)
        };
        let (now, prefixes) = (self.now(), self.index.prefixes(&request.blocks));
        match self.table.decide(&request, &prefixes, now) {
            Decision::Placed(placed) => self.place(number, &placed.replica),
            Decision::Wait => self.refused += usize::from(self.table.wait(Arc::new(request), number, now).is_err()),
            Decision::Refused(error) => panic!("all replicas are ready: {error}"),
        }
    }

    fn place(&mut self, number: usize, at: &ReplicaId) {
        self.outcomes[number].placed = self.step;
        let replica = self.replicas.iter_mut().find(|replica| replica.id == *at).expect("one of ours was chosen");
        let (prompt, to_generate) = (std::mem::take(&mut self.prompts[number]), self.outputs[number]);
        replica.waiting.push_back(Sequence { request: number, prompt, to_compute: 0, to_generate });
    }

    /// One step of every engine.
    fn compute(&mut self) {
        for replica in &mut self.replicas {
            let (mut stored, mut evicted) = (Vec::new(), Vec::new());
            while replica.running.len() < replica.machine.max_running
                && let Some(mut sequence) = replica.waiting.pop_front()
            {
                let hits = sequence.prompt.iter().take_while(|hash| replica.cache.contains_key(hash)).count();
                sequence.prompt[..hits].iter().rev().for_each(|hash| replica.touch(*hash));
                self.outcomes[sequence.request].hits = hits;
                sequence.to_compute = ((sequence.prompt.len() - hits) * BLOCK_TOKENS).max(1);
                replica.running.push(sequence);
            }
            let mut budget = replica.machine.prefill_tokens;
            let mut done = Vec::new();
            for (at, sequence) in replica.running.iter_mut().enumerate() {
                if sequence.to_compute > 0 {
                    let computed = sequence.to_compute.min(budget);
                    budget -= computed;
                    sequence.to_compute -= computed;
                    if computed == 0 || sequence.to_compute > 0 {
                        continue;
                    }
                    self.outcomes[sequence.request].first = self.step;
                    stored.extend(sequence.prompt.iter().copied());
                }
                sequence.to_generate = sequence.to_generate.saturating_sub(1);
                if sequence.to_generate == 0 {
                    done.push(at);
                }
            }
            done.into_iter().rev().for_each(|at| drop(replica.running.swap_remove(at)));
            // a chain's end goes first
            let fresh: Vec<_> = stored.iter().filter(|hash| !replica.cache.contains_key(*hash)).copied().collect();
            stored.into_iter().rev().for_each(|hash| replica.touch(hash));
            while replica.cache.len() > replica.machine.blocks {
                let Some((_, hash)) = replica.by_age.pop_first() else { break };
                replica.cache.remove(&hash);
                evicted.push(hash);
            }
            let owner = Owner::Replica(replica.id.clone());
            for event in [KvEvent::Stored { blocks: fresh }, KvEvent::Evicted { blocks: evicted }] {
                replica.sequence += 1;
                self.index.apply(&owner, &self.life, replica.sequence, &event);
            }
        }
    }

    fn tell(&mut self) {
        let now = self.now();
        for at in 0..self.replicas.len() {
            let replica = &mut self.replicas[at];
            let load = replica.load();
            let state = (load.running, load.waiting);
            if state != replica.told || self.step.is_multiple_of(POLL) {
                replica.told = state;
                let id = replica.id.clone();
                self.table.heard(&id, Ok(load), now, now);
                self.advance(now);
            }
        }
    }

    fn advance(&mut self, now: Instant) {
        while let Some(waiting) = self.table.next(now) {
            let (number, prefixes) = (waiting.request.reply, self.index.prefixes(&waiting.request.request.blocks));
            if let Some(placed) = self.table.bind(waiting, &prefixes, now, |_, _| true) {
                self.place(number, &placed.replica);
            }
        }
    }
}

/// Names of a chain that is its own.
pub fn chain(seed: u64, blocks: usize) -> Vec<BlockHash> {
    let mut random = Random(seed);
    (0..blocks)
        .map(|_| BlockHash((u128::from(random.next()) << 64 | u128::from(random.next())).to_le_bytes()))
        .collect()
}

/// Requests that begin with one of some system prompts (32 blocks, the first ones the most popular) and go on with four
/// blocks of their own, at random times with so many a second on average.
pub fn prefix_heavy(seed: u64, prompts: usize, requests: usize, per_second: f64) -> Vec<Arrival> {
    let mut random = Random(seed);
    let shared: Vec<_> = (0..prompts).map(|number| chain(1_000_000 + number as u64, 32)).collect();
    let weights: Vec<f64> = (1..=prompts).map(|rank| 1.0 / (rank as f64).sqrt()).collect();
    let total: f64 = weights.iter().sum();
    let (mut second, mut arrivals) = (0.0, Vec::with_capacity(requests));
    for number in 0..requests {
        second += -(1.0 - random.unit()).ln() / per_second;
        let mut at = random.unit() * total;
        let which = weights.iter().position(|weight| {
            at -= weight;
            at < 0.0
        });
        let mut prompt = shared[which.unwrap_or(0)].clone();
        prompt.extend(chain(random.next(), 4));
        arrivals.push(Arrival {
            step: (second / STEP.as_secs_f64()) as u64,
            tenant: (number % 4) as u8,
            priority: 0,
            prompt,
            output: 32 + random.below(65),
        });
    }
    arrivals
}

/// What a run came to.
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    /// Prompt blocks that the replicas had, of all.
    pub hit_rate: f64,
    /// Time to the first token, in ms.
    pub first_p50: f64,
    /// The same.
    pub first_p99: f64,
}

/// Sums up.
pub fn summary(outcomes: &[Outcome]) -> Summary {
    let hits: usize = outcomes.iter().map(|outcome| outcome.hits).sum();
    let blocks: usize = outcomes.iter().map(|outcome| outcome.blocks).sum();
    let mut first: Vec<u64> = outcomes.iter().map(|outcome| outcome.first - outcome.came).collect();
    first.sort_unstable();
    let at = |share: f64| first[((first.len() - 1) as f64 * share) as usize] as f64 * STEP.as_secs_f64() * 1000.0;
    Summary { hit_rate: hits as f64 / blocks as f64, first_p50: at(0.5), first_p99: at(0.99) }
}

/// All policies, the router's own first.
pub const POLICIES: [(&str, Policy); 3] = [
    ("prefix-aware", policy::Policy::PrefixAware),
    ("least-loaded", policy::Policy::LeastLoaded),
    ("round-robin", policy::Policy::RoundRobin),
];
