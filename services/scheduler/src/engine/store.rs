//! Traffic with the prefix store and the event bus: all of it in tasks, so that the engine never waits.
use super::{Command, Engine, Phase};
use bytes::Bytes;
use moesaic_types::BlockHash;
use moesaic_types::boundary::PrefixStore;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::Duration;
use tracing::Instrument;

impl Engine {
    /// Asks the prefix store for the blocks that follow those that are here.
    pub(super) fn start_fetch(&mut self, key: u64) {
        let Some(store) = self.parts.store.clone() else { return };
        let Some(sequence) = self.sequences.get_mut(&key) else { return };
        let reusable = sequence.reusable();
        let first = self.pool.peek(reusable).blocks;
        let chain = reusable[first..].to_vec();
        if chain.is_empty() {
            return;
        }
        sequence.phase = Phase::Fetching;
        let timeout = Duration::from_millis(self.parts.config.prefix_store_timeout_ms);
        let replies = self.replies.clone();
        let span = tracing::info_span!(parent: &sequence.span, "fetch blocks", blocks = chain.len());
        let task = async move {
            let blocks = match tokio::time::timeout(timeout, fetch(&*store, &chain)).await {
                Ok(Ok(blocks)) => blocks,
                Ok(Err(error)) => {
                    tracing::warn!(%error, "fetch blocks from the prefix store");
                    Vec::new()
                }
                Err(_) => {
                    tracing::warn!(timeout_ms = timeout.as_millis(), "the prefix store did not answer in time");
                    Vec::new()
                }
            };
            reply(&replies, Command::Fetched { key, first, blocks }).await;
        };
        self.parts.runtime.spawn(task.instrument(span));
    }

    /// Offers evicted blocks to the prefix store; their contents still stand.
    pub(super) fn offer_evicted(&mut self) {
        let evicted = self.pool.take_evicted();
        let Some(store) = &self.parts.store else { return };
        for (block, hash) in evicted {
            let Ok(permit) = Arc::clone(&self.offers).try_acquire_owned() else {
                self.metrics.store_dropped.increment(1);
                continue;
            };
            let bytes = match self.runner.export_block(block) {
                Ok(bytes) => bytes,
                Err(error) => {
                    tracing::warn!(%error, block, "export an evicted block");
                    continue;
                }
            };
            self.metrics.store_offered.increment(1);
            let store = Arc::clone(store);
            self.parts.runtime.spawn(async move {
                if let Err(error) = store.offer(hash, bytes).await {
                    tracing::debug!(%error, "offer a block to the prefix store");
                }
                drop(permit);
            });
        }
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

async fn fetch(store: &dyn PrefixStore, chain: &[BlockHash]) -> moesaic_types::Result<Vec<Bytes>> {
    let stored = store.longest(chain).await?.min(chain.len());
    if stored == 0 {
        return Ok(Vec::new());
    }
    let mut blocks = store.fetch(&chain[..stored]).await?;
    blocks.truncate(stored);
    Ok(blocks)
}

/// Queues a command, waiting on a blocking thread if the queue is full.
async fn reply(replies: &SyncSender<Command>, command: Command) {
    if let Err(TrySendError::Full(command)) = replies.try_send(command) {
        let replies = replies.clone();
        let sent = tokio::task::spawn_blocking(move || replies.send(command).is_ok()).await;
        tracing::debug!(sent = sent.unwrap_or(false), "the engine's queue was full");
    }
}
