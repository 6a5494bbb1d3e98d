//! A store's part in a cluster: it says in the metadata which groups it has, and copies blocks to other nodes.
use crate::actors::block_pool::{BlockPool, TakeUntold, Untell};
use crate::app::{DEADLINE, KvStore};
use crate::telling;
use bytes::Bytes;
use metrics::counter;
use moesaic_actors::WeakHandle;
use moesaic_telemetry::metrics as names;
use moesaic_transport::Directory;
use moesaic_transport::kv::{Holding, KvNodes, LEASE, Patience, Tier};
use moesaic_types::boundary::{EventBus, Metadata};
use moesaic_types::{BlockHash, Link, Result};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until};

/// Groups that are told of at once.
const BATCH: usize = 256;

/// Between two batches: changes that come together are told together, and those that are undone not at all.
const PAUSE: Duration = Duration::from_millis(50);

/// Before the metadata are tried again.
const RETRY: Duration = Duration::from_secs(1);

/// How often one of the records is looked at: metadata that came back empty have none.
const LOOK: Duration = Duration::from_secs(5);

/// What a store must know to take part.
pub struct Cluster {
    /// Where records stand.
    pub metadata: Arc<dyn Metadata>,
    /// Where routers hear which blocks are here.
    pub events: Arc<dyn EventBus>,
    /// Of the kv-stores, this one included.
    pub directory: Directory,
    /// This one's name.
    pub id: Arc<str>,
    /// Nodes that keep a block, this one included.
    pub replication: usize,
    /// Blocks that may be on their way to other nodes.
    pub replication_queue: usize,
    /// How long other nodes may take.
    pub patience: Patience,
}

/// A store's part; ends when it is dropped.
pub struct Joined {
    copies: Option<mpsc::Sender<(Link, Bytes)>>,
    tasks: Vec<AbortHandle>,
}

impl Drop for Joined {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

impl Joined {
    /// Takes part with a store. Call it in a runtime.
    pub fn start(store: &KvStore, cluster: Cluster) -> Arc<Self> {
        let Cluster { metadata, events, directory, id, replication, replication_queue, patience } = cluster;
        let nodes = Arc::new(KvNodes::new(directory, Arc::clone(&metadata), patience));
        let announcer = Announcer {
            pool: store.pool.downgrade(),
            groups: Arc::clone(&store.wakes.groups),
            metadata,
            nodes: Arc::clone(&nodes),
            id: Arc::clone(&id),
            generation: None,
            lives: 0,
            records: HashMap::new(),
            due: BTreeMap::new(),
            gone: HashMap::new(),
            look_at: Instant::now() + LOOK,
        };
        let mut tasks = vec![tokio::spawn(announcer.run()).abort_handle()];
        let blocks = telling::blocks(store.pool.downgrade(), Arc::clone(&store.wakes.blocks), events, id.clone());
        tasks.push(tokio::spawn(blocks).abort_handle());
        let copies = (replication > 1).then(|| {
            let (sender, copies) = mpsc::channel(replication_queue);
            tasks.push(tokio::spawn(replicate(nodes, id, replication - 1, copies)).abort_handle());
            sender
        });
        Arc::new(Self { copies, tasks })
    }

    /// Copies a block to other nodes in the background; not when too many are on their way.
    pub fn copy(&self, link: Link, block: Bytes) {
        let Some(copies) = &self.copies else { return };
        if copies.try_send((link, block)).is_err() {
            counter!(names::KV_STORE_REPLICATION_DROPPED_TOTAL).increment(1);
        }
    }
}

/// Copies blocks, one after another. A copy that fails is not made: the block can be computed.
async fn replicate(nodes: Arc<KvNodes>, own: Arc<str>, copies: usize, mut blocks: mpsc::Receiver<(Link, Bytes)>) {
    while let Some((link, block)) = blocks.recv().await {
        let done = nodes.copy(&own, &link, &block, copies).await;
        let made = done.inspect_err(|error| tracing::debug!(%error, "copy a block to another node")).unwrap_or(0);
        counter!(names::KV_STORE_REPLICATED_TOTAL).increment(made as u64);
        counter!(names::KV_STORE_REPLICATION_DROPPED_TOTAL).increment((copies - made.min(copies)) as u64);
    }
}

/// A record of ours.
struct Record {
    version: u64,
    tier: Tier,
    due: Instant,
}

/// Keeps the records of this node's groups. When the metadata fail it goes on where it was as soon as they answer.
struct Announcer {
    pool: WeakHandle<BlockPool>,
    groups: Arc<Notify>,
    metadata: Arc<dyn Metadata>,
    nodes: Arc<KvNodes>,
    id: Arc<str>,
    /// Under which everything was told.
    generation: Option<u64>,
    /// Of the pool, when everything was told.
    lives: u64,
    records: HashMap<BlockHash, Record>,
    /// When each record must be renewed.
    due: BTreeMap<(Instant, BlockHash), ()>,
    /// Records that are to be removed, and their versions.
    gone: HashMap<BlockHash, u64>,
    /// When it is looked whether the records still stand.
    look_at: Instant,
}

impl Announcer {
    async fn run(mut self) {
        let mut views = self.nodes.directory().watch();
        let mut was_refused = false;
        loop {
            let told = self.tell().await;
            let pause = match &told {
                Ok(true) => PAUSE,
                Ok(false) => Duration::ZERO,
                Err(error) => {
                    if !was_refused {
                        tracing::warn!(%error, "say in the metadata which blocks are here");
                    }
                    RETRY
                }
            };
            was_refused = told.is_err();
            sleep(pause).await;
            if matches!(told, Ok(false)) {
                if self.pool.upgrade().is_none() {
                    return;
                }
                // without a place in the cluster there is nothing to renew
                let next = self.current().and_then(|_| self.due.first_key_value());
                let next = next.map(|((at, _), ())| self.look_at.min(*at));
                let renewal = sleep_until(next.unwrap_or_else(|| Instant::now() + LEASE));
                tokio::select! {
                    () = self.groups.notified() => {}
                    // an error: the directory is gone with its nodes, and so is this task
                    _ = views.changed() => {}
                    () = renewal => {}
                }
            }
        }
    }

    /// The generation under which others see this node; `None` while they do not.
    fn current(&self) -> Option<u64> {
        let view = self.nodes.directory().view();
        view.get(&self.id).map(|record| record.member.generation)
    }

    /// Whether others see this life as the member's: then a record of a higher generation is of an earlier life, from
    /// when generations were numbered otherwise.
    fn is_current(&self, generation: u64) -> bool {
        self.current() == Some(generation)
    }

    /// Tells of some changes; whether there were any.
    async fn tell(&mut self) -> Result<bool> {
        let Some(pool) = self.pool.upgrade() else { return Ok(false) };
        let Some(generation) = self.current() else { return Ok(false) };
        // a fresh pool knows of nothing that was told
        if self.generation != Some(generation) || self.lives != pool.restarts() {
            if self.lives != pool.restarts() {
                // the records of what it lost run out; those of what it still has are found again
                self.records.clear();
                self.due.clear();
            }
            self.lives = pool.restarts();
            pool.ask(Untell::All, DEADLINE).await?;
            self.generation = Some(generation);
        }
        let changes = pool.ask(TakeUntold { limit: BATCH }, DEADLINE).await?;
        let any = !changes.is_empty() || !self.gone.is_empty();
        let mut held = Vec::new();
        for (group, tier) in changes {
            match tier {
                Some(tier) => held.push((group, tier)),
                None => {
                    let forgotten = self.forget(&group);
                    self.gone.extend(forgotten.map(|record| (group, record.version)));
                }
            }
        }
        let renewed = self.renewals();
        let any = any || !renewed.is_empty();
        held.extend(renewed);
        let mut held = held.into_iter();
        while let Some((group, tier)) = held.next() {
            if let Err(error) = self.write(group, Holding { generation, tier }).await {
                let mut untold: Vec<_> = held.map(|(group, _)| group).collect();
                untold.push(group);
                if pool.ask(Untell::These(untold), DEADLINE).await.is_err() {
                    // then everything is told again
                    self.generation = None;
                }
                return Err(error);
            }
        }
        self.remove_gone().await?;
        Ok(self.look().await? || any)
    }

    /// Removes the records of what is here no longer; those that cannot be removed now, later.
    async fn remove_gone(&mut self) -> Result<()> {
        while let Some((group, version)) = self.gone.iter().next().map(|(group, version)| (*group, *version)) {
            // one that is another's by now stays
            self.metadata.remove(&Holding::key(&group, &self.id), version).await?;
            self.gone.remove(&group);
        }
        Ok(())
    }

    /// Looks now and then whether the newest record stands. If not, the metadata have lost them all: everything is told
    /// again. Whether that is to be done.
    async fn look(&mut self) -> Result<bool> {
        let Some(((_, group), ())) = self.due.last_key_value() else { return Ok(false) };
        if self.look_at > Instant::now() {
            return Ok(false);
        }
        let found = self.metadata.get(&Holding::key(group, &self.id)).await?;
        self.look_at = Instant::now() + LOOK;
        if found.is_none() {
            tracing::warn!(records = self.records.len(), "the metadata lost which blocks are here; saying it again");
            self.generation = None;
        }
        Ok(found.is_none())
    }

    /// Records whose lease is half over.
    fn renewals(&self) -> Vec<(BlockHash, Tier)> {
        let now = Instant::now();
        let due = self.due.keys().take_while(|(at, _)| *at <= now).take(BATCH);
        due.filter_map(|(_, group)| Some((*group, self.records.get(group)?.tier))).collect()
    }

    fn forget(&mut self, group: &BlockHash) -> Option<Record> {
        let record = self.records.remove(group)?;
        self.due.remove(&(record.due, *group));
        Some(record)
    }

    async fn write(&mut self, group: BlockHash, holding: Holding) -> Result<()> {
        let key = Holding::key(&group, &self.id);
        let mut expected = self.forget(&group).map(|record| record.version).or(self.gone.remove(&group));
        let renewed = Instant::now();
        let version = loop {
            let written = self.metadata.compare_and_set(&key, expected, holding.to_bytes(), Some(LEASE)).await?;
            if let Some(version) = written {
                break version;
            }
            let found = self.metadata.get(&key).await?;
            let later = found.as_ref().and_then(|(bytes, _)| Holding::read(bytes));
            let is_other =
                |later: &Holding| later.generation > holding.generation && !self.is_current(holding.generation);
            if let Some(later) = later.filter(is_other) {
                // a later process has this name: what it says counts
                tracing::debug!(key, later.generation, "another life's record stands");
                return Ok(());
            }
            expected = found.map(|(_, version)| version);
        };
        let due = renewed + LEASE / 2;
        self.records.insert(group, Record { version, tier: holding.tier, due });
        self.due.insert((due, group), ());
        Ok(())
    }
}
