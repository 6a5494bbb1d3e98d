//! Owns what is where. A restart begins with what is on disk: what was in RAM is computed again.
use crate::disk::Found;
use crate::groups::Change;
use crate::pool::{Place, Pool, Work};
use actix::{Actor, Context, Handler, Message, MessageResult};
use bytes::Bytes;
use metrics::{counter, gauge};
use moesaic_telemetry::metrics as names;
use moesaic_transport::kv::Tier;
use moesaic_types::{BlockHash, Link};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Who waits for changes of the pool.
#[derive(Clone, Debug, Default)]
pub struct Wakes {
    /// There is work on disk.
    pub work: Arc<Notify>,
    /// Others must be told of groups.
    pub groups: Arc<Notify>,
    /// Others may be told of blocks.
    pub blocks: Arc<Notify>,
    /// Something changed.
    pub changes: Arc<Notify>,
}

/// The actor's state.
pub struct BlockPool {
    pool: Pool,
    wakes: Wakes,
}

impl BlockPool {
    /// A pool with empty tiers of `ram` and `disk` bytes (`None`: there is no disk).
    pub fn new(ram: u64, disk: Option<u64>, wakes: Wakes) -> Self {
        let this = Self { pool: Pool::new(ram, disk), wakes };
        this.observe(0);
        this
    }

    fn observe(&self, evicted: u64) {
        counter!(names::KV_STORE_EVICTIONS_TOTAL).increment(evicted);
        gauge!(names::KV_STORE_BYTES).set(self.pool.in_ram().1 as f64);
        gauge!(names::KV_STORE_DISK_BYTES).set(self.pool.on_disk().1 as f64);
    }

    /// After each change: counts, and wakes whoever has something to do now.
    fn settle(&mut self) {
        let counts = self.pool.take_counts();
        counter!(names::KV_STORE_CORRUPT_TOTAL).increment(counts.corrupt);
        counter!(names::KV_STORE_DISK_FAILURES_TOTAL).increment(counts.failed);
        self.observe(counts.evicted);
        if self.pool.has_work() {
            self.wakes.work.notify_one();
        }
        if self.pool.groups().has_untold() {
            self.wakes.groups.notify_one();
        }
        if self.pool.groups().has_changes() {
            self.wakes.blocks.notify_one();
        }
        self.wakes.changes.notify_one();
    }
}

impl Actor for BlockPool {
    type Context = Context<Self>;
}

/// How many blocks of a chain are kept, from its start; and how many of these are in RAM.
#[derive(Message)]
#[rtype(result = "(usize, usize)")]
pub struct Longest(
    /// The chain.
    pub Vec<BlockHash>,
);

impl Handler<Longest> for BlockPool {
    type Result = MessageResult<Longest>;

    fn handle(&mut self, Longest(chain): Longest, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.pool.longest(&chain))
    }
}

/// Where a chain's blocks are from its start, up to the first that is not kept.
#[derive(Message)]
#[rtype(result = "Vec<Place>")]
pub struct Locate(
    /// The chain.
    pub Vec<BlockHash>,
);

impl Handler<Locate> for BlockPool {
    type Result = MessageResult<Locate>;

    fn handle(&mut self, Locate(chain): Locate, _: &mut Context<Self>) -> Self::Result {
        let found = self.pool.locate(&chain);
        let on_disk = found.iter().filter(|place| matches!(place, Place::Disk(_))).count();
        counter!(names::KV_STORE_HITS_TOTAL).increment(found.len() as u64);
        counter!(names::KV_STORE_DISK_HITS_TOTAL).increment(on_disk as u64);
        counter!(names::KV_STORE_MISSES_TOTAL).increment(u64::from(found.len() < chain.len()));
        MessageResult(found)
    }
}

/// Keeps a block; false when it is there already or has no room.
#[derive(Message)]
#[rtype(result = "bool")]
pub struct Offer {
    /// Where it stands.
    pub link: Link,
    /// Its bytes.
    pub bytes: Bytes,
}

impl Handler<Offer> for BlockPool {
    type Result = bool;

    fn handle(&mut self, Offer { link, bytes }: Offer, _: &mut Context<Self>) -> bool {
        let taken = self.pool.offer(link, bytes, Instant::now());
        self.settle();
        taken
    }
}

/// A block was read from disk.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Promote {
    /// Where it stands.
    pub link: Link,
    /// Its bytes.
    pub bytes: Bytes,
}

impl Handler<Promote> for BlockPool {
    type Result = ();

    fn handle(&mut self, Promote { link, bytes }: Promote, _: &mut Context<Self>) {
        self.pool.promote(link, bytes, Instant::now());
        self.settle();
    }
}

/// A block's file is gone or not intact.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Lost {
    /// The block.
    pub hash: BlockHash,
    /// The file is there.
    pub is_corrupt: bool,
}

impl Handler<Lost> for BlockPool {
    type Result = ();

    fn handle(&mut self, Lost { hash, is_corrupt }: Lost, _: &mut Context<Self>) {
        self.pool.lost(&hash, is_corrupt);
        self.settle();
    }
}

/// Keeps a chain's blocks from eviction for a while; 0 ends that. How many, from its start.
#[derive(Message)]
#[rtype(result = "usize")]
pub struct Pin {
    /// The chain.
    pub chain: Vec<BlockHash>,
    /// For so long.
    pub for_: Duration,
}

impl Handler<Pin> for BlockPool {
    type Result = usize;

    fn handle(&mut self, Pin { chain, for_ }: Pin, _: &mut Context<Self>) -> usize {
        let now = Instant::now();
        self.pool.pin(&chain, now + for_, now)
    }
}

/// Drops blocks; how many were there.
#[derive(Message)]
#[rtype(result = "usize")]
pub struct Forget(
    /// Their names.
    pub Vec<BlockHash>,
);

impl Handler<Forget> for BlockPool {
    type Result = usize;

    fn handle(&mut self, Forget(blocks): Forget, _: &mut Context<Self>) -> usize {
        let forgotten = blocks.iter().filter(|hash| self.pool.forget(hash)).count();
        self.settle();
        forgotten
    }
}

/// What is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Blocks in RAM.
    pub ram_blocks: usize,
    /// Their bytes.
    pub ram_bytes: u64,
    /// Blocks on disk; some of them may be in RAM as well.
    pub disk_blocks: usize,
    /// Their bytes.
    pub disk_bytes: u64,
}

/// Blocks and bytes that are kept.
#[derive(Message)]
#[rtype(result = "Sizes")]
pub struct Size;

impl Handler<Size> for BlockPool {
    type Result = MessageResult<Size>;

    fn handle(&mut self, _: Size, _: &mut Context<Self>) -> Self::Result {
        let ((ram_blocks, ram_bytes), (disk_blocks, disk_bytes)) = (self.pool.in_ram(), self.pool.on_disk());
        MessageResult(Sizes { ram_blocks, ram_bytes, disk_blocks, disk_bytes })
    }
}

/// Blocks that are in RAM alone, the starts of chains first.
#[derive(Message)]
#[rtype(result = "VecDeque<BlockHash>")]
pub struct Unsaved;

impl Handler<Unsaved> for BlockPool {
    type Result = MessageResult<Unsaved>;

    fn handle(&mut self, _: Unsaved, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.pool.unsaved())
    }
}

/// Puts blocks on their way to disk, as many as may be on it at once: those that are left, and whether any are on it.
#[derive(Message)]
#[rtype(result = "(VecDeque<BlockHash>, bool)")]
pub struct Save(
    /// The blocks, in order.
    pub VecDeque<BlockHash>,
);

impl Handler<Save> for BlockPool {
    type Result = MessageResult<Save>;

    fn handle(&mut self, Save(mut left): Save, _: &mut Context<Self>) -> Self::Result {
        let are_on_their_way = self.pool.save(&mut left);
        self.settle();
        MessageResult((left, are_on_their_way))
    }
}

/// What is to be done on disk next.
#[derive(Message)]
#[rtype(result = "Option<Work>")]
pub struct TakeWork;

impl Handler<TakeWork> for BlockPool {
    type Result = MessageResult<TakeWork>;

    fn handle(&mut self, _: TakeWork, _: &mut Context<Self>) -> Self::Result {
        let work = self.pool.next_work(Instant::now());
        self.settle();
        MessageResult(work)
    }
}

/// What a scan found.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Scanned {
    /// Some of it.
    pub batch: Vec<Found>,
    /// The scan is over.
    pub is_last: bool,
}

impl Handler<Scanned> for BlockPool {
    type Result = ();

    fn handle(&mut self, Scanned { batch, is_last }: Scanned, _: &mut Context<Self>) {
        for found in batch {
            match found {
                Ok((link, size)) => self.pool.found(link, size, Instant::now()),
                Err(hash) => self.pool.lost(&hash, true),
            }
        }
        if is_last {
            self.pool.scanned();
        }
        self.settle();
    }
}

/// A write ended.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Ended {
    /// The block.
    pub hash: BlockHash,
    /// An error says whether the disk is full.
    pub outcome: Result<(), bool>,
}

impl Handler<Ended> for BlockPool {
    type Result = ();

    fn handle(&mut self, Ended { hash, outcome }: Ended, _: &mut Context<Self>) {
        match outcome {
            Ok(()) => self.pool.written(&hash),
            Err(is_full) => self.pool.failed(&hash, is_full),
        }
        self.settle();
    }
}

/// The disk may be used in full again.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Retry {
    /// There may be files that the pool does not know.
    pub looks_again: bool,
}

impl Handler<Retry> for BlockPool {
    type Result = ();

    fn handle(&mut self, Retry { looks_again }: Retry, _: &mut Context<Self>) {
        self.pool.retry(looks_again);
        self.settle();
    }
}

/// The disk does not answer.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Stalled;

impl Handler<Stalled> for BlockPool {
    type Result = ();

    fn handle(&mut self, _: Stalled, _: &mut Context<Self>) {
        self.pool.stalled();
        self.settle();
    }
}

/// Groups whose tier changed; `None`: it is here no longer. They count as told then.
#[derive(Message)]
#[rtype(result = "Vec<(BlockHash, Option<Tier>)>")]
pub struct TakeUntold {
    /// So many at most.
    pub limit: usize,
}

impl Handler<TakeUntold> for BlockPool {
    type Result = MessageResult<TakeUntold>;

    fn handle(&mut self, TakeUntold { limit }: TakeUntold, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.pool.groups().take_untold(limit))
    }
}

/// Groups that do not count as told.
#[derive(Message)]
#[rtype(result = "()")]
pub enum Untell {
    /// Every group.
    All,
    /// Some.
    These(
        /// Their names.
        Vec<BlockHash>,
    ),
}

impl Handler<Untell> for BlockPool {
    type Result = ();

    fn handle(&mut self, untell: Untell, _: &mut Context<Self>) {
        match untell {
            Untell::All => self.pool.groups().forget_told(),
            Untell::These(groups) => groups.into_iter().for_each(|group| self.pool.groups().forget(group)),
        }
        self.settle();
    }
}

/// What others are told of single blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tell {
    /// What changed since the last time.
    Changes(Vec<Change>),
    /// What is in each tier.
    Anew(Vec<(Tier, Vec<BlockHash>)>),
}

/// What happened to single blocks since this was last asked.
#[derive(Message)]
#[rtype(result = "Tell")]
pub struct TakeChanges {
    /// Everything is told, whatever was told before.
    pub anew: bool,
}

/// Blocks of a tier that are told anew at most: those beyond are taken for not here.
const TOLD_ANEW: usize = 1 << 16;

impl Handler<TakeChanges> for BlockPool {
    type Result = MessageResult<TakeChanges>;

    fn handle(&mut self, TakeChanges { anew }: TakeChanges, _: &mut Context<Self>) -> Self::Result {
        if anew {
            self.pool.groups().forget_changes();
        }
        MessageResult(match self.pool.groups().take_changes() {
            Some(changes) => Tell::Changes(changes),
            None => Tell::Anew([Tier::Ram, Tier::Disk].map(|tier| (tier, self.pool.blocks(tier, TOLD_ANEW))).into()),
        })
    }
}
