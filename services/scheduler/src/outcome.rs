//! How each request ended, counted exactly once by whoever sees its end first: the engine, the reader's end or the door.
use crate::metrics::Ends;
use moesaic_types::{ErrorCode, FinishReason, RequestId};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

/// One request's end.
pub struct Outcome {
    ends: Arc<Ends>,
    submitted: Instant,
    told: AtomicBool,
    enough: AtomicBool,
}

impl Outcome {
    fn first(&self) -> bool {
        !self.told.swap(true, Ordering::AcqRel)
    }

    /// The answer is complete.
    pub fn answered(&self, reason: FinishReason) {
        if self.first() {
            self.ends.answered(reason, self.submitted.elapsed());
        }
    }

    /// It ended with an error.
    pub fn failed(&self, code: ErrorCode) {
        if self.first() {
            self.ends.failed(code);
        }
    }

    /// The reader went away: it had what it wanted, or it cancelled.
    pub fn left(&self) {
        if self.enough.load(Ordering::Acquire) {
            self.answered(FinishReason::Stop);
        } else if self.first() {
            self.ends.cancelled();
        }
    }
}

/// The requests in flight, by id.
#[derive(Default)]
pub struct Outcomes {
    by_id: Mutex<HashMap<RequestId, Weak<Outcome>>>,
}

impl Outcomes {
    fn by_id(&self) -> std::sync::MutexGuard<'_, HashMap<RequestId, Weak<Outcome>>> {
        self.by_id.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a request; it leaves when the result is dropped.
    pub fn enter(self: &Arc<Self>, id: &RequestId, ends: &Arc<Ends>, submitted: Instant) -> Entered {
        let (told, enough) = (AtomicBool::new(false), AtomicBool::new(false));
        let outcome = Arc::new(Outcome { ends: Arc::clone(ends), submitted, told, enough });
        self.by_id().insert(id.clone(), Arc::downgrade(&outcome));
        Entered { outcomes: Arc::clone(self), id: id.clone(), outcome }
    }

    /// The reader has all that it wants of this request, and drops its stream next.
    pub fn enough(&self, id: &RequestId) {
        if let Some(outcome) = self.by_id().get(id).and_then(Weak::upgrade) {
            outcome.enough.store(true, Ordering::Release);
        }
    }
}

/// A request that is in flight; held by its reader's end.
pub struct Entered {
    outcomes: Arc<Outcomes>,
    id: RequestId,
    /// How it ends.
    pub outcome: Arc<Outcome>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut by_id = self.outcomes.by_id();
        // A request with the same id may have taken the entry.
        if by_id.get(&self.id).is_some_and(|entry| std::ptr::eq(entry.as_ptr(), Arc::as_ptr(&self.outcome))) {
            by_id.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_goes_with_its_request_and_not_with_anothers() {
        let outcomes: Arc<Outcomes> = Arc::default();
        let ends = Arc::new(Ends::new("model", "outcomes"));
        let id = RequestId::new("same");
        let first = outcomes.enter(&id, &ends, Instant::now());
        let second = outcomes.enter(&id, &ends, Instant::now());
        drop(first);
        outcomes.enough(&id);
        assert!(second.outcome.enough.load(Ordering::Acquire));
        drop(second);
        assert!(outcomes.by_id().is_empty());
        outcomes.enough(&id);
    }
}
