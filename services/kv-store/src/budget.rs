//! Memory of blocks that are on their way in or out, beside what is kept.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What is counted.
const UNIT: u64 = 1 << 10;

/// The memory; how large a block is is known when it has come, so that the largest so far is allowed for.
#[derive(Debug)]
pub struct Budget {
    free: Arc<Semaphore>,
    /// The largest block so far, in units; at first, any.
    largest: AtomicU32,
    is_known: AtomicBool,
}

fn units(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX)
}

impl Budget {
    /// Of so many bytes; `largest`: what a block can have, no more than these.
    pub fn new(bytes: u64, largest: u64) -> Self {
        let free = Arc::new(Semaphore::new(units(bytes) as usize));
        Self { free, largest: units(largest.min(bytes)).into(), is_known: false.into() }
    }

    /// Room for the next block. Waits until there is. Cancel-safe.
    pub async fn reserve(self: &Arc<Self>) -> Room {
        let units = self.largest.load(Ordering::Relaxed);
        let permit = Arc::clone(&self.free).acquire_many_owned(units).await;
        Room { budget: Arc::clone(self), permit: permit.expect("the semaphore is never closed") }
    }

    fn saw(&self, units: u32) {
        if !self.is_known.swap(true, Ordering::Relaxed) {
            self.largest.store(units, Ordering::Relaxed);
        }
        self.largest.fetch_max(units, Ordering::Relaxed);
    }
}

/// What one block takes, until it is dropped.
#[derive(Debug)]
pub struct Room {
    budget: Arc<Budget>,
    permit: OwnedSemaphorePermit,
}

impl Room {
    /// The block has so many bytes.
    pub fn fit(&mut self, bytes: usize) {
        let (wanted, had) = (units(bytes as u64), self.permit.num_permits() as u32);
        self.budget.saw(wanted);
        if wanted < had {
            drop(self.permit.split((had - wanted) as usize));
        } else if let Ok(more) = Arc::clone(&self.budget.free).try_acquire_many_owned(wanted - had) {
            self.permit.merge(more);
        }
        // where there is no more: it has come already, and the next one is allowed for
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[tokio::test]
    async fn a_block_takes_what_it_has_and_the_next_what_the_largest_had() {
        let budget = Arc::new(Budget::new(10 << 10, 8 << 10));
        let mut first = budget.reserve().await;
        assert!(budget.reserve().now_or_never().is_none(), "its size is not known yet");
        first.fit(3000);
        let mut others = Vec::new();
        for _ in 0..2 {
            others.push(budget.reserve().now_or_never().unwrap());
        }
        assert!(budget.reserve().now_or_never().is_none());
        others[0].fit(4000);
        drop(first);
        assert!(budget.reserve().now_or_never().is_none(), "the next may be as large as that");
        others.pop();
        let mut last = budget.reserve().now_or_never().unwrap();
        last.fit(1);
        assert_eq!(budget.free.available_permits(), 10 - 4 - 1);
        drop((others, last));
        assert_eq!(budget.free.available_permits(), 10);
    }
}
