//! The replicas that there are, whatever becomes of the actor.
use moesaic_types::boundary::Replica;
use moesaic_types::{Digest, ReplicaId};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A replica as it was registered.
#[derive(Clone)]
pub struct Registered {
    /// The replica.
    pub replica: Arc<dyn Replica>,
    /// The model that it serves, as it serves it; `None`: whatever is asked for.
    pub model: Option<Digest>,
}

/// The replicas by id, with a version that grows with each change.
#[derive(Clone, Default)]
pub struct Registrations(Arc<Shared>);

#[derive(Default)]
struct Shared {
    registered: Mutex<BTreeMap<ReplicaId, Registered>>,
    /// Changes while the lock is held.
    version: AtomicU64,
}

impl Registrations {
    fn registered(&self) -> MutexGuard<'_, BTreeMap<ReplicaId, Registered>> {
        self.0.registered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a replica, or replaces it.
    pub fn insert(&self, id: ReplicaId, replica: Registered) {
        let mut registered = self.registered();
        registered.insert(id, replica);
        self.0.version.fetch_add(1, Ordering::Release);
    }

    /// Takes a replica out; whether it was there.
    pub fn remove(&self, id: &ReplicaId) -> bool {
        let mut registered = self.registered();
        let was_there = registered.remove(id).is_some();
        self.0.version.fetch_add(1, Ordering::Release);
        was_there
    }

    /// A replica.
    pub fn get(&self, id: &ReplicaId) -> Option<Arc<dyn Replica>> {
        self.registered().get(id).map(|found| found.replica.clone())
    }

    /// All of them with their version, where that is another.
    pub(super) fn since(&self, version: u64) -> Option<(u64, BTreeMap<ReplicaId, Registered>)> {
        if self.0.version.load(Ordering::Acquire) == version {
            return None;
        }
        let registered = self.registered();
        Some((self.0.version.load(Ordering::Acquire), registered.clone()))
    }
}
