//! Lost events: whoever misses one asks, and all routers know the same again.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)] // A test fails by panicking, in its helpers too.
mod fake;

use bytes::Bytes;
use fake::{Fake, config, id, request};
use futures::StreamExt;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::BoxStream;
use moesaic_router::Router;
use moesaic_testkit::until;
use moesaic_transport::MemoryBus;
use moesaic_transport::kv::{KvCue, KvCues};
use moesaic_transport::subjects::Subject;
use moesaic_types::boundary::{Event, EventBus, KvEvent, Placer, ReplicaLoad};
use moesaic_types::cluster::Service;
use moesaic_types::{BlockHash, Result};
use std::collections::BTreeSet;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex};

/// A bus whose readers lose KV events as long as they are told to, and who asks loses questions.
struct Leaky {
    bus: Arc<MemoryBus>,
    loses: Arc<AtomicBool>,
    questions_to_lose: AtomicUsize,
}

impl EventBus for Leaky {
    fn publish(&self, source: &str, subject: &str, payload: Bytes) -> BoxFuture<'_, Result<()>> {
        let is_lost = subject.ends_with(".anew")
            && self.questions_to_lose.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok();
        if is_lost { async { Ok(()) }.boxed() } else { self.bus.publish(source, subject, payload) }
    }

    fn subscribe(&self, prefix: &str) -> BoxFuture<'_, Result<BoxStream<'static, Event>>> {
        let (prefix, loses) = (prefix.to_owned(), Arc::clone(&self.loses));
        async move {
            let events = self.bus.subscribe(&prefix).await?;
            let kept = events.filter(move |event| {
                let is_kv = event.subject.ends_with(".blocks");
                std::future::ready(!(is_kv && loses.load(SeqCst)))
            });
            Ok(kept.boxed())
        }
        .boxed()
    }
}

/// A replica's cache, which tells as a real one does.
struct Cache {
    bus: Arc<MemoryBus>,
    blocks: Mutex<BTreeSet<u8>>,
}

fn hashes(numbers: impl IntoIterator<Item = u8>) -> Vec<BlockHash> {
    numbers.into_iter().map(|number| BlockHash([number; 16])).collect()
}

impl Cache {
    fn start(bus: &Arc<MemoryBus>) -> Arc<Self> {
        let this = Arc::new(Self { bus: Arc::clone(bus), blocks: Mutex::default() });
        let (cache, mut cues) =
            (Arc::clone(&this), KvCues::new(bus.clone(), &Subject::kv_anew(Service::Scheduler, "a")));
        tokio::spawn(async move {
            loop {
                match cues.next().await {
                    KvCue::Sign => cache.tell(moesaic_transport::kv::sign()).await,
                    KvCue::Anew => {
                        let blocks = hashes(cache.blocks.lock().unwrap().clone());
                        cache.tell(KvEvent::Cleared).await;
                        cache.tell(KvEvent::Stored { blocks }).await;
                    }
                }
            }
        });
        this
    }

    async fn tell(&self, event: KvEvent) {
        let payload = Bytes::from(serde_json::to_vec(&event).unwrap());
        self.bus.publish("life", &Subject::kv("a").to_string(), payload).await.unwrap();
    }

    async fn store(&self, numbers: &[u8]) {
        self.blocks.lock().unwrap().extend(numbers);
        self.tell(KvEvent::Stored { blocks: hashes(numbers.iter().copied()) }).await;
    }

    async fn evict(&self, number: u8) {
        self.blocks.lock().unwrap().remove(&number);
        self.tell(KvEvent::Evicted { blocks: hashes([number]) }).await;
    }
}

async fn overlap(router: &Router, blocks: &[u8]) -> usize {
    router.place(request(blocks)).await.unwrap().overlap_blocks
}

#[tokio::test]
async fn a_lost_event_is_noticed_and_all_routers_know_the_same_again() {
    let bus = Arc::new(MemoryBus::new());
    let loses = [false, false].map(|loses| Arc::new(AtomicBool::new(loses)));
    let routers = loses.each_ref().map(|loses| {
        let leaky = Leaky { bus: bus.clone(), loses: Arc::clone(loses), questions_to_lose: AtomicUsize::new(0) };
        let router = Router::start(&config(), Arc::new(leaky)).unwrap();
        router.register(id("a"), Fake::with(Ok(ReplicaLoad::default())));
        router
    });
    let cache = Cache::start(&bus);
    let all_know = async |blocks: &[u8], depth: usize| {
        until("both know", || async {
            overlap(&routers[0], blocks).await == depth && overlap(&routers[1], blocks).await == depth
        })
        .await;
    };
    cache.store(&[1, 2, 3]).await;
    all_know(&[1, 2, 3, 4], 3).await;

    // one loses that a block went and others came
    loses[1].store(true, SeqCst);
    cache.evict(3).await;
    cache.store(&[4, 5]).await;
    until("one has heard", || async { overlap(&routers[0], &[4, 5]).await == 2 }).await;
    assert_eq!(overlap(&routers[1], &[1, 2, 3]).await, 3, "the other believes what is no longer so");
    loses[1].store(false, SeqCst);
    // the next event, even one of another block, shows the gap
    cache.store(&[9]).await;
    all_know(&[1, 2, 3], 2).await;
    all_know(&[4, 5, 9], 3).await;
    for number in 0..10 {
        let known = overlap(&routers[0], &[number]).await;
        assert_eq!(known, usize::from([1, 2, 4, 5, 9].contains(&number)), "block {number}");
        assert_eq!(overlap(&routers[1], &[number]).await, known, "block {number}");
    }
}

#[tokio::test]
async fn a_router_that_comes_later_learns_what_was_there_before_it() {
    let bus = Arc::new(MemoryBus::new());
    let cache = Cache::start(&bus);
    cache.store(&[1, 2, 3]).await;
    let router = Router::start(&config(), bus.clone()).unwrap();
    router.register(id("a"), Fake::with(Ok(ReplicaLoad::default())));
    // nothing changes any longer; a sign of life is enough
    until("it knows", || async { overlap(&router, &[1, 2, 3]).await == 3 }).await;
}

#[tokio::test]
async fn a_question_that_is_lost_is_asked_again() {
    let bus = Arc::new(MemoryBus::new());
    let cache = Cache::start(&bus);
    cache.store(&[1, 2, 3]).await;
    let leaky = Leaky { bus, loses: Arc::default(), questions_to_lose: AtomicUsize::new(1) };
    let router = Router::start(&config(), Arc::new(leaky)).unwrap();
    router.register(id("a"), Fake::with(Ok(ReplicaLoad::default())));
    until("it knows", || async {
        cache.store(&[9]).await;
        overlap(&router, &[1, 2, 3]).await == 3
    })
    .await;
}
