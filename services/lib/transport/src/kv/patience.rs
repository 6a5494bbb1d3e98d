//! How long a node may take: for an answer, and for blocks that share its link.
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long a node may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// For an answer, beside what bytes take.
    pub answer: Duration,
    /// The slowest link on which blocks are shared, in bytes per second: all blocks that are on their way to or from a
    /// node together move at least so fast.
    pub rate: u64,
}

impl Default for Patience {
    fn default() -> Self {
        Self { answer: Duration::from_secs(1), rate: 8 << 20 }
    }
}

impl Patience {
    /// For an answer that so many bytes must move for.
    pub fn with(&self, bytes: u64) -> Duration {
        self.answer + Duration::from_secs_f64(bytes as f64 / self.rate.max(1) as f64)
    }
}

/// What is on its way to or from a node.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    /// Bytes that ever began, and ended.
    begun: AtomicU64,
    ended: AtomicU64,
    largest: AtomicU64,
}

impl Traffic {
    /// The largest block so far, in bytes.
    pub(super) fn largest(&self) -> u64 {
        self.largest.load(Ordering::Relaxed)
    }

    /// A block of so many bytes was seen.
    pub(super) fn saw(&self, bytes: u64) {
        self.largest.fetch_max(bytes, Ordering::Relaxed);
    }

    /// So many bytes are on their way until the answer is dropped.
    pub(super) fn begin(self: &Arc<Self>, bytes: u64) -> Moving {
        let before = self.ended.load(Ordering::Relaxed);
        self.begun.fetch_add(bytes, Ordering::Relaxed);
        Moving { traffic: Arc::clone(self), bytes, before }
    }
}

/// Bytes on their way.
pub(super) struct Moving {
    traffic: Arc<Traffic>,
    bytes: u64,
    /// What had ended before.
    before: u64,
}

impl Moving {
    /// All bytes that were on their way at any time since these are; it only grows.
    pub(super) fn beside(&self) -> u64 {
        self.traffic.begun.load(Ordering::Relaxed).saturating_sub(self.before)
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        self.traffic.ended.fetch_add(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_shares_the_link_is_allowed_for_also_after_it_ended() {
        let traffic = Arc::new(Traffic::default());
        drop(traffic.begin(1000));
        let first = traffic.begin(10);
        assert_eq!(first.beside(), 10);
        let second = traffic.begin(20);
        assert_eq!((first.beside(), second.beside()), (30, 30));
        drop(second);
        assert_eq!(first.beside(), 30);
        let third = traffic.begin(5);
        assert_eq!((first.beside(), third.beside()), (35, 15));
        let patience = Patience { answer: Duration::from_millis(100), rate: 1000 };
        assert_eq!(patience.with(500), Duration::from_millis(600));
    }
}
