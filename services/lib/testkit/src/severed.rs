//! Metadata that one process alone does not reach.
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt, pending, ready};
use moesaic_types::boundary::{Metadata, Versioned};
use moesaic_types::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// Metadata that can be out of reach for who has this, while others reach them.
pub struct Severed {
    metadata: Arc<dyn Metadata>,
    is_cut: AtomicBool,
    hangs: AtomicBool,
    refused: AtomicUsize,
}

impl Severed {
    /// In reach, until they are cut off.
    pub fn over(metadata: Arc<dyn Metadata>) -> Arc<Self> {
        Arc::new(Self { metadata, is_cut: false.into(), hangs: false.into(), refused: 0.into() })
    }

    /// From now on every call is `Unavailable`, or none.
    pub fn cut(&self, is_cut: bool) {
        self.is_cut.store(is_cut, Ordering::SeqCst);
    }

    /// From now on no call is answered.
    pub fn hang(&self) {
        self.hangs.store(true, Ordering::SeqCst);
    }

    /// Calls that were refused so far.
    pub fn refused(&self) -> usize {
        self.refused.load(Ordering::SeqCst)
    }

    fn call<'a, T: Send + 'a>(
        &'a self,
        call: impl FnOnce(&'a dyn Metadata) -> BoxFuture<'a, Result<T>>,
    ) -> BoxFuture<'a, Result<T>> {
        if self.hangs.load(Ordering::SeqCst) {
            return pending().boxed();
        }
        if self.is_cut.load(Ordering::SeqCst) {
            self.refused.fetch_add(1, Ordering::SeqCst);
            return ready(Err(Error::unavailable("the metadata are cut off"))).boxed();
        }
        call(&*self.metadata)
    }
}

impl Metadata for Severed {
    fn get(&self, key: &str) -> BoxFuture<'_, Result<Option<Versioned>>> {
        self.call(|metadata| metadata.get(key))
    }

    fn get_many(&self, keys: &[String]) -> BoxFuture<'_, Result<Vec<Option<Versioned>>>> {
        self.call(|metadata| metadata.get_many(keys))
    }

    fn compare_and_set(
        &self,
        key: &str,
        expected: Option<u64>,
        value: Bytes,
        expires_after: Option<Duration>,
    ) -> BoxFuture<'_, Result<Option<u64>>> {
        self.call(|metadata| metadata.compare_and_set(key, expected, value, expires_after))
    }

    fn remove(&self, key: &str, expected: u64) -> BoxFuture<'_, Result<bool>> {
        self.call(|metadata| metadata.remove(key, expected))
    }

    fn add(&self, key: &str, amount: i64, expires_after: Option<Duration>) -> BoxFuture<'_, Result<i64>> {
        self.call(|metadata| metadata.add(key, amount, expires_after))
    }

    fn keys(&self, prefix: &str) -> BoxFuture<'_, Result<Vec<String>>> {
        self.call(|metadata| metadata.keys(prefix))
    }
}
