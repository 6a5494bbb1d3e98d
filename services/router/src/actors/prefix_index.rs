//! Owns the prefix index. A restart begins empty: it fills again with the replicas' next events.
use crate::index::{Applied, PrefixIndex};
use crate::metrics;
use actix::{Actor, Context, Handler, Message, MessageResult};
use moesaic_transport::subjects::Subject;
use moesaic_types::boundary::{Event, KvEvent};
use moesaic_types::{BlockHash, ReplicaId};
use std::collections::HashMap;

/// The actor's state.
pub struct IndexActor {
    index: PrefixIndex,
}

impl IndexActor {
    /// An empty index of at most `max_entries`.
    pub fn new(max_entries: usize) -> Self {
        metrics::index_entries(0);
        Self { index: PrefixIndex::new(max_entries) }
    }
}

impl Actor for IndexActor {
    type Context = Context<Self>;
}

/// An event of a replica's KV pool.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Apply(
    /// As it came from the bus; events that are not of the KV plane, or broken, are ignored.
    pub Event,
);

impl Handler<Apply> for IndexActor {
    type Result = ();

    fn handle(&mut self, Apply(event): Apply, _: &mut Context<Self>) {
        let Some(subject) = Subject::parse(&event.subject) else { return };
        let kv: KvEvent = match serde_json::from_slice(&event.payload) {
            Ok(kv) => kv,
            Err(error) => {
                // Not counted as seen: the next event shows a gap, and the replica is cleared.
                tracing::warn!(subject = %event.subject, %error, "read kv event");
                return;
            }
        };
        let replica = ReplicaId::new(subject.instance);
        if self.index.apply(&replica, &event.source, event.sequence, &kv) == Applied::AfterGap {
            metrics::event_gap();
            tracing::debug!(%replica, sequence = event.sequence, "kv events were lost");
        }
        metrics::index_entries(self.index.len());
    }
}

/// Forgets a replica.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Forget(
    /// The replica.
    pub ReplicaId,
);

impl Handler<Forget> for IndexActor {
    type Result = ();

    fn handle(&mut self, Forget(replica): Forget, _: &mut Context<Self>) {
        self.index.forget(&replica);
    }
}

/// How many blocks of a chain, from its start, each replica has.
#[derive(Message)]
#[rtype(result = "HashMap<ReplicaId, usize>")]
pub struct Overlap(
    /// The chain.
    pub Vec<BlockHash>,
);

impl Handler<Overlap> for IndexActor {
    type Result = MessageResult<Overlap>;

    fn handle(&mut self, Overlap(chain): Overlap, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.index.overlap(&chain))
    }
}
