//! Owns the prefix index. A restart begins empty: with the next event of each replica and kv-store it is asked to say
//! everything anew.
use crate::index::{Applied, Owner, PrefixIndex};
use crate::metrics;
use crate::prefixes::Prefixes;
use actix::{Actor, Context, Handler, Message, MessageResult};
use moesaic_transport::kv::Tier;
use moesaic_transport::subjects::Subject;
use moesaic_types::ReplicaId;
use moesaic_types::boundary::{Event, KvEvent, PlaceRequest};
use moesaic_types::cluster::Service;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// An owner is asked to say everything anew no more often than this.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// Owners that are asked within that time: what all of them say at once would be lost again.
const ASKED_AT_ONCE: usize = 16;

/// The actor's state.
pub struct IndexActor {
    index: PrefixIndex,
    /// To the owners, who say everything anew then.
    questions: mpsc::Sender<Subject>,
    /// Owners of which not everything is known.
    incomplete: HashSet<Owner>,
    /// When each was asked.
    asked: HashMap<Subject, Instant>,
}

impl IndexActor {
    /// An empty index of at most `max_entries`. Owners whose events were lost are asked through `questions`.
    pub fn new(max_entries: usize, questions: mpsc::Sender<Subject>) -> Self {
        metrics::index_entries(0);
        Self { index: PrefixIndex::new(max_entries), questions, incomplete: HashSet::new(), asked: HashMap::new() }
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
pub struct Apply(
    /// As it came from the bus; events that are not of the KV plane, or broken, are ignored.
    pub Event,
);

impl Handler<Apply> for IndexActor {
    type Result = ();

    fn handle(&mut self, Apply(event): Apply, _: &mut Context<Self>) {
        let Some(owner) = Subject::parse(&event.subject).as_ref().and_then(owner) else { return };
        let kv: KvEvent = match serde_json::from_slice(&event.payload) {
            Ok(kv) => kv,
            Err(error) => {
                // Not counted as seen: the next event shows a gap, and the replica is cleared.
                tracing::warn!(subject = %event.subject, %error, "read kv event");
                return;
            }
        };
        let applied = self.index.apply(&owner, &event.source, event.sequence, &kv);
        if applied == Applied::AfterGap {
            metrics::event_gap();
            tracing::debug!(?owner, sequence = event.sequence, "kv events were lost");
        }
        match applied {
            Applied::AfterGap | Applied::Late => drop(self.incomplete.insert(owner.clone())),
            Applied::InOrder if kv == KvEvent::Cleared => drop(self.incomplete.remove(&owner)),
            Applied::InOrder | Applied::Stale => {}
        }
        if self.incomplete.contains(&owner) {
            self.ask_anew(&owner);
        }
        metrics::index_entries(self.index.len());
    }
}

/// Forgets an owner.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Forget(
    /// The owner.
    pub Owner,
);

impl Handler<Forget> for IndexActor {
    type Result = ();

    fn handle(&mut self, Forget(owner): Forget, _: &mut Context<Self>) {
        self.incomplete.remove(&owner);
        self.index.forget(&owner);
    }
}

/// Who has how much of a request's prompt.
#[derive(Message)]
#[rtype(result = "Prefixes")]
pub struct Overlap(
    /// The request.
    pub Arc<PlaceRequest>,
);

impl Handler<Overlap> for IndexActor {
    type Result = MessageResult<Overlap>;

    fn handle(&mut self, Overlap(request): Overlap, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.index.prefixes(&request.blocks))
    }
}

/// How many entries there are.
#[derive(Message)]
#[rtype(result = "usize")]
pub struct Size;

impl Handler<Size> for IndexActor {
    type Result = usize;

    fn handle(&mut self, _: Size, _: &mut Context<Self>) -> usize {
        self.index.len()
    }
}
