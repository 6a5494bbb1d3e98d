//! The kv-stores that there are, whatever becomes of the actor.
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The kv-stores by id.
#[derive(Default)]
pub(super) struct Stores(Mutex<State>);

#[derive(Default)]
struct State {
    /// `None` while nobody told: all are heard then.
    known: Option<BTreeSet<Arc<str>>>,
    /// They are to be asked to say everything.
    new: BTreeSet<Arc<str>>,
}

impl Stores {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These there are from now on.
    pub(super) fn set(&self, ids: BTreeSet<Arc<str>>) {
        let mut state = self.state();
        let came = ids.iter().filter(|id| state.known.as_ref().is_none_or(|known| !known.contains(*id)));
        let came: Vec<_> = came.cloned().collect();
        state.new.extend(came);
        state.new.retain(|id| ids.contains(id));
        state.known = Some(ids);
    }

    /// Whether what a store says counts.
    pub(super) fn is_heard(&self, id: &str) -> bool {
        self.state().known.as_ref().is_none_or(|known| known.contains(id))
    }

    /// Those that came since this was called last.
    pub(super) fn take_new(&self) -> BTreeSet<Arc<str>> {
        std::mem::take(&mut self.state().new)
    }
}
