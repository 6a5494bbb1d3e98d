//! The line of requests that wait for a replica with room, behind the router's boundary.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)] // A test fails by panicking, in its helpers too.
mod fake;

use bytes::Bytes;
use fake::{Fake, config, id, request};
use moesaic_config::HumanDuration;
use moesaic_router::replica::TRANSIT;
use moesaic_router::{Config, Router};
use moesaic_testkit::{soon, until};
use moesaic_transport::MemoryBus;
use moesaic_transport::subjects::Subject;
use moesaic_types::boundary::{EventBus, KvEvent, PlaceRequest, Placed, Placer, ReplicaLoad};
use moesaic_types::{BlockHash, ErrorCode, Priority, ReplicaId, Result, TenantId};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

const AHEAD: usize = 2;

fn full() -> ReplicaLoad {
    ReplicaLoad { running: 4, waiting: AHEAD, max_running: 4, ..ReplicaLoad::default() }
}

fn with_room(requests: usize) -> ReplicaLoad {
    ReplicaLoad { waiting: AHEAD - requests, ..full() }
}

/// A router that hears loads by events alone, after the first.
struct Cluster {
    bus: Arc<MemoryBus>,
    router: Arc<Router>,
}

impl Cluster {
    /// With replicas that are full.
    async fn full(config: Config, replicas: &[&str]) -> Self {
        let bus = Arc::new(MemoryBus::new());
        let router = Router::start(&config, bus.clone()).unwrap();
        for name in replicas {
            router.register(id(name), Fake::with(Ok(full())));
        }
        let this = Self { bus, router };
        until("all replicas have answered", || async {
            this.router.replicas().await.unwrap().iter().all(|status| status.load.is_some())
        })
        .await;
        this
    }

    /// A request that stands in line.
    async fn wait(&self, request: PlaceRequest) -> JoinHandle<Result<Placed>> {
        let before = self.router.waiting().await.unwrap();
        let router = Arc::clone(&self.router);
        let waiting = tokio::spawn(async move { router.place(request).await });
        until("it stands in line", || async { self.router.waiting().await.unwrap() == before + 1 }).await;
        waiting
    }

    async fn tell(&self, replica: &str, load: &ReplicaLoad) {
        let payload = Bytes::from(serde_json::to_vec(load).unwrap());
        self.bus.publish("life", &Subject::load(replica).to_string(), payload).await.unwrap();
    }
}

/// Loads are polled once a minute: what happens before is by events.
fn quiet() -> Config {
    Config { poll_interval: HumanDuration::from_secs(60), queue_ahead: AHEAD, ..config() }
}

/// Those who wait are looked after often.
fn busy() -> Config {
    Config { queue_ahead: AHEAD, ..config() }
}

async fn placed(waiting: JoinHandle<Result<Placed>>) -> Result<Placed> {
    soon("an answer", waiting).await.unwrap()
}

#[tokio::test]
async fn a_request_waits_until_a_replica_says_that_it_has_room_and_goes_there() {
    let cluster = Cluster::full(quiet(), &["a", "b"]).await;
    let waiting = cluster.wait(request(&[])).await;
    cluster.tell("a", &full()).await;
    cluster.tell("b", &with_room(1)).await;
    assert_eq!(placed(waiting).await.unwrap().replica, id("b"));
    assert_eq!(cluster.router.waiting().await, Ok(0));
    // the room is taken, until the replica says otherwise
    let waiting = cluster.wait(request(&[])).await;
    cluster.tell("a", &with_room(1)).await;
    assert_eq!(placed(waiting).await.unwrap().replica, id("a"));
}

#[tokio::test]
async fn room_is_given_by_priority_then_to_each_tenant_in_turn() {
    let cluster = Cluster::full(quiet(), &["a"]).await;
    let of = |tenant: u8, priority: i32| PlaceRequest {
        tenant: TenantId([tenant; 16]),
        priority: Priority(priority),
        ..request(&[])
    };
    let mut waiting = Vec::new();
    for (name, asked) in [
        ("batch", of(9, -100)),
        ("flood 1", of(1, 0)),
        ("flood 2", of(1, 0)),
        ("flood 3", of(1, 0)),
        ("other", of(2, 0)),
        ("urgent", of(3, 5)),
    ] {
        waiting.push((name, cluster.wait(asked).await));
    }
    let mut order = Vec::new();
    while !waiting.is_empty() {
        cluster.tell("a", &with_room(1)).await;
        until("one is placed", || async { waiting.iter().any(|(_, task)| task.is_finished()) }).await;
        let at = waiting.iter().position(|(_, task)| task.is_finished()).unwrap();
        let (name, task) = waiting.remove(at);
        assert_eq!(placed(task).await.unwrap().replica, id("a"));
        order.push(name);
        // what was placed is counted in the next load that says so
        let since = Instant::now();
        until("its time of transit is over", || async { since.elapsed() > TRANSIT }).await;
    }
    assert_eq!(order, ["urgent", "flood 1", "other", "flood 2", "flood 3", "batch"]);
}

#[tokio::test]
async fn a_prefix_counts_as_it_is_when_the_request_is_placed() {
    let cluster = Cluster::full(quiet(), &["a", "b"]).await;
    let waiting = cluster.wait(request(&[1, 2, 3])).await;
    let blocks = [1, 2, 3].map(|number| BlockHash([number; 16])).to_vec();
    let stored = Bytes::from(serde_json::to_vec(&KvEvent::Stored { blocks }).unwrap());
    cluster.bus.publish("life", &Subject::kv("b").to_string(), stored).await.unwrap();
    until("the index has heard", || async { cluster.router.indexed().await == Ok(3) }).await;
    cluster.tell("b", &with_room(1)).await;
    assert_eq!(placed(waiting).await, Ok(Placed { replica: id("b"), overlap_blocks: 3 }));
}

#[tokio::test]
async fn who_goes_away_leaves_the_line_and_a_full_line_says_when_to_come_again() {
    let cluster = Cluster::full(Config { queue_capacity: 2, ..busy() }, &["a"]).await;
    let (first, second) = (cluster.wait(request(&[])).await, cluster.wait(request(&[])).await);
    let refused = cluster.router.place(request(&[])).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::ResourceExhausted);
    assert!(refused.retry_after.is_some_and(|after| after >= Duration::from_secs(1)), "{refused:?}");
    first.abort();
    until("it left", || async { cluster.router.waiting().await == Ok(1) }).await;
    let third = cluster.wait(request(&[])).await;
    second.abort();
    third.abort();
    until("the line is empty", || async { cluster.router.waiting().await == Ok(0) }).await;
}

#[tokio::test]
async fn a_tenant_that_fills_the_line_keeps_nobody_out_of_it() {
    const LINE: usize = 6;
    let cluster = Cluster::full(Config { queue_capacity: LINE, ..quiet() }, &["a"]).await;
    let of = |tenant: u8, priority: i32| PlaceRequest {
        tenant: TenantId([tenant; 16]),
        priority: Priority(priority),
        ..request(&[])
    };
    let mut flood = Vec::new();
    for number in 0..2 * LINE {
        if number < LINE {
            flood.push(cluster.wait(of(1, 0)).await);
        } else {
            let refused = soon("a refusal", cluster.router.place(of(1, 0))).await.unwrap_err();
            assert_eq!(refused.code, ErrorCode::ResourceExhausted);
        }
    }
    let enters = |asked: PlaceRequest| {
        let router = Arc::clone(&cluster.router);
        tokio::spawn(async move { router.place(asked).await })
    };
    let gives_way = async |displaced: JoinHandle<Result<Placed>>| {
        let displaced = placed(displaced).await.unwrap_err();
        assert_eq!(displaced.code, ErrorCode::ResourceExhausted);
        assert!(displaced.retry_after.is_some_and(|after| after >= Duration::from_secs(1)), "{displaced:?}");
        assert_eq!(cluster.router.waiting().await, Ok(LINE));
    };
    let other = enters(of(2, 0));
    gives_way(flood.pop().unwrap()).await;
    let urgent = enters(of(1, 5));
    gives_way(flood.pop().unwrap()).await;
    let low = cluster.router.place(of(3, -100)).await.unwrap_err();
    assert_eq!(low.code, ErrorCode::ResourceExhausted, "all who wait go before it");
    assert!(flood.iter().chain([&other, &urgent]).all(|waits| !waits.is_finished()));
    cluster.tell("a", &with_room(1)).await;
    assert!(placed(urgent).await.is_ok());
    other.abort();
    flood.iter().for_each(JoinHandle::abort);
}

#[tokio::test]
async fn nobody_waits_beyond_a_deadline_or_for_replicas_that_are_gone() {
    let cluster = Cluster::full(busy(), &["a"]).await;
    let deadline = Instant::now() + Duration::from_millis(100);
    let late = cluster.wait(PlaceRequest { deadline: Some(deadline), ..request(&[]) }).await;
    let waiting = cluster.wait(request(&[])).await;
    assert_eq!(placed(late).await.unwrap_err().code, ErrorCode::DeadlineExceeded);
    assert!(Instant::now() >= deadline);
    assert!(!waiting.is_finished());
    cluster.router.deregister(&id("a"));
    assert_eq!(placed(waiting).await.unwrap_err().code, ErrorCode::Unavailable);
}

#[tokio::test]
async fn one_that_was_full_takes_the_request_when_it_has_room() {
    let cluster = Cluster::full(quiet(), &["a"]).await;
    cluster.tell("a", &with_room(2)).await;
    until("it is heard", || async { cluster.router.replicas().await.unwrap()[0].load == Some(Ok(with_room(2))) }).await;
    let first = soon("a place", cluster.router.place(request(&[]))).await.unwrap();
    // the replica refuses it: others were faster
    let again = PlaceRequest { exclude: vec![first.replica.clone()], full: vec![first.replica], ..request(&[]) };
    let waiting = cluster.wait(again).await;
    cluster.tell("a", &with_room(2)).await;
    assert_eq!(placed(waiting).await.unwrap().replica, id("a"));
    // one that failed takes it no more
    let failed = PlaceRequest { exclude: vec![id("a")], ..request(&[]) };
    assert_eq!(cluster.router.place(failed).await.unwrap_err().code, ErrorCode::Unavailable);
}

#[tokio::test]
async fn without_a_queue_requests_wait_at_the_replicas() {
    let cluster = Cluster::full(Config { queue_capacity: 0, ..quiet() }, &["a"]).await;
    for _ in 0..20 {
        assert_eq!(cluster.router.place(request(&[])).await.unwrap().replica, id("a"));
    }
}

#[tokio::test]
async fn however_many_loads_a_replica_tells_it_is_asked_again_once() {
    const TOLD: usize = 40;
    let bus = Arc::new(MemoryBus::new());
    let router = Router::start(&quiet(), bus.clone()).unwrap();
    let fake = Fake::with(Ok(full()));
    router.register(id("a"), fake.clone());
    until("it has answered", || async { router.replicas().await.unwrap()[0].load.is_some() }).await;
    let cluster = Cluster { bus, router };
    let (first, second) = (cluster.wait(request(&[])).await, cluster.wait(request(&[])).await);
    let (since, before) = (Instant::now(), fake.polls.load(Ordering::SeqCst));
    cluster.tell("a", &with_room(1)).await;
    assert!(placed(first).await.is_ok());
    for _ in 0..TOLD {
        // the first may not be counted yet, and leave room for the second then
        cluster.tell("a", &full()).await;
    }
    until("all rechecks are over", || async { since.elapsed() > 3 * TRANSIT }).await;
    let asked = fake.polls.load(Ordering::SeqCst) - before;
    let most = (since.elapsed().as_micros() / TRANSIT.as_micros()) as usize + 1;
    assert!(asked <= most, "asked {asked} times in {:?}", since.elapsed());
    second.abort();
}

#[tokio::test]
async fn routers_count_each_other_s_placements() {
    let bus = Arc::new(MemoryBus::new());
    let routers = [0, 1].map(|_| Router::start(&quiet(), bus.clone()).unwrap());
    let replicas = [Fake::with(Ok(with_room(2))), Fake::with(Ok(with_room(2)))];
    for router in &routers {
        for (name, fake) in ["a", "b"].into_iter().zip(&replicas) {
            router.register(id(name), fake.clone());
        }
        until("both have answered", || async {
            router.replicas().await.unwrap().iter().filter(|status| status.load.is_some()).count() == 2
        })
        .await;
    }
    // four have room, whoever places them; what a router has just told takes a moment to be heard
    let mut places = Vec::new();
    for turn in 0..4 {
        let placed: Placed = soon("a place", routers[turn % 2].place(request(&[]))).await.unwrap();
        places.push(placed.replica);
        for router in &routers {
            until("it is counted", || async {
                let statuses = router.replicas().await.unwrap();
                statuses.iter().map(|status| status.fresh.requests).sum::<usize>() == turn + 1
            })
            .await;
        }
    }
    places.sort();
    assert_eq!(places, ["a", "a", "b", "b"].map(ReplicaId::new));
    let fifth = tokio::spawn({
        let router = Arc::clone(&routers[0]);
        async move { router.place(request(&[])).await }
    });
    until("the fifth waits", || async { routers[0].waiting().await == Ok(1) }).await;
    fifth.abort();
}
