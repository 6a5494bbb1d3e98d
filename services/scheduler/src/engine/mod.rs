//! The engine: one thread that owns the model, the block pool and the sequences.
//!
//! It takes commands from a bounded queue, plans a step, runs it, and sleeps on the queue when nothing can run.
mod collect;
mod economy;
mod outage;
mod seal;
mod sequence;
mod step;
mod store;

pub use sequence::{Fetched, Phase, Sequence, Submission};

use self::economy::Economy;
use self::outage::Outage;
use crate::answer::overdue;
use crate::config::{Config, OfferPolicy};
use crate::health::{Bounds, Health, Pulse};
use crate::metrics::Metrics;
use crate::pool::{BlockIndex, BlockPool};
use crate::sampler::Scratch;
use moesaic_model::Runner;
use moesaic_model::memory::Memory;
use moesaic_types::boundary::{KvEvent, PrefixStore};
use moesaic_types::{BLOCK_TOKENS, BlockHash, BlockHasher, Error, FinishReason, Link, Result, TokenId};
use serde::Serialize;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, mpsc, watch};

/// Sleep when sequences run but no chunk fits; another reference must go away first.
const STALLED: Duration = Duration::from_millis(5);

/// Builds a model, once for every life of the engine.
pub type RunnerFactory = Arc<dyn Fn() -> Result<Box<dyn Runner>, moesaic_model::Error> + Send + Sync>;

/// What outlives an engine.
pub struct Parts {
    /// The configuration.
    pub config: Config,
    /// Builds the model.
    pub runner_factory: RunnerFactory,
    /// Names blocks.
    pub hasher: BlockHasher,
    /// Blocks shared with other replicas.
    pub store: Option<Arc<dyn PrefixStore>>,
    /// To the task that publishes KV events.
    pub events: Option<mpsc::Sender<Vec<KvEvent>>>,
    /// Tokens that end an answer.
    pub eos: Vec<TokenId>,
    /// Where tasks run.
    pub runtime: tokio::runtime::Handle,
    /// What everyone may look at.
    pub snapshot: watch::Sender<Snapshot>,
    /// When the present step began.
    pub pulse: Pulse,
}

impl Parts {
    /// How the present step does, looked at now.
    pub fn health(&self) -> Health {
        Bounds::new(&self.config).judge_now(&self.pulse)
    }
}

/// What a model and its pool allow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Info {
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// The longest context that the model was made for, in tokens.
    pub model_context: usize,
    /// The longest context that is served, in tokens: the model's, or what the pool holds where that is less.
    pub max_context: usize,
    /// KV blocks.
    pub kv_blocks: usize,
}

impl Info {
    /// Of a model and a pool.
    pub fn new(vocab: usize, model_context: usize, kv_blocks: usize) -> Self {
        let max_context = model_context.min(kv_blocks.saturating_mul(BLOCK_TOKENS));
        Self { vocab, model_context, max_context, kv_blocks }
    }

    /// What the operator should know, where the pool cannot hold one request of the model's context.
    pub fn warning(&self) -> Option<String> {
        let needed = crate::planner::blocks_for(self.model_context);
        (self.max_context < self.model_context).then(|| {
            format!(
                "the KV pool of {} blocks holds {} tokens, less than the model's context of {}: longer requests are \
                 refused; to serve them set scheduler.kv_blocks to {needed}, or raise scheduler.kv_memory_bytes",
                self.kv_blocks, self.max_context, self.model_context
            )
        })
    }
}

/// The engine's state as of its last step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// Whether an engine runs.
    pub ready: bool,
    /// Sequences in the batch.
    pub running: usize,
    /// Sequences that wait, for a place or for the prefix store.
    pub waiting: usize,
    /// KV blocks in all.
    pub kv_blocks_total: usize,
    /// Blocks that sequences refer to.
    pub kv_blocks_used: usize,
    /// Unreferenced blocks that hold reusable tokens.
    pub kv_blocks_cached: usize,
    /// Blocks that hold nothing.
    pub kv_blocks_free: usize,
    /// The longest context, in tokens.
    pub max_context: usize,
    /// Preemptions in this life.
    pub preemptions: u64,
    /// How often the engine was started again.
    pub restarts: u64,
}

/// What the engine is asked.
pub enum Command {
    /// Generate.
    Submit(Box<Submission>),
    /// The prefix store answered.
    Fetched {
        /// For this sequence.
        key: u64,
        /// What came.
        fetched: Fetched,
    },
    /// The prefix store did not answer to the offer of a block, which is offered again when it is evicted.
    NotStored(BlockHash),
    /// Look around: something outside changed.
    Wake,
    /// Say anew which blocks are here: somebody lost an event.
    TellBlocks,
    /// Panic, to test recovery.
    #[cfg(any(test, feature = "fault-injection"))]
    Panic,
}

/// Why an engine ended.
#[derive(Debug)]
pub struct End {
    /// What went wrong.
    pub error: Error,
    /// A pipeline stage is away, and comes back: the next engine waits for it.
    pub is_passing: bool,
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        Self { error, is_passing: false }
    }
}

/// One life of the engine.
pub struct Engine {
    parts: Arc<Parts>,
    info: Info,
    runner: Box<dyn Runner>,
    pool: BlockPool,
    sequences: BTreeMap<u64, Sequence>,
    arrivals: u64,
    /// Who belongs to the batch, where batches are static.
    members: Vec<u64>,
    commands: Receiver<Command>,
    replies: SyncSender<Command>,
    stop: Arc<AtomicBool>,
    offers: Arc<Semaphore>,
    /// Full blocks are offered as soon as they are known to be good, not only evicted ones.
    offers_full: bool,
    /// Full blocks to offer.
    full: VecDeque<Link>,
    economy: Arc<Economy>,
    /// Places for fetched blocks that are not in the pool yet.
    fetched_room: Arc<Semaphore>,
    /// The prefix store failed when it was last asked.
    store_is_away: Arc<AtomicBool>,
    metrics: Metrics,
    logits: Vec<f32>,
    sampling: Scratch,
    preemptions: u64,
    outage: Outage,
    /// Why this life cannot go on.
    lost: Option<Error>,
}

impl Engine {
    /// Builds the model and its pool.
    ///
    /// # Errors
    /// What went wrong, and whether it is a stage that is away.
    pub fn new(
        parts: Arc<Parts>,
        commands: Receiver<Command>,
        replies: SyncSender<Command>,
        stop: Arc<AtomicBool>,
    ) -> Result<Self, End> {
        let failed = |what: &str, error: moesaic_model::Error| End {
            is_passing: matches!(error, moesaic_model::Error::Stage { .. }),
            error: Error::unavailable(format!("{what}: {error}")),
        };
        let mut runner = (parts.runner_factory)().map_err(|error| failed("load the model", error))?;
        let (block_bytes, model_context) = (runner.kv_block_bytes(), runner.spec().max_context);
        let kv_blocks = parts.config.blocks(block_bytes, model_context, Memory::now())?;
        let waking = replies.clone();
        runner.wake_with(Arc::new(move || {
            // a full queue means that it is awake anyway
            let _ = waking.try_send(Command::Wake);
        }));
        runner.allocate_kv(kv_blocks).map_err(|error| failed("allocate the KV pool", error))?;
        parts.pulse.follow(runner.advanced());
        let info = Info::new(runner.spec().vocab, model_context, kv_blocks);
        tracing::info!(
            replica = parts.config.replica,
            kv_mib = (block_bytes as u64).saturating_mul(kv_blocks as u64) >> 20,
            kv_tokens = kv_blocks * BLOCK_TOKENS,
            max_context = info.max_context,
            "KV pool"
        );
        if let Some(warning) = info.warning() {
            tracing::warn!(replica = parts.config.replica, "{warning}");
        }
        let metrics = Metrics::new(&parts.config.model_name, &parts.config.replica);
        let offers = Arc::new(Semaphore::new(parts.config.prefix_store_offers));
        let offers_full = parts.store.as_ref().is_some_and(|store| match parts.config.prefix_store_offer {
            OfferPolicy::Auto => store.is_shared(),
            OfferPolicy::Evicted => false,
            OfferPolicy::Full => true,
        });
        let fetched_room = parts.config.prefix_store_memory.bytes() / (block_bytes as u64).max(1);
        Ok(Self {
            info,
            runner,
            pool: BlockPool::new(kv_blocks),
            sequences: BTreeMap::new(),
            arrivals: 0,
            members: Vec::new(),
            commands,
            replies,
            stop,
            offers,
            offers_full,
            full: VecDeque::new(),
            economy: Arc::new(Economy::new(parts.config.prefix_store_fetch)),
            fetched_room: Arc::new(Semaphore::new(fetched_room.min(u32::MAX.into()) as usize)),
            store_is_away: Arc::default(),
            metrics,
            logits: Vec::new(),
            sampling: Scratch::default(),
            preemptions: 0,
            outage: Outage::default(),
            lost: None,
            parts,
        })
    }

    /// What the model and the pool allow.
    pub fn info(&self) -> Info {
        self.info
    }

    /// Runs until it is told to stop.
    ///
    /// # Errors
    /// When a stage of the model is lost, with its keys and values.
    pub fn run(&mut self) -> Result<(), End> {
        self.publish();
        while !self.stop.load(Ordering::Acquire) && self.lost.is_none() {
            self.parts.pulse.begin();
            while let Ok(command) = self.commands.try_recv() {
                self.handle(command);
            }
            // also where nothing runs that would fail
            if let Err(error) = self.runner.check_parts() {
                self.lose(Error::unavailable(format!("{error}; send the request again")));
                break;
            }
            self.remove_overdue_and_abandoned();
            let advanced = self.step() | (self.lost.is_none() && self.offer_full());
            self.deliver();
            self.publish_events();
            if self.sequences.is_empty() {
                self.end_outage();
            }
            self.parts.pulse.begin();
            self.publish();
            if !advanced && self.lost.is_none() {
                self.parts.pulse.rest();
                if !self.sleep() {
                    break;
                }
            }
        }
        let error = Error::unavailable("the scheduler is shutting down; send the request again");
        let keys: Vec<u64> = self.sequences.keys().copied().collect();
        keys.into_iter().for_each(|key| self.fail(key, error.clone()));
        self.publish();
        self.lost.take().map_or(Ok(()), |error| Err(End { error, is_passing: true }))
    }

    /// All keys and values are worth nothing any longer: every request ends, and then this life.
    fn lose(&mut self, error: Error) {
        tracing::error!(%error, sequences = self.sequences.len(), "a part of the model is lost; starting anew");
        let keys: Vec<u64> = self.sequences.keys().copied().collect();
        keys.into_iter().for_each(|key| self.fail(key, error.clone()));
        self.lost = Some(error);
    }

    /// Waits for a command or the next deadline; false if nobody can send any longer.
    fn sleep(&mut self) -> bool {
        let now = Instant::now();
        let mut until = self.sequences.values().filter_map(|s| s.request.deadline).min();
        if self.sequences.values().any(|s| s.phase != Phase::Fetching) {
            let again = self.outage.paused_until().unwrap_or(now + STALLED);
            until = Some(until.map_or(again, |deadline| deadline.min(again)));
        }
        let command = match until {
            Some(until) => self.commands.recv_timeout(until.saturating_duration_since(now)),
            None => self.commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match command {
            Ok(command) => self.handle(command),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return false,
        }
        true
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => {
                let key = self.arrivals;
                self.arrivals += 1;
                self.sequences.insert(key, Sequence::new(*submission));
            }
            Command::Fetched { key, fetched } => {
                if let Some(sequence) = self.sequences.get_mut(&key).filter(|s| s.phase == Phase::Fetching) {
                    sequence.phase = Phase::Waiting;
                    sequence.is_unfetched = fetched.lacks_room > 0;
                    sequence.fetched = fetched;
                }
            }
            Command::NotStored(hash) => self.pool.set_unstored(&hash),
            Command::Wake => {}
            Command::TellBlocks => self.pool.tell_anew(),
            #[cfg(any(test, feature = "fault-injection"))]
            Command::Panic => panic!("the engine was told to panic"),
        }
    }

    fn remove_overdue_and_abandoned(&mut self) {
        let now = Instant::now();
        // First the overdue: their readers may have gone at the deadline too.
        let is_overdue = |s: &Sequence| s.request.deadline.is_some_and(|deadline| deadline <= now);
        for key in self.keys_of(is_overdue) {
            let generated = self.sequences[&key].generated();
            self.fail(key, overdue(generated));
        }
        for key in self.keys_of(Sequence::is_abandoned) {
            tracing::debug!(request = %self.sequences[&key].request.id, "nobody reads the answer any longer");
            if let Some(sequence) = self.remove(key) {
                sequence.leave();
            }
        }
    }

    fn keys_of(&self, wanted: impl Fn(&Sequence) -> bool) -> Vec<u64> {
        self.sequences.iter().filter(|(_, s)| wanted(s)).map(|(key, _)| *key).collect()
    }

    fn deliver(&mut self) {
        self.sequences.values_mut().for_each(Sequence::deliver);
    }

    fn release(&mut self, blocks: Vec<BlockIndex>) {
        blocks.into_iter().rev().for_each(|block| self.pool.release(block));
    }

    fn remove(&mut self, key: u64) -> Option<Sequence> {
        let mut sequence = self.sequences.remove(&key)?;
        self.release(std::mem::take(&mut sequence.blocks));
        Some(sequence)
    }

    fn fail(&mut self, key: u64, error: Error) {
        if let Some(sequence) = self.remove(key) {
            sequence.fail(error, &self.parts.runtime);
        }
    }

    fn finish(&mut self, key: u64, reason: FinishReason) {
        if let Some(sequence) = self.remove(key) {
            if let Some(time) = sequence.decode_time().filter(|_| !sequence.request.is_canary()) {
                self.metrics.decoded(time);
            }
            sequence.finish(reason, &self.parts.runtime);
        }
    }

    fn publish(&self) {
        let running = self.sequences.values().filter(|s| s.phase == Phase::Running).count();
        let (used, cached) = (self.pool.used(), self.pool.cached());
        let restarts = self.parts.snapshot.borrow().restarts;
        let snapshot = Snapshot {
            ready: !self.stop.load(Ordering::Acquire) && self.parts.health() == Health::Working,
            running,
            waiting: self.sequences.len() - running,
            kv_blocks_total: self.pool.total(),
            kv_blocks_used: used,
            kv_blocks_cached: cached,
            kv_blocks_free: self.pool.total() - used - cached,
            max_context: self.info.max_context,
            preemptions: self.preemptions,
            restarts,
        };
        self.metrics.observe(&snapshot);
        self.parts.snapshot.send_if_modified(|current| {
            let changed = *current != snapshot;
            *current = snapshot;
            changed
        });
    }
}

#[cfg(test)]
mod tests {
    use super::Info;

    #[test]
    fn a_pool_smaller_than_the_models_context_limits_it_and_says_so() {
        let small = Info::new(10, 1000, 15);
        assert_eq!((small.max_context, small.model_context), (960, 1000));
        let warning = small.warning().unwrap();
        for part in ["15 blocks", "960 tokens", "1000", "kv_blocks to 16", "kv_memory_bytes"] {
            assert!(warning.contains(part), "{warning}");
        }
        let enough = Info::new(10, 1000, 16);
        assert_eq!((enough.max_context, enough.warning()), (1000, None));
    }
}
