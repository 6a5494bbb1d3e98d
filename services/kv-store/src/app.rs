//! Composition: the block pool, its disk, and the `PrefixStore` boundary over both.
use crate::actors::block_pool::{
    BlockPool, Forget, Locate, Longest, Lost, Offer, Pin, Promote, Save, Size, Sizes, Stalled, Unsaved, Wakes,
};
use crate::config::Config;
use crate::disk::{self, Files, Folder};
use crate::pool::Place;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream};
use futures::{FutureExt, StreamExt};
use moesaic_actors::{Handle, Supervised};
use moesaic_types::boundary::PrefixStore;
use moesaic_types::{BlockHash, Link, Result};
use std::collections::VecDeque;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::{AbortHandle, spawn_blocking};
use tokio::time::timeout;

/// Longest wait for the pool; a slower answer is worth less than computing the block.
pub(crate) const DEADLINE: Duration = Duration::from_secs(2);

/// A store in this process.
pub struct KvStore {
    pub(crate) pool: Handle<BlockPool>,
    pub(crate) wakes: Wakes,
    files: Option<Arc<dyn Files>>,
    disk_timeout: Duration,
    keeper: Option<AbortHandle>,
}

impl Drop for KvStore {
    fn drop(&mut self) {
        if let Some(keeper) = &self.keeper {
            keeper.abort();
        }
    }
}

impl KvStore {
    /// Starts a store: empty, or with what an earlier life left on disk, which is found in the background. Call it in a
    /// runtime where there is a disk tier.
    ///
    /// # Errors
    /// `InvalidArgument` when the configuration is out of bounds, or its folder cannot be used.
    pub fn start(config: &Config) -> Result<Arc<Self>> {
        config.validate()?;
        let folder = config.disk_folder.as_deref().map(Folder::open).transpose()?;
        Self::start_on(config, folder.map(|folder| Arc::new(folder) as Arc<dyn Files>))
    }

    /// Starts a store over other files than those of the configured folder.
    ///
    /// # Errors
    /// `InvalidArgument` when the configuration is out of bounds.
    pub fn start_on(config: &Config, files: Option<Arc<dyn Files>>) -> Result<Arc<Self>> {
        config.validate()?;
        let wakes = Wakes::default();
        let (ram, disk) = (config.capacity.0, files.is_some().then_some(config.disk_capacity.0));
        let for_pool = wakes.clone();
        let new = move || BlockPool::new(ram, disk, for_pool.clone());
        let pool = Supervised::spawn("block_pool", config.mailbox, new);
        let keeper = files.clone().map(|files| {
            let (work, patience) = (Arc::clone(&wakes.work), disk::Patience::of(config));
            tokio::spawn(disk::keep(pool.downgrade(), files, work, patience)).abort_handle()
        });
        Ok(Arc::new(Self { pool, wakes, files, disk_timeout: config.disk_timeout.get(), keeper }))
    }

    /// What is kept.
    ///
    /// # Errors
    /// `Unavailable` while the pool restarts, `ResourceExhausted` when its mailbox is full.
    pub async fn size(&self) -> Result<Sizes> {
        Ok(self.pool.ask(Size, DEADLINE).await?)
    }

    /// How many blocks of a chain are kept, from its start; and how many of these are in RAM.
    ///
    /// # Errors
    /// As [`KvStore::size`].
    pub async fn longest_by_tier(&self, chain: Vec<BlockHash>) -> Result<(usize, usize)> {
        Ok(self.pool.ask(Longest(chain), DEADLINE).await?)
    }

    /// Keeps a chain's blocks from eviction for a while; 0 ends that. How many, from its start: half of each tier can be
    /// pinned.
    ///
    /// # Errors
    /// As [`KvStore::size`].
    pub async fn pin(&self, chain: Vec<BlockHash>, for_: Duration) -> Result<usize> {
        Ok(self.pool.ask(Pin { chain, for_ }, DEADLINE).await?)
    }

    /// Drops blocks from both tiers; how many were there.
    ///
    /// # Errors
    /// As [`KvStore::size`].
    pub async fn drop_blocks(&self, blocks: Vec<BlockHash>) -> Result<usize> {
        Ok(self.pool.ask(Forget(blocks), DEADLINE).await?)
    }

    /// Writes to disk what is in RAM alone, so that the next life has it. Returns when that is done, or the disk takes no
    /// more; how many blocks that was. Cancel-safe: what is written stays.
    ///
    /// # Errors
    /// As [`KvStore::size`].
    pub async fn save(&self) -> Result<usize> {
        let mut left = self.pool.ask(Unsaved, DEADLINE).await?;
        let count = left.len();
        loop {
            let are_on_their_way;
            (left, are_on_their_way) = self.pool.ask(Save(left), DEADLINE).await?;
            if left.is_empty() && !are_on_their_way {
                return Ok(count);
            }
            // a change that came before this is remembered
            self.wakes.changes.notified().await;
        }
    }

    /// A chain's blocks from its start; each is read when it is asked for.
    pub fn blocks(&self, chain: Vec<BlockHash>) -> BoxStream<'static, Result<Bytes>> {
        let reader = Reader {
            pool: self.pool.clone(),
            files: self.files.clone(),
            timeout: self.disk_timeout,
            left: chain.into(),
        };
        stream::try_unfold(reader, |mut reader| async move { Ok(reader.next().await?.map(|block| (block, reader))) })
            .boxed()
    }
}

/// Reads a chain.
struct Reader {
    pool: Handle<BlockPool>,
    files: Option<Arc<dyn Files>>,
    /// Longest wait for the disk.
    timeout: Duration,
    /// Not read yet.
    left: VecDeque<BlockHash>,
}

impl Reader {
    async fn next(&mut self) -> Result<Option<Bytes>> {
        let Some(hash) = self.left.pop_front() else { return Ok(None) };
        // one at a time: those that a reader holds take memory even when they are evicted
        let block = match self.pool.ask(Locate(vec![hash]), DEADLINE).await?.pop() {
            None => None,
            Some(Place::Ram(bytes)) => Some(bytes),
            Some(Place::Disk(link)) => self.read(link).await,
        };
        if block.is_none() {
            self.left.clear();
        }
        Ok(block)
    }

    /// Reads a block from disk and brings it back to RAM; one that is gone or broken is forgotten, one
    /// that no file was left to read with is not.
    async fn read(&self, link: Link) -> Option<Bytes> {
        let files = Arc::clone(self.files.as_ref()?);
        let read = timeout(self.timeout, spawn_blocking(move || files.read(&link.hash))).await;
        let Ok(read) = read else {
            tracing::warn!(block = ?link.hash, "the disk does not answer");
            let _ = self.pool.try_tell(Stalled);
            return None;
        };
        let told = match read {
            Ok(Ok(Some(block))) => {
                let bytes = Bytes::from(block);
                let promote = Promote { link, bytes: bytes.clone() };
                // a pool that has too much to do leaves it on disk
                let _ = self.pool.try_tell(promote);
                return Some(bytes);
            }
            Ok(Ok(None)) => {
                tracing::warn!(block = ?link.hash, "a block on disk is not intact; it is dropped");
                Lost { hash: link.hash, is_corrupt: true }
            }
            Ok(Err(error)) if error.kind() == ErrorKind::NotFound => Lost { hash: link.hash, is_corrupt: false },
            Ok(Err(error)) if disk::is_out_of_files(&error) => {
                tracing::warn!(%error, block = ?link.hash, "read a block from disk");
                return None;
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, block = ?link.hash, "read a block from disk; it is dropped");
                Lost { hash: link.hash, is_corrupt: true }
            }
            Err(error) => {
                tracing::error!(%error, "read a block from disk");
                return None;
            }
        };
        // who reads it next tells it again
        let _ = self.pool.try_tell(told);
        None
    }
}

/// What is asked for of a chain.
fn wanted(chain: &[BlockHash], from: usize) -> Vec<BlockHash> {
    chain.get(from..).unwrap_or_default().to_vec()
}

impl PrefixStore for KvStore {
    fn longest(&self, chain: &[BlockHash], from: usize) -> BoxFuture<'_, Result<usize>> {
        let message = Longest(wanted(chain, from));
        async move { Ok(self.pool.ask(message, DEADLINE).await?.0) }.boxed()
    }

    fn fetch(&self, chain: &[BlockHash], from: usize) -> BoxStream<'static, Result<Bytes>> {
        self.blocks(wanted(chain, from))
    }

    fn offer(&self, link: Link, bytes: Bytes) -> BoxFuture<'_, Result<bool>> {
        async move { Ok(self.pool.ask(Offer { link, bytes }, DEADLINE).await?) }.boxed()
    }

    fn forget(&self, blocks: &[BlockHash]) -> BoxFuture<'_, Result<()>> {
        let blocks = blocks.to_vec();
        async move { self.drop_blocks(blocks).await.map(|_| ()) }.boxed()
    }
}
