//! Owns the prefix index. A restart begins empty: with the next event of each replica and kv-store it is asked to say
//! everything anew.
//!
//! The actor alone changes the index, by events, a few blocks at a time; lookups read it in between, and do not wait
//! behind events.
mod stores;
#[cfg(test)]
mod tests;

use super::replica_table::Registrations;
use crate::index::{Applied, Found, Owner, PrefixIndex};
use crate::metrics;
use crate::prefixes::Prefixes;
use actix::{Actor, Context, Handler, Message};
use moesaic_actors::{Handle, Supervised};
use moesaic_transport::kv::Tier;
use moesaic_transport::subjects::Subject;
use moesaic_types::boundary::{Event, KvEvent, PlaceRequest};
use moesaic_types::cluster::Service;
use moesaic_types::{BlockHash, ReplicaId};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};
use stores::Stores;
use tokio::sync::mpsc;

/// An owner is asked to say everything anew no more often than this.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// Owners that are asked within that time: what all of them say at once would be lost again.
const ASKED_AT_ONCE: usize = 16;

/// Blocks that are stored or evicted before lookups have their turn.
const PART: usize = 64;

/// How often the actor lets others go first between two parts.
const TURNS: usize = 4;

/// What callers hold of the index.
#[derive(Clone)]
pub struct Index {
    actor: Handle<IndexActor>,
    shared: Arc<Shared>,
}

/// What lookups read.
struct Shared {
    max_entries: usize,
    index: RwLock<PrefixIndex>,
    /// Lookups that wait for the index.
    waiting: AtomicUsize,
    /// Owners that are to be forgotten before anything else is done: a full mailbox loses none of them.
    leaving: Mutex<BTreeSet<Owner>>,
    stores: Stores,
}

impl Index {
    /// Starts an empty index of at most `max_entries`. Of the replicas only registered ones are in it. Owners whose
    /// events were lost are asked through `questions`.
    pub fn start(
        max_entries: usize,
        mailbox: usize,
        registrations: Registrations,
        questions: mpsc::Sender<Subject>,
    ) -> Self {
        let shared = Arc::new(Shared {
            max_entries,
            index: RwLock::new(PrefixIndex::new(max_entries)),
            waiting: AtomicUsize::new(0),
            leaving: Mutex::default(),
            stores: Stores::default(),
        });
        let of_actor = Arc::clone(&shared);
        let new = move || IndexActor::new(Arc::clone(&of_actor), registrations.clone(), questions.clone());
        Self { actor: Supervised::spawn("prefix_index", mailbox, new), shared }
    }

    /// The actor, which takes events.
    pub fn actor(&self) -> &Handle<IndexActor> {
        &self.actor
    }

    /// Who has how much of a request's prompt.
    pub fn prefixes(&self, request: &Arc<PlaceRequest>) -> Prefixes {
        let Found { prefixes, to_mark } = self.shared.read(|index| index.find(&request.blocks)).unwrap_or_default();
        if let Some(blocks) = to_mark {
            // where this is lost, the next lookup tells it
            let _ = self.actor.try_tell(Mark { request: Arc::clone(request), blocks });
        }
        prefixes
    }

    /// Forgets an owner.
    pub fn forget(&self, owner: Owner) {
        self.shared.leaving().insert(owner);
        // a mailbox that is full wakes it too
        let _ = self.actor.try_tell(Forget);
    }

    /// These kv-stores there are from now on. Others are forgotten and no longer heard, whatever of them still waits; those
    /// that are new are asked to say everything. Before the first call all are heard.
    pub fn set_stores(&self, ids: BTreeSet<Arc<str>>) {
        // first: no event comes after its store was forgotten
        self.shared.stores.set(ids);
        let known = self.shared.read(PrefixIndex::stores).unwrap_or_default();
        self.shared.leaving().extend(known.into_iter().filter(|owner| !self.shared.is_heard(owner)));
        // a mailbox that is full wakes it too
        let _ = self.actor.try_tell(Forget);
    }

    /// Entries: a block at an owner each; `None` while the actor restarts.
    pub fn entries(&self) -> Option<usize> {
        self.shared.read(PrefixIndex::len)
    }
}

impl Shared {
    /// Reads the index; `None` while it is broken, until the actor is back with a new one.
    fn read<T>(&self, look: impl FnOnce(&PrefixIndex) -> T) -> Option<T> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let index = self.index.read();
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        index.ok().map(|index| look(&index))
    }

    /// Changes the index. Only the actor does.
    fn write<T>(&self, change: impl FnOnce(&mut PrefixIndex) -> T) -> T {
        for _ in 0..TURNS {
            if self.waiting.load(Ordering::Relaxed) == 0 {
                break;
            }
            std::thread::yield_now();
        }
        change(&mut self.index.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether a kv-store's events count.
    fn is_heard(&self, owner: &Owner) -> bool {
        !matches!(owner, Owner::Store(id, _) if !self.stores.is_heard(id))
    }

    fn leaving(&self) -> MutexGuard<'_, BTreeSet<Owner>> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The actor's state.
pub struct IndexActor {
    shared: Arc<Shared>,
    registrations: Registrations,
    /// To the owners, who say everything anew then.
    questions: mpsc::Sender<Subject>,
    /// Owners of which not everything is known.
    incomplete: HashSet<Owner>,
    /// When each was asked.
    asked: HashMap<Subject, Instant>,
}

impl IndexActor {
    /// Fresh state, with an empty index.
    fn new(shared: Arc<Shared>, registrations: Registrations, questions: mpsc::Sender<Subject>) -> Self {
        metrics::index_entries(0);
        // whatever a life before this one left
        shared.write(|index| *index = PrefixIndex::new(shared.max_entries));
        shared.index.clear_poison();
        Self { shared, registrations, questions, incomplete: HashSet::new(), asked: HashMap::new() }
    }

    /// Asks an owner to say everything anew, if it is its turn; otherwise with its next event.
    fn ask_anew(&mut self, owner: &Owner) {
        let now = Instant::now();
        self.asked.retain(|_, at| now.saturating_duration_since(*at) < ASK_AGAIN);
        let question = match owner {
            Owner::Replica(id) => Subject::kv_anew(Service::Scheduler, &id.0),
            Owner::Store(id, _) => Subject::kv_anew(Service::KvStore, id),
        };
        let is_turn = self.asked.len() < ASKED_AT_ONCE && !self.asked.contains_key(&question);
        if is_turn && self.questions.try_send(question.clone()).is_ok() {
            self.asked.insert(question, now);
        }
    }

    /// Forgets those who left, and asks those who came.
    fn catch_up(&mut self) {
        for owner in std::mem::take(&mut *self.shared.leaving()) {
            self.incomplete.remove(&owner);
            self.shared.write(|index| index.forget(&owner));
        }
        for id in self.shared.stores.take_new() {
            // what it said before was not heard
            for owner in [Tier::Ram, Tier::Disk].map(|tier| Owner::Store(Arc::clone(&id), tier)) {
                self.ask_anew(&owner);
                self.incomplete.insert(owner);
            }
        }
    }

    /// Whether an owner's events count: not those of a replica that drains, to which nothing goes any longer, nor of a
    /// kv-store that left.
    fn is_heard(&self, owner: &Owner) -> bool {
        match owner {
            Owner::Replica(id) => self.registrations.get(id).is_some(),
            Owner::Store(..) => self.shared.is_heard(owner),
        }
    }

    /// Applies an event in parts.
    fn apply(&self, Apply { owner, source, sequence, event }: &Apply) -> Applied {
        let (applied, life) = self.shared.write(|index| index.begin(owner, source, *sequence, event));
        let Some(life) = life else { return applied };
        match event {
            // a chain's end goes first into the index, as it leaves it
            KvEvent::Stored { blocks } => blocks.rchunks(PART).for_each(|part| self.change(|i| i.store(life, part))),
            KvEvent::Evicted { blocks } => blocks.chunks(PART).for_each(|part| self.change(|i| i.evict(life, part))),
            KvEvent::Cleared => {}
        }
        applied
    }

    fn change(&self, change: impl FnOnce(&mut PrefixIndex)) {
        self.shared.write(change);
    }
}

/// Whose events a subject has; `None` where they are no KV events.
fn owner(subject: &Subject) -> Option<Owner> {
    let is_of = |service: Service| subject.service == service.name();
    match &*subject.event {
        "blocks" if is_of(Service::Scheduler) => Some(Owner::Replica(ReplicaId::new(&*subject.instance))),
        "ram" if is_of(Service::KvStore) => Some(Owner::Store((&*subject.instance).into(), Tier::Ram)),
        "disk" if is_of(Service::KvStore) => Some(Owner::Store((&*subject.instance).into(), Tier::Disk)),
        _ => None,
    }
}

impl Actor for IndexActor {
    type Context = Context<Self>;
}

/// An event of a replica's KV pool, or of a kv-store.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Apply {
    owner: Owner,
    source: Arc<str>,
    sequence: u64,
    event: KvEvent,
}

impl Apply {
    /// Reads an event as it came from the bus; `None` for those that are not of the KV plane, or broken. It takes a
    /// while: the actor has better things to do.
    pub fn read(event: &Event) -> Option<Self> {
        let owner = owner(&Subject::parse(&event.subject)?)?;
        match serde_json::from_slice(&event.payload) {
            Ok(kv) => Some(Self { owner, source: Arc::clone(&event.source), sequence: event.sequence, event: kv }),
            Err(error) => {
                // Not counted as seen: the next event shows a gap, and the replica is cleared.
                tracing::warn!(subject = %event.subject, %error, "read kv event");
                None
            }
        }
    }
}

impl Handler<Apply> for IndexActor {
    type Result = ();

    fn handle(&mut self, message: Apply, _: &mut Context<Self>) {
        self.catch_up();
        let Apply { owner, sequence, event, .. } = &message;
        if !self.is_heard(owner) {
            return;
        }
        let applied = self.apply(&message);
        if applied == Applied::AfterGap {
            metrics::event_gap();
            tracing::debug!(?owner, sequence, "kv events were lost");
        }
        match applied {
            Applied::AfterGap | Applied::Late => drop(self.incomplete.insert(owner.clone())),
            Applied::InOrder if *event == KvEvent::Cleared => drop(self.incomplete.remove(owner)),
            Applied::InOrder | Applied::Stale => {}
        }
        if self.incomplete.contains(owner) {
            self.ask_anew(owner);
        }
        metrics::index_entries(self.shared.read(PrefixIndex::len).unwrap_or(0));
    }
}

/// There are owners to forget, or to ask.
#[derive(Message)]
#[rtype(result = "()")]
struct Forget;

impl Handler<Forget> for IndexActor {
    type Result = ();

    fn handle(&mut self, _: Forget, _: &mut Context<Self>) {
        self.catch_up();
    }
}

/// A request's first blocks are in use.
#[derive(Message)]
#[rtype(result = "()")]
struct Mark {
    request: Arc<PlaceRequest>,
    blocks: usize,
}

impl Handler<Mark> for IndexActor {
    type Result = ();

    fn handle(&mut self, Mark { request, blocks }: Mark, _: &mut Context<Self>) {
        self.catch_up();
        let blocks: &[BlockHash] = &request.blocks[..blocks.min(request.blocks.len())];
        self.shared.read(|index| index.mark(blocks));
    }
}
