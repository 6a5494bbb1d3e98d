//! The router behind its boundary: readiness, prefixes, failures.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)] // A test fails by panicking, in its helpers too.
mod fake;

use bytes::Bytes;
use fake::{Fake, config, id, request};
use moesaic_config::HumanDuration;
use moesaic_router::actors::replica_table::Status;
use moesaic_router::policy::Policy;
use moesaic_router::replica::TRANSIT;
use moesaic_router::{Config, Router};
use moesaic_testkit::until;
use moesaic_transport::MemoryBus;
use moesaic_transport::subjects::Subject;
use moesaic_types::boundary::{EventBus, KvEvent, PlaceRequest, Placed, Placer, ReplicaLoad};
use moesaic_types::{BlockHash, Digest, Error, ErrorCode};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

async fn publish(bus: &MemoryBus, replica: &str, event: KvEvent) {
    let payload = Bytes::from(serde_json::to_vec(&event).unwrap());
    bus.publish("life", &Subject::kv(replica).to_string(), payload).await.unwrap();
}

fn stored(blocks: &[u8]) -> KvEvent {
    KvEvent::Stored { blocks: blocks.iter().map(|number| BlockHash([*number; 16])).collect() }
}

/// Waits until the replica's load has been read by the table, and counts for what was placed before.
async fn polled(fake: &Fake) {
    let since = Instant::now();
    until("what was placed is counted", || async { since.elapsed() > TRANSIT }).await;
    let before = fake.polls.load(Ordering::SeqCst);
    until("two more polls", || async { fake.polls.load(Ordering::SeqCst) >= before + 2 }).await;
}

#[tokio::test]
async fn without_a_ready_replica_a_request_is_refused() {
    let router = Router::start(&config(), Arc::new(MemoryBus::new())).unwrap();
    let error = router.place(request(&[])).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable);
    assert!(error.retry_after.is_some());

    let fake = Fake::new(0);
    router.register(id("a"), fake.clone());
    let placed = router.place(request(&[])).await;
    assert_eq!(placed, Ok(Placed { replica: id("a"), overlap_blocks: 0 }), "before the first poll too");

    fake.set(Err(Error::unavailable("loading weights")));
    until("the replica is known to be not ready", || async { router.place(request(&[])).await.is_err() }).await;
    let error = router.place(request(&[])).await.unwrap_err();
    assert!(error.message.contains("loading weights"), "{error}");
    assert!(!router.replicas().await.unwrap()[0].ready);

    fake.set(Ok(ReplicaLoad::default()));
    until("the replica is back", || async { router.place(request(&[])).await.is_ok() }).await;
    assert!(router.deregister(&id("a")));
    assert_eq!(router.place(request(&[])).await.unwrap_err().code, ErrorCode::Unavailable);
}

#[tokio::test]
async fn a_look_at_readiness_places_nothing() {
    let config = Config { policy: Policy::RoundRobin, ..config() };
    let router = Router::start(&config, Arc::new(MemoryBus::new())).unwrap();
    assert_eq!(router.ready().await.unwrap_err().code, ErrorCode::Unavailable);
    router.register(id("a"), Fake::new(0));
    router.register(id("b"), Fake::new(0));
    let mut placed = Vec::new();
    for _ in 0..4 {
        assert_eq!(router.ready().await, Ok(vec![id("a"), id("b")]));
        placed.push(router.place(request(&[])).await.unwrap().replica);
    }
    assert!(placed[0] != placed[1] && placed[0] == placed[2] && placed[1] == placed[3], "{placed:?}");
    assert!(router.deregister(&id("a")));
    assert_eq!(router.ready().await, Ok(vec![id("b")]), "at once");
}

#[tokio::test]
async fn requests_go_where_their_prefix_is_unless_load_outweighs_it() {
    let bus = Arc::new(MemoryBus::new());
    let router = Router::start(&config(), bus.clone()).unwrap();
    let (a, b) = (Fake::new(0), Fake::new(0));
    router.register(id("a"), a.clone());
    router.register(id("b"), b.clone());
    let prompt = request(&[1, 2, 3, 4]);
    // The router subscribes in its own time: publish until it has heard.
    until("the index knows b's blocks", || async {
        publish(&bus, "b", stored(&[1, 2, 3])).await;
        router.place(prompt.clone()).await.unwrap() == Placed { replica: id("b"), overlap_blocks: 3 }
    })
    .await;
    polled(&b).await;
    assert_eq!(router.place(prompt.clone()).await.unwrap().replica, id("b"));
    b.set(Ok(ReplicaLoad { kv_blocks_used: 500, running: 40, ..ReplicaLoad::default() }));
    polled(&b).await;
    assert_eq!(router.place(prompt.clone()).await.unwrap().replica, id("a"));
    b.set(Ok(ReplicaLoad::default()));
    polled(&b).await;
    publish(&bus, "b", KvEvent::Evicted { blocks: vec![BlockHash([2; 16])] }).await;
    until("the index has heard of the eviction", || async {
        polled(&b).await;
        let mut only_b = prompt.clone();
        only_b.exclude = vec![id("a"), id("gone")];
        router.place(only_b).await.unwrap().overlap_blocks == 1
    })
    .await;
}

#[tokio::test]
async fn excluded_replicas_are_left_out_and_end_in_the_breaker() {
    let config = Config { breaker_failures: 2, breaker_pause: HumanDuration::from_secs(60), ..config() };
    let router = Router::start(&config, Arc::new(MemoryBus::new())).unwrap();
    let (a, b) = (Fake::new(0), Fake::new(30));
    router.register(id("a"), a.clone());
    router.register(id("b"), b.clone());
    polled(&b).await;
    let full_at_a = PlaceRequest { exclude: vec![id("a")], full: vec![id("a")], ..request(&[]) };
    for _ in 0..5 {
        assert_eq!(router.place(full_at_a.clone()).await.unwrap().replica, id("b"));
    }
    assert!(router.replicas().await.unwrap().iter().all(|status| status.ready), "to be full is no failure");
    let failed_at_a = PlaceRequest { exclude: vec![id("a")], ..request(&[]) };
    for _ in 0..2 {
        assert_eq!(router.place(failed_at_a.clone()).await.unwrap().replica, id("b"));
    }
    let statuses = router.replicas().await.unwrap();
    assert_eq!(
        statuses.iter().map(|status| (status.id.clone(), status.ready)).collect::<Vec<_>>(),
        [(id("a"), false), (id("b"), true)]
    );
    assert_eq!(router.place(request(&[])).await.unwrap().replica, id("b"), "a is left alone for a minute");
    let both = PlaceRequest { exclude: vec![id("a"), id("b")], ..request(&[]) };
    assert_eq!(router.place(both).await.unwrap_err().code, ErrorCode::Unavailable);
}

#[tokio::test]
async fn without_canaries_one_that_was_left_alone_is_back_after_its_pause() {
    let config = Config { breaker_failures: 1, breaker_pause: HumanDuration::from_millis(50), ..config() };
    let router = Router::start(&config, Arc::new(MemoryBus::new())).unwrap();
    let fake = Fake::new(0);
    router.register(id("a"), fake.clone());
    polled(&fake).await;
    let failed = PlaceRequest { exclude: vec![id("a")], ..request(&[]) };
    assert_eq!(router.place(failed).await.unwrap_err().code, ErrorCode::Unavailable);
    until("it takes requests again", || async { router.place(request(&[])).await.is_ok() }).await;
}

#[tokio::test]
async fn a_request_goes_where_its_model_is_served() {
    let router = Router::start(&config(), Arc::new(MemoryBus::new())).unwrap();
    let [old, new, gone] = [b"old".as_slice(), b"new", b"gone"].map(Digest::of);
    router.register_serving(id("old"), Fake::new(0), old);
    router.register_serving(id("new"), Fake::new(50), new);
    let of = |model| PlaceRequest { model: Some(model), ..request(&[]) };
    for (model, replica) in [(new, "new"), (old, "old"), (new, "new"), (new, "new")] {
        assert_eq!(router.place(of(model)).await.unwrap().replica, id(replica));
    }
    let refused = router.place(of(gone)).await.unwrap_err();
    assert!(refused.message.contains("2 known, 0 tried, 2 with another model"), "{refused}");
    router.register(id("any"), Fake::new(90));
    assert_eq!(router.place(of(gone)).await.unwrap().replica, id("any"));
}

#[tokio::test]
async fn a_prompt_goes_where_its_context_fits() {
    let router = Router::start(&config(), Arc::new(MemoryBus::new())).unwrap();
    let (small, large) = (Fake::new(0), Fake::new(50));
    large.set(Ok(ReplicaLoad { running: 50, kv_blocks_used: 900, max_context: 32_768, ..ReplicaLoad::default() }));
    router.register(id("small"), small.clone());
    router.register(id("large"), large.clone());
    polled(&small).await;
    polled(&large).await;
    let prompt = |prompt_tokens| PlaceRequest { prompt_tokens, ..request(&[]) };
    assert_eq!(router.place(prompt(100)).await.unwrap().replica, id("small"));
    assert_eq!(router.place(prompt(1000)).await.unwrap().replica, id("large"));
    assert!(router.place(prompt(100_000)).await.is_ok(), "the replica's own refusal names the limit");
}

#[tokio::test]
async fn a_burst_between_polls_spreads() {
    let config = Config { poll_interval: HumanDuration::from_secs(60), ..config() };
    let router = Router::start(&config, Arc::new(MemoryBus::new())).unwrap();
    let fakes: Vec<_> = (0..4).map(|_| Fake::new(0)).collect();
    for (number, fake) in fakes.iter().enumerate() {
        router.register(id(&number.to_string()), fake.clone());
    }
    // Each registration polls the new replica once; the next poll is a minute away.
    until("all replicas have answered", || async {
        router.replicas().await.unwrap().iter().filter(|status| status.load.is_some()).count() == 4
    })
    .await;
    let mut counts = [0; 4];
    for _ in 0..40 {
        let placed = router.place(request(&[])).await.unwrap();
        counts[placed.replica.0.parse::<usize>().unwrap()] += 1;
    }
    assert_eq!(counts, [10; 4]);
}

#[tokio::test]
async fn a_replica_whose_client_panics_fails_alone() {
    let router = Router::start(&config(), Arc::new(MemoryBus::new())).unwrap();
    let (sound, broken) = (Fake::new(0), Fake::new(0));
    router.register(id("sound"), sound.clone());
    polled(&sound).await;
    broken.panics.store(usize::MAX, Ordering::SeqCst);
    router.register(id("broken"), broken.clone());
    let is_failed =
        |statuses: &[Status]| matches!(&statuses[0].load, Some(Err(error)) if error.code == ErrorCode::Internal);
    until("it has failed", || async {
        let statuses = router.replicas().await.unwrap();
        assert_eq!(
            statuses.last().unwrap().load,
            Some(Ok(ReplicaLoad { max_context: 1000, ..ReplicaLoad::default() }))
        );
        statuses.len() == 2 && is_failed(&statuses)
    })
    .await;
    assert_eq!(router.place(request(&[])).await.unwrap().replica, id("sound"));
    broken.panics.store(0, Ordering::SeqCst);
    until("it is back", || async { router.replicas().await.unwrap().iter().all(|status| status.ready) }).await;
}

#[tokio::test]
async fn many_replicas_are_all_heard_again_and_again() {
    let router = Router::start(&config(), Arc::new(MemoryBus::new())).unwrap();
    let fakes: Vec<_> = (0..300).map(|_| Fake::new(0)).collect();
    for (number, fake) in fakes.iter().enumerate() {
        router.register(id(&number.to_string()), fake.clone());
    }
    for running in [3, 4] {
        let load = ReplicaLoad { running, ..ReplicaLoad::default() };
        fakes.iter().for_each(|fake| fake.set(Ok(load.clone())));
        until("all are heard", || async {
            let statuses = router.replicas().await.unwrap_or_default();
            statuses.len() == fakes.len() && statuses.iter().all(|status| status.load == Some(Ok(load.clone())))
        })
        .await;
    }
}
