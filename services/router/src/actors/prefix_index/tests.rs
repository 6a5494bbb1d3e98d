//! What callers see of the index while its actor is busy.
use super::*;
use crate::actors::replica_table::Registered;
use futures::FutureExt;
use futures::future::BoxFuture;
use moesaic_testkit::until;
use moesaic_types::boundary::{DeltaStream, Replica, ReplicaLoad};
use moesaic_types::{BLOCK_TOKENS, Error, GenerateRequest, RequestId, Result};
use std::sync::mpsc as channel;

struct Nobody;

impl Replica for Nobody {
    fn generate(&self, _: GenerateRequest) -> BoxFuture<'_, Result<DeltaStream>> {
        async { Err(Error::internal("no test generates")) }.boxed()
    }

    fn load(&self) -> BoxFuture<'_, Result<ReplicaLoad>> {
        async { Err(Error::internal("no test asks")) }.boxed()
    }
}

/// Keeps the actor busy until the sender is gone.
#[derive(Message)]
#[rtype(result = "()")]
struct Busy(channel::Receiver<()>);

impl Handler<Busy> for IndexActor {
    type Result = ();

    fn handle(&mut self, Busy(until): Busy, _: &mut Context<Self>) {
        assert!(until.recv().is_err(), "nothing is sent");
    }
}

fn id() -> ReplicaId {
    ReplicaId::new("a")
}

fn request(blocks: &[u8]) -> Arc<PlaceRequest> {
    let hashes = blocks.iter().map(|number| BlockHash([*number; 16])).collect();
    Arc::new(PlaceRequest { blocks: hashes, ..PlaceRequest::new(RequestId::new("r"), blocks.len() * BLOCK_TOKENS, 1) })
}

fn stored(sequence: u64, blocks: &[u8]) -> Apply {
    let event = KvEvent::Stored { blocks: request(blocks).blocks.clone() };
    Apply { owner: Owner::Replica(id()), source: "life".into(), sequence, event }
}

fn stored_at(store: &str, sequence: u64, blocks: &[u8]) -> Apply {
    Apply { owner: Owner::Store(store.into(), Tier::Ram), ..stored(sequence, blocks) }
}

fn stores(ids: &[&str]) -> BTreeSet<Arc<str>> {
    ids.iter().map(|id| Arc::from(*id)).collect()
}

/// An index in which a replica has blocks 1, 2 and 3, and whose actor is busy, with a full mailbox.
async fn busy() -> (Index, Registrations, channel::Sender<()>) {
    let (registrations, (questions, _)) = (Registrations::default(), mpsc::channel(1));
    registrations.insert(id(), Registered { replica: Arc::new(Nobody), model: None });
    let index = Index::start(100, 4, registrations.clone(), questions);
    index.actor().try_tell(stored(1, &[1, 2, 3])).ok().unwrap();
    until("it has heard", || async { index.entries() == Some(3) }).await;
    let (done, until) = channel::channel();
    index.actor().try_tell(Busy(until)).ok().unwrap();
    let mut sequence = 2;
    while index.actor().try_tell(stored(sequence, &[sequence as u8 + 2])).is_ok() {
        sequence += 1;
    }
    (index, registrations, done)
}

/// Answered once all messages before it were taken.
#[derive(Message)]
#[rtype(result = "()")]
struct Reached;

impl Handler<Reached> for IndexActor {
    type Result = ();

    fn handle(&mut self, Reached: Reached, _: &mut Context<Self>) {}
}

#[tokio::test]
async fn lookups_do_not_wait_behind_events() {
    let (index, _registrations, done) = busy().await;
    let prompt = request(&[1, 2, 3, 4]);
    assert_eq!(index.prefixes(&prompt).local(&id()), 3);
    drop(done);
    until("the events are applied", || async { index.prefixes(&prompt).local(&id()) == 4 }).await;
}

#[tokio::test]
async fn who_leaves_while_the_mailbox_is_full_is_forgotten() {
    let (index, registrations, done) = busy().await;
    assert!(registrations.remove(&id()));
    index.forget(Owner::Replica(id()));
    drop(done);
    let prompt = request(&[1, 2, 3, 4]);
    until("it is forgotten", || async { index.prefixes(&prompt).local(&id()) == 0 }).await;
    // those that waited in the mailbox bring nothing back
    let asked = || index.actor().ask(Reached, Duration::from_secs(5));
    until("they are read", || async { asked().await.is_ok() }).await;
    assert!((4..10).all(|block| index.prefixes(&request(&[block])).local(&id()) == 0));
}

#[tokio::test]
async fn a_new_life_begins_with_an_empty_index() {
    let (index, _registrations, done) = busy().await;
    done.send(()).unwrap();
    until("it is back", || async { index.actor().restarts() == 1 && index.entries() == Some(0) }).await;
    index.actor().ask(Reached, Duration::from_secs(5)).await.unwrap();
    assert_eq!(index.prefixes(&request(&[1])).local(&id()), 0);
    index.actor().try_tell(stored(40, &[1])).ok().unwrap();
    until("it hears again", || async { index.prefixes(&request(&[1])).local(&id()) == 1 }).await;
}

#[tokio::test]
async fn a_store_that_left_leaves_nothing_and_one_that_came_is_asked() {
    let (questions, mut asked) = mpsc::channel(4);
    let index = Index::start(100, 8, Registrations::default(), questions);
    let tell = |apply| index.actor().try_tell(apply).ok().unwrap();
    let in_ram = |block: u8| index.prefixes(&request(&[block])).known(&id()).ram;
    let reached = || async { index.actor().ask(Reached, Duration::from_secs(5)).await.unwrap() };
    tell(stored_at("k0", 1, &[1]));
    tell(stored_at("gone", 1, &[2]));
    reached().await;
    assert_eq!((in_ram(1), in_ram(2)), (1, 1), "nobody told yet which there are");

    index.set_stores(stores(&["k0"]));
    // it waited in the mailbox, or on the bus
    tell(stored_at("gone", 2, &[3]));
    reached().await;
    assert_eq!((in_ram(1), in_ram(2), in_ram(3)), (1, 0, 0));
    assert_eq!(asked.try_recv().unwrap(), Subject::kv_anew(Service::KvStore, "k0"));
    assert!(asked.try_recv().is_err(), "once for both tiers");

    index.set_stores(stores(&["k0", "gone"]));
    reached().await;
    assert_eq!(asked.try_recv().unwrap(), Subject::kv_anew(Service::KvStore, "gone"));
    tell(stored_at("gone", 7, &[4]));
    reached().await;
    assert_eq!((in_ram(1), in_ram(4)), (1, 1), "it is heard again");
    index.set_stores(stores(&[]));
    reached().await;
    assert_eq!(
        (index.entries(), asked.try_recv().is_err()),
        (Some(2), true),
        "those are dead, and looked up no longer"
    );
    assert_eq!((in_ram(1), in_ram(4)), (0, 0));
}
