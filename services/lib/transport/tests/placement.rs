//! The placement's record and those who follow it: over memory, over real Redis and NATS, and while those die.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use moesaic_testkit::{servers, soon, until};
use moesaic_transport::placement::{self, Follower, Standing};
use moesaic_transport::{MemoryBus, MemoryMetadata, Nats, NatsBus, RedisMetadata};
use moesaic_types::boundary::{EventBus, Metadata};
use moesaic_types::cluster::Placement;
use moesaic_types::{Digest, ErrorCode};
use std::collections::BTreeMap;
use std::sync::Arc;

struct Ground {
    metadata: Arc<dyn Metadata>,
    events: Arc<dyn EventBus>,
}

impl Ground {
    fn memory() -> Self {
        Self { metadata: Arc::new(MemoryMetadata::new()), events: Arc::new(MemoryBus::new()) }
    }

    async fn real(redis: &servers::Server, nats: &servers::Server) -> Self {
        let metadata = Arc::new(RedisMetadata::connect(&redis.url(), "test").unwrap());
        let nats = Nats::connect(&nats.url(), "test").await.unwrap();
        assert!(nats.connected(moesaic_testkit::DEADLINE).await);
        Self { metadata, events: Arc::new(NatsBus::new(nats)) }
    }

    fn follow(&self) -> Follower {
        placement::follow(self.metadata.clone(), self.events.clone(), model())
    }

    async fn read(&self) -> Option<Standing> {
        placement::read(&*self.metadata, &model()).await.unwrap()
    }

    async fn publish(&self, epoch: u64, expected: Option<u64>) -> Option<u64> {
        placement::publish(&*self.metadata, &*self.events, "r0.1", &at(epoch), expected).await.unwrap()
    }
}

fn model() -> Digest {
    Digest::of(b"a model")
}

fn at(epoch: u64) -> Placement {
    let layers = BTreeMap::from([(1, vec![vec![0], vec![0, 1], vec![1]])]);
    Placement { epoch, model: model(), groups: 2, layers }
}

async fn follows(follower: &Follower, epoch: u64) {
    let mut watch = follower.watch();
    let fits = |placement: &Option<Arc<Placement>>| placement.as_ref().is_some_and(|found| **found == at(epoch));
    soon(&format!("epoch {epoch} is followed"), watch.wait_for(fits)).await.unwrap();
}

async fn suite(ground: &Ground) {
    let early = ground.follow();
    assert_eq!(early.placement(), None);
    assert_eq!(ground.read().await, None);
    let first = ground.publish(1, None).await.unwrap();
    follows(&early, 1).await;
    assert_eq!(ground.read().await, Some(Standing { placement: Some(at(1)), version: first }));
    let late = ground.follow();
    follows(&late, 1).await;
    assert_eq!(ground.publish(2, None).await, None, "there is one");
    let second = ground.publish(2, Some(first)).await.unwrap();
    assert_eq!(ground.publish(3, Some(first)).await, None, "a deposed leader writes nothing");
    for follower in [&early, &late] {
        follows(follower, 2).await;
    }

    // another version of us, or another model's
    let foreign = Placement { model: Digest::of(b"another"), ..at(9) };
    let incomplete = Placement { groups: 1, ..at(9) };
    let mut version = second;
    for bytes in [b"{}".to_vec(), serde_json::to_vec(&foreign).unwrap(), serde_json::to_vec(&incomplete).unwrap()] {
        let key = placement::key(&model());
        version = ground.metadata.compare_and_set(&key, Some(version), bytes.into(), None).await.unwrap().unwrap();
        assert_eq!(ground.read().await, Some(Standing { placement: None, version }));
    }
    ground.publish(3, Some(version)).await.unwrap();
    for follower in [&early, &late] {
        follows(follower, 3).await;
    }
}

#[tokio::test]
async fn over_memory() {
    suite(&Ground::memory()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_redis_and_nats() {
    let (redis, nats) = (servers::redis(), servers::nats());
    suite(&Ground::real(&redis, &nats).await).await;
}

#[tokio::test(start_paused = true)]
async fn an_event_makes_it_known_at_once() {
    let ground = Ground::memory();
    let follower = ground.follow();
    let first = ground.publish(1, None).await;
    follows(&follower, 1).await;
    let start = tokio::time::Instant::now();
    ground.publish(2, first).await.unwrap();
    follows(&follower, 2).await;
    assert_eq!(start.elapsed(), std::time::Duration::ZERO, "nobody waited for a clock");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_redis_the_last_one_is_kept_and_an_empty_one_is_written_again() {
    let (mut redis, mut nats) = (servers::redis(), servers::nats());
    let ground = Ground::real(&redis, &nats).await;
    let follower = ground.follow();
    let before = ground.publish(7, None).await.unwrap();
    follows(&follower, 7).await;
    redis.kill();
    until("it is gone", || async { placement::read(&*ground.metadata, &model()).await.is_err() }).await;
    let refused = placement::publish(&*ground.metadata, &*ground.events, "r0.1", &at(8), Some(before)).await;
    assert_eq!(refused.unwrap_err().code, ErrorCode::Unavailable);
    assert_eq!(follower.placement().as_deref(), Some(&at(7)));
    redis.restart_empty();
    until("it is back", || async { placement::read(&*ground.metadata, &model()).await == Ok(None) }).await;
    assert_eq!(follower.placement().as_deref(), Some(&at(7)));
    assert_eq!(ground.publish(8, Some(before)).await, None, "what was known of the old one counts no longer");
    // everyone who knew the epochs may be gone
    let again = ground.publish(1, None).await.unwrap();
    assert!(again > before);
    follows(&follower, 1).await;
    // without events it is read all the same
    nats.kill();
    ground.publish(2, Some(again)).await.unwrap();
    follows(&follower, 2).await;
}
