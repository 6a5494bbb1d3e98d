//! Traffic with the prefix store and the event bus: all of it in tasks, so that the engine never waits.
use super::economy::Economy;
use super::seal;
use super::{Command, Engine, Fetched, Phase};
use bytes::Bytes;
use futures::StreamExt;
use metrics::Counter;
use moesaic_telemetry::count;
use moesaic_types::boundary::PrefixStore;
use moesaic_types::{BLOCK_TOKENS, BlockHash, Error, Link, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout_at};
use tracing::Instrument;

/// Full blocks that wait to be offered; further ones are offered when they are evicted.
const MAX_FULL: usize = 1024;

/// Full blocks that are copied out of the pool between two steps.
const FULL_PER_STEP: usize = 2;

impl Engine {
    /// Begins to fetch for sequences that are next, for so many at once; those that need not wait for that. Who is behind
    /// them is fetched for later: what is fetched takes memory until it is admitted.
    pub(super) fn fetch_for(&mut self, next: Vec<u64>, at_once: usize) -> Vec<u64> {
        if !self.fetches() {
            return next;
        }
        let mut fetching = self.sequences.values().filter(|sequence| sequence.phase == Phase::Fetching).count();
        let waits = |key: &u64| {
            let starts = fetching < at_once && self.start_fetch(*key);
            fetching += usize::from(starts);
            !starts
        };
        next.into_iter().filter(waits).collect()
    }

    /// Whether the prefix store is asked for blocks.
    pub(super) fn fetches(&self) -> bool {
        self.parts.store.is_some() && self.economy.asks()
    }

    /// Asks the prefix store for the blocks that follow those that are here; whether it was asked now.
    fn start_fetch(&mut self, key: u64) -> bool {
        let Some(store) = self.parts.store.clone() else { return false };
        let Some(sequence) = self.sequences.get_mut(&key).filter(|sequence| sequence.is_unfetched) else {
            return false;
        };
        let chain = sequence.reusable().to_vec();
        let first = self.pool.peek(&chain).blocks;
        if first == chain.len() || self.fetched_room.available_permits() == 0 {
            return false;
        }
        sequence.is_unfetched = false;
        sequence.phase = Phase::Fetching;
        let timeout = Duration::from_millis(self.parts.config.prefix_store_timeout_ms);
        let replies = self.replies.clone();
        let span = tracing::info_span!(parent: &sequence.span, "fetch blocks", blocks = count(chain.len() - first));
        let fetch = Fetch {
            store,
            economy: Arc::clone(&self.economy),
            is_away: Arc::clone(&self.store_is_away),
            skipped: self.metrics.store_skipped.clone(),
            corrupt: self.metrics.store_corrupt.clone(),
            room: Arc::clone(&self.fetched_room),
            block_bytes: self.runner.kv_block_bytes(),
            timeout,
        };
        let task = async move {
            let fetched = fetch.run(&chain, first).await;
            reply(&replies, Command::Fetched { key, fetched }).await;
        };
        self.parts.runtime.spawn(task.instrument(span));
        true
    }

    /// Offers evicted blocks to the prefix store; their contents still stand.
    pub(super) fn offer_evicted(&mut self) {
        let evicted = self.pool.take_evicted();
        if self.parts.store.is_none() {
            return;
        }
        for (block, link) in evicted {
            match Arc::clone(&self.offers).try_acquire_owned() {
                Ok(place) => drop(self.offer(block, link, place)),
                Err(_) => self.metrics.store_dropped.increment(1),
            }
        }
    }

    /// Queues a prompt's full blocks to be offered: its first token came, so there is nothing wrong with them.
    pub(super) fn queue_prompt(&mut self, key: u64) {
        let Some(sequence) = self.sequences.get(&key).filter(|_| self.offers_full) else { return };
        let full = sequence.registered.min(sequence.request.prompt.len() / BLOCK_TOKENS);
        let room = MAX_FULL.saturating_sub(self.full.len());
        let links = (0..full).map(|index| Link::of(&sequence.chain, index));
        self.full.extend(links.filter(|link| self.pool.unstored(&link.hash).is_some()).take(room));
    }

    /// Offers some of the queued blocks; whether there may be more to do now.
    pub(super) fn offer_full(&mut self) -> bool {
        let mut offered = 0;
        while offered < FULL_PER_STEP
            && let Some(link) = self.full.front().copied()
        {
            // evicted meanwhile, and offered then; or queued twice
            let Some(block) = self.pool.unstored(&link.hash) else {
                self.full.pop_front();
                continue;
            };
            let Ok(place) = Arc::clone(&self.offers).try_acquire_owned() else { return false };
            self.full.pop_front();
            if self.offer(block, link, place) {
                self.pool.set_stored(&link.hash);
            }
            offered += 1;
        }
        !self.full.is_empty()
    }

    /// Copies a block out of the pool and sends it on its way; whether it could be copied.
    fn offer(&mut self, block: u32, link: Link, place: OwnedSemaphorePermit) -> bool {
        let Some(store) = self.parts.store.clone() else { return false };
        let bytes = match self.runner.export_block(block) {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::warn!(%error, block, "export a block");
                return false;
            }
        };
        self.metrics.store_offered.increment(1);
        let replies = self.offers_full.then(|| self.replies.clone());
        self.parts.runtime.spawn(async move {
            // a large block's checksum takes longer than a task may
            let sealed = spawn_blocking(move || seal::seal(&link.hash, bytes)).await;
            let sealed = sealed.map_err(|error| Error::internal(error.to_string()));
            let offered = async { store.offer(link, sealed?).await };
            let outcome = offered.await;
            drop(place);
            let Some(replies) = replies else { return };
            if let Err(error) = outcome {
                tracing::debug!(%error, "offer a block to the prefix store");
                reply(&replies, Command::NotStored(link.hash)).await;
            }
            // others may wait for the place; an engine whose queue is full looks by itself
            let _ = replies.try_send(Command::Wake);
        });
        true
    }

    /// Tells the prefix store to drop blocks of which nothing good came, so that no replica fetches them again.
    pub(super) fn forget_stored(&self, chain: Vec<BlockHash>) {
        let Some(store) = self.parts.store.clone().filter(|_| !chain.is_empty()) else { return };
        self.parts.runtime.spawn(async move {
            if let Err(error) = store.forget(&chain).await {
                tracing::warn!(%error, "drop blocks from the prefix store; they may be fetched again");
            }
        });
    }

    /// Publishes what changed in the prefix cache; keeps it for later when the publisher is behind.
    pub(super) fn publish_events(&mut self) {
        let Some(events) = &self.parts.events else {
            self.pool.take_events();
            return;
        };
        let batch = self.pool.take_events();
        if batch.is_empty() {
            return;
        }
        if let Err(tokio::sync::mpsc::error::TrySendError::Full(batch)) = events.try_send(batch) {
            self.pool.return_events(batch);
        }
    }
}

/// One sequence's question to the store.
struct Fetch {
    store: Arc<dyn PrefixStore>,
    economy: Arc<Economy>,
    is_away: Arc<AtomicBool>,
    skipped: Counter,
    corrupt: Counter,
    room: Arc<Semaphore>,
    block_bytes: usize,
    timeout: Duration,
}

impl Fetch {
    /// The blocks that came in time, in order: what is missing is computed.
    async fn run(self, chain: &[BlockHash], first: usize) -> Fetched {
        let mut fetched = Fetched { first, ..Fetched::default() };
        let outcome = self.fill(&mut fetched, chain).await;
        let Fetched { blocks, room, .. } = &mut fetched;
        // what did not come takes no room
        let kept = room.as_mut().and_then(|room| room.split(blocks.len()));
        *room = kept;
        // one warning for many requests
        let was_away = self.is_away.swap(outcome.is_err(), Ordering::Relaxed);
        match outcome {
            Err(error) if !was_away => tracing::warn!(%error, blocks = blocks.len(), "fetch from the prefix store"),
            Err(error) => tracing::debug!(%error, blocks = blocks.len(), "fetch from the prefix store"),
            Ok(()) if was_away => tracing::info!("the prefix store answers again"),
            Ok(()) => {}
        }
        fetched
    }

    /// Room for so many blocks, or for as many as there is.
    fn take_room(&self, wanted: usize) -> Option<OwnedSemaphorePermit> {
        loop {
            let count = wanted.min(self.room.available_permits()).min(u32::MAX as usize);
            if count == 0 {
                return None;
            }
            // another may have taken it
            if let Ok(room) = Arc::clone(&self.room).try_acquire_many_owned(count as u32) {
                return Some(room);
            }
        }
    }

    /// A block that is as it was offered.
    async fn open(&self, name: BlockHash, sealed: Bytes) -> Option<Bytes> {
        // a large block's checksum takes longer than a task may
        let opened = spawn_blocking(move || seal::open(&name, &sealed)).await.ok().flatten();
        opened.filter(|block| block.len() == self.block_bytes)
    }

    /// Has the store drop a block, so that it takes a good one.
    async fn drop_corrupt(&self, name: BlockHash) -> Result<()> {
        tracing::warn!(block = ?name, "a block of the prefix store is not as it was offered; it is dropped");
        self.corrupt.increment(1);
        self.store.forget(&[name]).await
    }

    async fn fill(&self, fetched: &mut Fetched, chain: &[BlockHash]) -> Result<()> {
        let first = fetched.first;
        let late = |_| Error::unavailable(format!("the prefix store did not answer within {:?}", self.timeout));
        let asked = Instant::now();
        let deadline = asked + self.timeout;
        let stored = timeout_at(deadline, self.store.longest(chain, first)).await.map_err(late)??;
        self.economy.answered(asked.elapsed());
        let stored = stored.min(chain.len() - first);
        if stored == 0 {
            return Ok(());
        }
        if !self.economy.is_worth(stored, self.block_bytes) {
            self.skipped.increment(stored as u64);
            return Ok(());
        }
        fetched.room = self.take_room(stored);
        let room = fetched.room.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        if room == 0 {
            fetched.lacks_room = stored;
            return Ok(());
        }
        self.skipped.increment((stored - room) as u64);
        let begun = Instant::now();
        let mut coming = self.store.fetch(&chain[..first + room], first);
        let blocks = &mut fetched.blocks;
        let outcome = loop {
            if blocks.len() == room {
                break Ok(());
            }
            match timeout_at(deadline, coming.next()).await {
                Ok(Some(Ok(sealed))) => {
                    let name = chain[first + blocks.len()];
                    match self.open(name, sealed).await {
                        Some(block) => blocks.push(block),
                        None => {
                            break timeout_at(deadline, self.drop_corrupt(name)).await.unwrap_or_else(|e| Err(late(e)));
                        }
                    }
                }
                Ok(None) => break Ok(()),
                Ok(Some(Err(error))) => break Err(error),
                Err(elapsed) => break Err(late(elapsed)),
            }
        };
        self.economy.fetched(blocks.iter().map(Bytes::len).sum(), begun.elapsed());
        outcome
    }
}

/// Queues a command, waiting on a blocking thread if the queue is full.
async fn reply(replies: &SyncSender<Command>, command: Command) {
    if let Err(TrySendError::Full(command)) = replies.try_send(command) {
        let replies = replies.clone();
        let sent = spawn_blocking(move || replies.send(command).is_ok()).await;
        tracing::debug!(sent = sent.unwrap_or(false), "the engine's queue was full");
    }
}
