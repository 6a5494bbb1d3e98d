//! The answers that are being read from a replica, so that "enough" is heard before the call ends.
use moesaic_types::RequestId;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// Running calls by request; a call whose reader said "enough" has a heir that ends it in its place.
#[derive(Debug)]
pub(super) struct Answers<S> {
    heirs: Mutex<HashMap<RequestId, Option<oneshot::Sender<S>>>>,
}

impl<S> Default for Answers<S> {
    fn default() -> Self {
        Self { heirs: Mutex::default() }
    }
}

impl<S> Answers<S> {
    fn heirs(&self) -> MutexGuard<'_, HashMap<RequestId, Option<oneshot::Sender<S>>>> {
        self.heirs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a call.
    pub(super) fn enter(self: &Arc<Self>, id: RequestId, call: S) -> Answer<S> {
        self.heirs().insert(id.clone(), None);
        Answer { answers: Arc::clone(self), id, call: Some(call) }
    }

    /// Becomes the heir of a call; `None` where it does not run.
    pub(super) fn inherit(&self, id: &RequestId) -> Option<oneshot::Receiver<S>> {
        let (heir, inheritance) = oneshot::channel();
        self.heirs().get_mut(id)?.replace(heir);
        Some(inheritance)
    }
}

/// A call that is being read; on drop it goes to its heir, if it has one.
pub(super) struct Answer<S> {
    answers: Arc<Answers<S>>,
    id: RequestId,
    call: Option<S>,
}

impl<S> Answer<S> {
    pub(super) fn call(&mut self) -> &mut S {
        self.call.as_mut().expect("taken on drop only")
    }
}

impl<S> Drop for Answer<S> {
    fn drop(&mut self) {
        let heir = self.answers.heirs().remove(&self.id).flatten();
        if let (Some(heir), Some(call)) = (heir, self.call.take()) {
            // the heir is gone: then the call ends here
            let _ = heir.send(call);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_goes_to_its_heir_or_ends() {
        let answers = Arc::new(Answers::default());
        let (kept, ended, id) = (Arc::new(()), Arc::new(()), RequestId::new);
        let (a, b) = (answers.enter(id("a"), Arc::clone(&kept)), answers.enter(id("b"), Arc::clone(&ended)));
        let mut inheritance = answers.inherit(&id("a")).unwrap();
        drop((a, b));
        assert_eq!((Arc::strong_count(&kept), Arc::strong_count(&ended)), (2, 1));
        assert!(inheritance.try_recv().is_ok());
        assert!(answers.inherit(&id("a")).is_none(), "it does not run any longer");
    }
}
