//! Composition: the block pool behind the `PrefixStore` boundary.
use crate::actors::block_pool::{BlockPool, Fetch, Longest, Offer, Size};
use crate::config::Config;
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use moesaic_actors::{Handle, Supervised};
use moesaic_types::boundary::PrefixStore;
use moesaic_types::{BlockHash, Result};
use std::sync::Arc;
use std::time::Duration;

/// Longest wait for the pool; a slower answer is worth less than computing the block.
const DEADLINE: Duration = Duration::from_secs(2);

/// A store in this process.
pub struct KvStore {
    pool: Handle<BlockPool>,
}

impl KvStore {
    /// Starts an empty store.
    ///
    /// # Errors
    /// `InvalidArgument` when the configuration is out of bounds.
    pub fn start(config: &Config) -> Result<Arc<Self>> {
        config.validate()?;
        let capacity = config.capacity.as_usize();
        let pool = Supervised::spawn("block_pool", config.mailbox, move || BlockPool::new(capacity));
        Ok(Arc::new(Self { pool }))
    }

    /// Blocks and bytes that are kept.
    ///
    /// # Errors
    /// `Unavailable` while the pool restarts, `ResourceExhausted` when its mailbox is full.
    pub async fn size(&self) -> Result<(usize, usize)> {
        Ok(self.pool.ask(Size, DEADLINE).await?)
    }
}

impl PrefixStore for KvStore {
    fn longest(&self, chain: &[BlockHash]) -> BoxFuture<'_, Result<usize>> {
        let message = Longest(chain.to_vec());
        async move { Ok(self.pool.ask(message, DEADLINE).await?) }.boxed()
    }

    fn fetch(&self, chain: &[BlockHash]) -> BoxFuture<'_, Result<Vec<Bytes>>> {
        let message = Fetch(chain.to_vec());
        async move { Ok(self.pool.ask(message, DEADLINE).await?) }.boxed()
    }

    fn offer(&self, hash: BlockHash, bytes: Bytes) -> BoxFuture<'_, Result<bool>> {
        async move { Ok(self.pool.ask(Offer { hash, bytes }, DEADLINE).await?) }.boxed()
    }
}
