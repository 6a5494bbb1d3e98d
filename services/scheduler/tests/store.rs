//! The prefix store and KV events.
#![allow(clippy::unwrap_used)]

mod common;

use bytes::Bytes;
use common::*;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use moesaic_scheduler::{Config, Scheduler};
use moesaic_types::boundary::{Event, EventBus, KvEvent, PrefixStore};
use moesaic_types::{BlockHash, Error, Result};
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use tokio::sync::watch;

#[derive(Default)]
struct Store {
    blocks: Mutex<HashMap<BlockHash, Bytes>>,
    count: watch::Sender<usize>,
    hang: bool,
}

impl PrefixStore for Store {
    fn longest(&self, chain: &[BlockHash]) -> BoxFuture<'_, Result<usize>> {
        let blocks = self.blocks.lock().unwrap();
        let found = chain.iter().take_while(|hash| blocks.contains_key(hash)).count();
        if self.hang { Box::pin(std::future::pending()) } else { Box::pin(async move { Ok(found) }) }
    }

    fn fetch(&self, chain: &[BlockHash]) -> BoxFuture<'_, Result<Vec<Bytes>>> {
        let blocks = self.blocks.lock().unwrap();
        let found = chain.iter().map_while(|hash| blocks.get(hash).cloned()).collect();
        Box::pin(async move { Ok(found) })
    }

    fn offer(&self, hash: BlockHash, bytes: Bytes) -> BoxFuture<'_, Result<bool>> {
        let new = self.blocks.lock().unwrap().insert(hash, bytes).is_none();
        self.count.send_modify(|count| *count += usize::from(new));
        Box::pin(async move { Ok(new) })
    }
}

/// Keeps the set of blocks that its events describe; every third publication fails.
#[derive(Default)]
struct Bus {
    known: watch::Sender<BTreeSet<BlockHash>>,
    published: Mutex<(usize, Vec<String>)>,
}

impl EventBus for Bus {
    fn publish(&self, _source: &str, subject: &str, payload: Bytes) -> BoxFuture<'_, Result<()>> {
        let mut published = self.published.lock().unwrap();
        published.0 += 1;
        if published.0.is_multiple_of(3) {
            return Box::pin(async { Err(Error::unavailable("the bus is away")) });
        }
        published.1.push(subject.to_owned());
        self.known.send_modify(|known| match serde_json::from_slice(&payload).unwrap() {
            KvEvent::Cleared => known.clear(),
            KvEvent::Stored { blocks } => blocks.iter().for_each(|block| assert!(known.insert(*block))),
            KvEvent::Evicted { blocks } => blocks.iter().for_each(|block| assert!(known.remove(block))),
        });
        Box::pin(async { Ok(()) })
    }

    fn subscribe(&self, _prefix: &str) -> BoxFuture<'_, Result<BoxStream<'static, Event>>> {
        Box::pin(async { Err(Error::internal("nobody subscribes here")) })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn evicted_blocks_serve_another_replica() {
    let store = Arc::new(Store::default());
    let small = Config { kv_blocks: Some(8), ..config() };
    let one = Scheduler::start(small, factory(&Arc::default()), vocabulary(), hasher(), Some(store.clone()), None);
    let one = one.await.unwrap();
    let wanted = request(prompt(1, 300), 20);
    let expected = generate(&one, wanted.clone()).await.unwrap();
    let fill = request(prompt(2, 480), 20);
    generate(&one, fill).await.unwrap();
    let mut count = store.count.subscribe();
    tokio::time::timeout(PATIENCE, count.wait_for(|count| *count >= 4)).await.unwrap().unwrap();
    let levers: Arc<Levers> = Arc::default();
    let two = Scheduler::start(config(), factory(&levers), vocabulary(), hasher(), Some(store), None).await.unwrap();
    let found = generate(&two, wanted).await.unwrap();
    assert_eq!(expected.tokens, found.tokens);
    assert_eq!(found.usage().cached_tokens, 256);
    assert_eq!(levers.computed.load(std::sync::atomic::Ordering::SeqCst), 300 - 256 + 19);
    until_idle(&two).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_hangs_or_lies_costs_time_only() {
    let wanted = request(prompt(1, 300), 20);
    let expected = generate(&*start(config(), &Arc::default()).await, wanted.clone()).await.unwrap();
    let hangs = Arc::new(Store { hang: true, ..Store::default() });
    let lies = Arc::new(Store::default());
    for hash in hasher().chain(&wanted.salt, &wanted.prompt) {
        lies.blocks.lock().unwrap().insert(hash, Bytes::from_static(b"short"));
    }
    for store in [hangs, lies] {
        let config = Config { prefix_store_timeout_ms: 20, ..config() };
        let scheduler = Scheduler::start(config, factory(&Arc::default()), vocabulary(), hasher(), Some(store), None)
            .await
            .unwrap();
        assert_eq!(generate(&scheduler, wanted.clone()).await.unwrap().tokens, expected.tokens);
        until_idle(&scheduler).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_describe_the_cache_through_failures_and_restarts() {
    let bus = Arc::new(Bus::default());
    let small = Config { kv_blocks: Some(12), ..config() };
    let scheduler = Scheduler::start(small, factory(&Arc::default()), vocabulary(), hasher(), None, Some(bus.clone()))
        .await
        .unwrap();
    let last = request(prompt(3, 200), 10);
    for wanted in [request(prompt(1, 400), 10), request(prompt(2, 500), 10), last.clone()] {
        generate(&scheduler, wanted).await.unwrap();
    }
    let chain = hasher().chain(&last.salt, &last.prompt);
    let mut known = bus.known.subscribe();
    let here = |known: &BTreeSet<BlockHash>| chain.iter().all(|hash| known.contains(hash)) && known.len() <= 12;
    tokio::time::timeout(PATIENCE, known.wait_for(here)).await.unwrap().unwrap();
    assert!(bus.published.lock().unwrap().1.iter().all(|subject| subject == "moesaic.v1.kv.scheduler.0.blocks"));
    scheduler.panic_engine();
    tokio::time::timeout(PATIENCE, known.wait_for(BTreeSet::is_empty)).await.unwrap().unwrap();
}
