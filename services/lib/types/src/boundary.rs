//! The boundaries between services, as traits: an in-process implementation in embedded mode, a remote one in a
//! cluster. `Backend` and `ExpertPool`, which speak of tensors, are in `moesaic-model`.
use crate::{BlockHash, Delta, Digest, GenerateRequest, Link, Priority, ReplicaId, RequestId, Result, TenantId};
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A stream of pieces of one answer; dropping it cancels the request.
pub type DeltaStream = BoxStream<'static, Result<Delta>>;

/// A scheduler as the gateway sees it.
pub trait Replica: Send + Sync + 'static {
    /// Accepts a request or refuses it (`ResourceExhausted` when the queue is full, `InvalidArgument`, `Unavailable`).
    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<DeltaStream>>;
    /// The reader has all that it wants of this request (a stop text was found) and drops its stream next, which then
    /// counts as an answer rather than as a cancellation. Nothing depends on it but counts.
    fn enough(&self, _id: &RequestId) {}
    /// How busy it is; also says whether it is ready at all.
    fn load(&self) -> BoxFuture<'_, Result<ReplicaLoad>>;
}

/// How busy a replica is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ReplicaLoad {
    /// Sequences in the running batch.
    pub running: usize,
    /// Sequences that wait.
    pub waiting: usize,
    /// KV blocks in all.
    pub kv_blocks_total: usize,
    /// KV blocks that hold a running sequence's tokens.
    pub kv_blocks_used: usize,
    /// The longest context, in tokens.
    pub max_context: usize,
    /// Sequences in the running batch at most; 0 where it is not said.
    #[serde(default)]
    pub max_running: usize,
}

/// What the router must know of a request: never its text.
#[derive(Clone, Debug, PartialEq)]
pub struct PlaceRequest {
    /// The request.
    pub id: RequestId,
    /// Names of the prompt's full blocks.
    pub blocks: Vec<BlockHash>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// Replicas that did not take this request, or failed it, the latest last.
    pub exclude: Vec<ReplicaId>,
    /// Those of them that had no room, which is no failure: they may take it once they have.
    pub full: Vec<ReplicaId>,
    /// The model as it is served ([`BlockHasher::digest`](crate::BlockHasher::digest)); `None`: any.
    pub model: Option<Digest>,
    /// Whose it is, where requests must wait.
    pub tenant: TenantId,
    /// Higher goes first, where requests must wait.
    pub priority: Priority,
    /// A request that still waits then is of no use any longer.
    pub deadline: Option<Instant>,
}

impl PlaceRequest {
    /// A request of nobody in particular, for a prompt of so many tokens, that may go anywhere.
    pub fn new(id: RequestId, prompt_tokens: usize, max_tokens: usize) -> Self {
        Self {
            id,
            blocks: Vec::new(),
            prompt_tokens,
            max_tokens,
            exclude: Vec::new(),
            full: Vec::new(),
            model: None,
            tenant: TenantId::default(),
            priority: Priority::default(),
            deadline: None,
        }
    }

    /// The replica that failed it last; none where the latest had no room only.
    pub fn latest_failure(&self) -> Option<&ReplicaId> {
        self.exclude.last().filter(|latest| !self.full.contains(latest))
    }
}

/// Where a request goes.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed {
    /// The replica.
    pub replica: ReplicaId,
    /// Blocks of the prompt that the router believes the replica has.
    pub overlap_blocks: usize,
}

/// The router as the gateway sees it.
pub trait Placer: Send + Sync + 'static {
    /// Chooses a replica, which may take until one has room: dropping the future gives the place in the line up.
    /// `Unavailable` when none is ready, `ResourceExhausted` when too many wait already.
    fn place(&self, request: PlaceRequest) -> BoxFuture<'_, Result<Placed>>;
    /// The replicas that requests may go to now; asking places nothing. `Unavailable`, with a reason, when there is none.
    fn ready(&self) -> BoxFuture<'_, Result<Vec<ReplicaId>>>;
}

/// Stored KV blocks, shared by all replicas.
///
/// Chains are given from their first block on, for where a block stands decides where it is kept; `from` is the index of
/// the first block that is asked for, and those before it need not be stored. A `from` beyond the chain asks for nothing.
pub trait PrefixStore: Send + Sync + 'static {
    /// How many blocks of `chain`, from the index `from` on, are stored without a gap.
    fn longest(&self, chain: &[BlockHash], from: usize) -> BoxFuture<'_, Result<usize>>;
    /// The bytes of these blocks, in order, as they come; ends before the first that is gone. An error is the last item,
    /// and what came before it can be used.
    fn fetch(&self, chain: &[BlockHash], from: usize) -> BoxStream<'static, Result<Bytes>>;
    /// Offers a block; the store may decline (false), for it has it or has no room.
    fn offer(&self, link: Link, bytes: Bytes) -> BoxFuture<'_, Result<bool>>;
    /// Drops blocks whose bytes are wrong: nobody gets them from now on, and they can be offered anew. An error: some may
    /// still be there.
    fn forget(&self, blocks: &[BlockHash]) -> BoxFuture<'_, Result<()>>;
    /// Whether other replicas use it as well: then a block is worth offering as soon as it is full.
    fn is_shared(&self) -> bool {
        false
    }
}

/// A numbered event; a gap in `sequence` of one `source` means that events were lost.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Dotted subject, `moesaic.v1.<plane>.<service>.<instance>.<event>`.
    pub subject: Arc<str>,
    /// Who sent it: one instance in one life.
    pub source: Arc<str>,
    /// 1, 2, 3, ... for each (source, subject).
    pub sequence: u64,
    /// JSON.
    pub payload: Bytes,
}

/// Small events between services: load, KV, membership.
pub trait EventBus: Send + Sync + 'static {
    /// Publishes an event to everyone who subscribed; numbers it.
    fn publish(&self, source: &str, subject: &str, payload: Bytes) -> BoxFuture<'_, Result<()>>;
    /// Events whose subject starts with `prefix`, from now on. A slow reader loses events and sees a gap.
    fn subscribe(&self, prefix: &str) -> BoxFuture<'_, Result<BoxStream<'static, Event>>>;
}

/// Which blocks a replica holds; the payload of its `kv` events.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum KvEvent {
    /// Blocks can now be reused.
    Stored {
        /// Their names.
        blocks: Vec<BlockHash>,
    },
    /// Blocks are gone.
    Evicted {
        /// Their names.
        blocks: Vec<BlockHash>,
    },
    /// Everything is gone (a fresh engine).
    Cleared,
}

/// A value with its version.
pub type Versioned = (Bytes, u64);

/// Small shared state with leases: registry, block index, limits.
pub trait Metadata: Send + Sync + 'static {
    /// The value of a key with its version; `None` when absent or expired.
    fn get(&self, key: &str) -> BoxFuture<'_, Result<Option<(Bytes, u64)>>>;
    /// The same for several keys at once, in their order.
    fn get_many(&self, keys: &[String]) -> BoxFuture<'_, Result<Vec<Option<Versioned>>>>;
    /// Writes if the version still is `expected` (`None`: if absent); the new version, or `None` if it was not.
    fn compare_and_set(
        &self,
        key: &str,
        expected: Option<u64>,
        value: Bytes,
        expires_after: Option<Duration>,
    ) -> BoxFuture<'_, Result<Option<u64>>>;
    /// Removes a key if its version is `expected`; whether it did.
    fn remove(&self, key: &str, expected: u64) -> BoxFuture<'_, Result<bool>>;
    /// Adds to a counter and returns it; the first addition starts its expiry.
    fn add(&self, key: &str, amount: i64, expires_after: Option<Duration>) -> BoxFuture<'_, Result<i64>>;
    /// Keys that start with `prefix`, sorted.
    fn keys(&self, prefix: &str) -> BoxFuture<'_, Result<Vec<String>>>;
}

/// A job that was pulled under a lease.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// The queue that it is in.
    pub queue: Arc<str>,
    /// Unique among the jobs of the queue that are not done.
    pub id: Arc<str>,
    /// What to do.
    pub payload: Bytes,
    /// How often it was pulled, this time included.
    pub deliveries: u32,
    /// Names the lease; a job whose lease ran out is pulled again under another.
    pub lease: u64,
}

/// A durable queue of work: a job is there until it is acknowledged, and with one worker at a time.
pub trait JobQueue: Send + Sync + 'static {
    /// Adds a job; false when one of this id is in the queue and not done. Once it returns, the job survives a crash.
    fn push(&self, queue: &str, id: &str, payload: Bytes) -> BoxFuture<'_, Result<bool>>;
    /// The oldest job that nobody has a lease on, now leased; `None` when there is none.
    fn pull(&self, queue: &str, lease: Duration) -> BoxFuture<'_, Result<Option<Job>>>;
    /// Extends the lease from now; false when it is lost.
    fn in_progress(&self, job: &Job, lease: Duration) -> BoxFuture<'_, Result<bool>>;
    /// The job is done and leaves the queue; false when the lease is lost.
    fn ack(&self, job: &Job) -> BoxFuture<'_, Result<bool>>;
    /// Gives the job back at once; false when the lease is lost.
    fn release(&self, job: &Job) -> BoxFuture<'_, Result<bool>>;
    /// Jobs that are not done.
    fn pending(&self, queue: &str) -> BoxFuture<'_, Result<usize>>;
}
