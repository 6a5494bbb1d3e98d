//! Canaries: who says that it is ready and does not work gets no requests.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)] // A test fails by panicking, in its helpers too.
mod fake;

use fake::{config, id, request};
use futures::FutureExt;
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use moesaic_config::HumanDuration;
use moesaic_router::news::{self, News};
use moesaic_router::{Config, Router};
use moesaic_testkit::{soon, until};
use moesaic_transport::MemoryBus;
use moesaic_types::boundary::{DeltaStream, EventBus, PlaceRequest, Placer, Replica, ReplicaLoad};
use moesaic_types::{Delta, Error, GenerateRequest, Result, SampledToken, TokenId};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What a replica does with a canary.
#[derive(Clone)]
enum Act {
    Answer(TokenId),
    Hang,
    Fail,
    Refuse,
}

/// A replica that says that it is ready, whatever it does.
struct Bird {
    act: Mutex<Act>,
    load: Mutex<ReplicaLoad>,
    canaries: AtomicUsize,
    seen: Mutex<Vec<GenerateRequest>>,
}

impl Bird {
    fn new(act: Act) -> Arc<Self> {
        let load = ReplicaLoad { max_running: 4, ..ReplicaLoad::default() };
        let (load, canaries, seen) = (Mutex::new(load), AtomicUsize::new(0), Mutex::default());
        Arc::new(Self { act: Mutex::new(act), load, canaries, seen })
    }

    fn set(&self, act: Act) {
        *self.act.lock().unwrap() = act;
    }

    fn run(&self, running: usize) {
        self.load.lock().unwrap().running = running;
    }

    fn canaries(&self) -> usize {
        self.canaries.load(Ordering::SeqCst)
    }
}

impl Replica for Bird {
    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<DeltaStream>> {
        let act = self.act.lock().unwrap().clone();
        self.seen.lock().unwrap().push(request);
        self.canaries.fetch_add(1, Ordering::SeqCst);
        async move {
            match act {
                Act::Answer(id) => {
                    let token = SampledToken { id, logprob: None, top_logprobs: Vec::new() };
                    Ok(stream::iter([Ok(Delta { tokens: vec![token], ..Delta::default() })]).boxed())
                }
                Act::Hang => Ok(stream::pending().boxed()),
                Act::Fail => Err(Error::internal("the engine is broken")),
                Act::Refuse => Err(Error::exhausted("the queue is full", Duration::from_secs(1))),
            }
        }
        .boxed()
    }

    fn load(&self) -> BoxFuture<'_, Result<ReplicaLoad>> {
        let load = self.load.lock().unwrap().clone();
        async { Ok(load) }.boxed()
    }
}

fn with_canaries() -> Config {
    Config {
        canary_interval: HumanDuration::from_secs(3600),
        canary_timeout: HumanDuration::from_millis(200),
        breaker_pause: HumanDuration::from_millis(50),
        ..config()
    }
}

fn start(config: &Config) -> Arc<Router> {
    Router::start(config, Arc::new(MemoryBus::new())).unwrap()
}

async fn is_ready(router: &Router, name: &str) -> bool {
    router.ready().await.unwrap_or_default().contains(&id(name))
}

#[tokio::test]
async fn a_new_replica_whose_engine_hangs_gets_nothing_and_one_that_works_all() {
    let router = start(&with_canaries());
    let (good, hangs) = (Bird::new(Act::Answer(7)), Bird::new(Act::Hang));
    router.register(id("good"), good.clone());
    router.register(id("hangs"), hangs.clone());
    until("one has shown that it works", || async { good.canaries() == 1 }).await;
    until("one is taken out", || async { !is_ready(&router, "hangs").await }).await;
    for _ in 0..10 {
        assert_eq!(router.place(request(&[])).await.unwrap().replica, id("good"));
    }
    let canary = good.seen.lock().unwrap()[0].clone();
    assert!(canary.is_canary() && canary.stop.max_tokens == 1 && canary.prompt.len() < 64, "{canary:?}");
    assert_eq!(canary.sampling.temperature, 0.0);
}

#[tokio::test]
async fn requests_go_back_to_one_that_failed_only_after_a_canary() {
    let router = start(&Config { breaker_failures: 1, ..with_canaries() });
    let bird = Bird::new(Act::Answer(7));
    router.register(id("a"), bird.clone());
    until("it works", || async { bird.canaries() == 1 }).await;
    bird.set(Act::Fail);
    let failed = PlaceRequest { exclude: vec![id("a")], ..request(&[]) };
    assert!(router.place(failed).await.is_err());
    until("canaries fail", || async { bird.canaries() >= 3 }).await;
    assert!(router.place(request(&[])).await.is_err(), "its pauses end, and nothing goes there");
    bird.set(Act::Answer(7));
    until("it is back", || async { is_ready(&router, "a").await }).await;
    assert_eq!(router.place(request(&[])).await.unwrap().replica, id("a"));
}

#[tokio::test]
async fn one_that_has_nothing_to_do_is_asked_now_and_then_and_one_that_works_is_not() {
    let interval = HumanDuration::from_millis(100);
    let router = start(&Config { canary_interval: interval, ..with_canaries() });
    let (idle, busy) = (Bird::new(Act::Answer(7)), Bird::new(Act::Answer(7)));
    busy.run(1);
    router.register(id("idle"), idle.clone());
    router.register(id("busy"), busy.clone());
    until("several came", || async { idle.canaries() >= 3 }).await;
    assert_eq!(busy.canaries(), 0, "it shows that it works by working");
    idle.set(Act::Hang);
    until("it is found out", || async { !is_ready(&router, "idle").await }).await;
    assert!(is_ready(&router, "busy").await);
}

#[tokio::test]
async fn one_that_others_keep_full_shows_that_it_works_all_the_same() {
    let router = start(&Config { breaker_failures: 1, ..with_canaries() });
    let bird = Bird::new(Act::Answer(7));
    router.register(id("a"), bird.clone());
    until("it works", || async { bird.canaries() == 1 }).await;
    // as many run there as it takes, and more wait
    let full = ReplicaLoad { running: 4, waiting: 3, max_running: 4, ..ReplicaLoad::default() };
    *bird.load.lock().unwrap() = full.clone();
    until("it is heard", || async { router.replicas().await.unwrap()[0].load == Some(Ok(full.clone())) }).await;
    let failed = PlaceRequest { exclude: vec![id("a")], ..request(&[]) };
    assert!(router.place(failed).await.is_err());
    until("it is back", || async { is_ready(&router, "a").await }).await;
    assert_eq!(bird.canaries(), 2);
}

#[tokio::test]
async fn a_refusal_is_an_answer_and_no_canary_is_sent_where_none_is_wanted() {
    let router = start(&with_canaries());
    let bird = Bird::new(Act::Refuse);
    router.register(id("a"), bird.clone());
    until("it was asked", || async { bird.canaries() == 1 }).await;
    assert_eq!(router.place(request(&[])).await.unwrap().replica, id("a"));
    assert!(is_ready(&router, "a").await);

    let router = start(&config());
    let bird = Bird::new(Act::Hang);
    router.register(id("a"), bird.clone());
    assert_eq!(soon("a place", router.place(request(&[]))).await.unwrap().replica, id("a"));
    until("its load is known", || async { router.replicas().await.unwrap()[0].load.is_some() }).await;
    assert_eq!(bird.canaries(), 0);
}

#[tokio::test]
async fn a_canary_of_another_router_counts() {
    let bus = Arc::new(MemoryBus::new());
    let config = Config { canary_timeout: HumanDuration::from_secs(600), ..with_canaries() };
    let router = Router::start(&config, bus.clone()).unwrap();
    let (good, slow) = (Bird::new(Act::Answer(7)), Bird::new(Act::Hang));
    router.register(id("good"), good.clone());
    router.register(id("slow"), slow.clone());
    until("both were asked", || async { good.canaries() == 1 && slow.canaries() == 1 }).await;
    good.run(3);
    until("its load is known", || async {
        router
            .replicas()
            .await
            .unwrap()
            .iter()
            .any(|status| matches!(&status.load, Some(Ok(load)) if load.running == 3))
    })
    .await;
    assert_eq!(router.place(request(&[])).await.unwrap().replica, id("good"), "the other has shown nothing yet");
    let works = serde_json::to_vec(&News::Works { replica: id("slow") }).unwrap();
    bus.publish("other", &news::subject("other").to_string(), works.into()).await.unwrap();
    until("it takes requests", || async { router.place(request(&[])).await.unwrap().replica == id("slow") }).await;
    assert_eq!(slow.canaries(), 1);
}
