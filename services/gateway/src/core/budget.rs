//! Memory for the bodies of requests: bounded over all of them, whatever number of clients sends.
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that may be held at a time; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Budget {
    left: Arc<AtomicUsize>,
}

/// Bytes of a budget; dropping it gives them back.
#[derive(Debug)]
pub(crate) struct Held {
    budget: Budget,
    bytes: usize,
}

impl Budget {
    pub(crate) fn new(bytes: usize) -> Self {
        Self { left: Arc::new(AtomicUsize::new(bytes)) }
    }

    /// Nothing yet, to be added to.
    pub(crate) fn held(&self) -> Held {
        Held { budget: self.clone(), bytes: 0 }
    }
}

impl Held {
    /// Takes so many bytes more; false, and nothing taken, where so many are not left. Never waits: two that wait for
    /// each other's bytes would wait for ever.
    pub(crate) fn add(&mut self, bytes: usize) -> bool {
        let less = |left: usize| left.checked_sub(bytes);
        let taken = self.budget.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, less).is_ok();
        self.bytes += if taken { bytes } else { 0 };
        taken
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.left.fetch_add(self.bytes, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_missing_until_it_is_given_back() {
        let budget = Budget::new(10);
        let (mut first, mut second) = (budget.held(), budget.held());
        assert!(first.add(6) && first.add(1) && second.add(3));
        assert!(!second.add(1) && second.add(0));
        drop(first);
        assert!(!second.add(8) && second.add(7));
        drop(second);
        assert!(budget.held().add(10));
    }
}
