//! The prefix store and KV events.
#![allow(clippy::unwrap_used)]

mod common;

use bytes::Bytes;
use common::*;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream, FuturesUnordered, StreamExt};
use moesaic_config::ByteSize;
use moesaic_scheduler::config::{FetchPolicy, OfferPolicy};
use moesaic_scheduler::{Config, Scheduler};
use moesaic_transport::subjects::Subject;
use moesaic_types::boundary::{Event, EventBus, KvEvent, PrefixStore};
use moesaic_types::{BLOCK_TOKENS, BlockHash, Error, Link, Result};
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::watch;

#[derive(Default)]
struct Store {
    blocks: Mutex<HashMap<BlockHash, Bytes>>,
    count: watch::Sender<usize>,
    forgotten: watch::Sender<Vec<BlockHash>>,
    /// It answers nothing.
    hang: bool,
    /// It sends so many blocks and then nothing.
    stall_after: Option<usize>,
    /// So many offers fail.
    refuse: AtomicUsize,
    /// How many blocks each fetch asked for.
    asked: Mutex<Vec<usize>>,
    /// It sends nothing until it is told to.
    opens: Option<watch::Receiver<bool>>,
    is_shared: bool,
}

impl PrefixStore for Store {
    fn longest(&self, chain: &[BlockHash], from: usize) -> BoxFuture<'_, Result<usize>> {
        let blocks = self.blocks.lock().unwrap();
        let found = chain[from..].iter().take_while(|hash| blocks.contains_key(hash)).count();
        if self.hang { Box::pin(std::future::pending()) } else { Box::pin(async move { Ok(found) }) }
    }

    fn fetch(&self, chain: &[BlockHash], from: usize) -> BoxStream<'static, Result<Bytes>> {
        let blocks = self.blocks.lock().unwrap();
        let found: Vec<_> = chain[from..].iter().map_while(|hash| blocks.get(hash).cloned().map(Ok)).collect();
        self.asked.lock().unwrap().push(chain.len() - from);
        if let Some(mut opens) = self.opens.clone() {
            let opened = async move {
                opens.wait_for(|is_open| *is_open).await.unwrap();
                stream::iter(found)
            };
            return stream::once(opened).flatten().boxed();
        }
        match self.stall_after {
            Some(count) => stream::iter(found).take(count).chain(stream::pending()).boxed(),
            None => stream::iter(found).boxed(),
        }
    }

    fn offer(&self, link: Link, bytes: Bytes) -> BoxFuture<'_, Result<bool>> {
        if self.refuse.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok() {
            return Box::pin(async { Err(Error::unavailable("the store is away")) });
        }
        let new = self.blocks.lock().unwrap().insert(link.hash, bytes).is_none();
        self.count.send_modify(|count| *count += usize::from(new));
        Box::pin(async move { Ok(new) })
    }

    fn forget(&self, blocks: &[BlockHash]) -> BoxFuture<'_, Result<()>> {
        blocks.iter().for_each(|hash| drop(self.blocks.lock().unwrap().remove(hash)));
        self.forgotten.send_modify(|forgotten| forgotten.extend(blocks));
        Box::pin(async { Ok(()) })
    }

    fn is_shared(&self) -> bool {
        self.is_shared
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
        if subject == Subject::load("0").to_string() {
            return Box::pin(async { Ok(()) });
        }
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

/// A replica over a store.
async fn over(store: &Arc<Store>, config: Config, levers: &Arc<Levers>) -> Arc<Scheduler> {
    Scheduler::start(config, factory(levers), vocabulary(), hasher(), Some(store.clone()), None).await.unwrap()
}

async fn stores(store: &Store, blocks: usize) {
    let mut count = store.count.subscribe();
    tokio::time::timeout(PATIENCE, count.wait_for(|count| *count >= blocks)).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn full_blocks_of_prompts_are_offered_to_a_shared_store_and_once() {
    let store = Arc::new(Store { is_shared: true, ..Store::default() });
    // one at a time may be on its way
    let config = Config { prefix_store_offers: 1, prefix_store_fetch: FetchPolicy::Always, ..config() };
    let one = over(&store, config.clone(), &Arc::default()).await;
    let wanted = request(prompt(1, 1000), 100);
    let expected = generate(&one, wanted.clone()).await.unwrap();
    stores(&store, 15).await;
    let two = over(&store, config.clone(), &Arc::default()).await;
    let found = generate(&two, wanted.clone()).await.unwrap();
    assert_eq!((found.usage().cached_tokens, &found.tokens), (960, &expected.tokens));
    // pushed out by others, they are not offered again, nor are those that were fetched
    let chain = hasher().chain(&wanted.salt, &wanted.prompt);
    store.blocks.lock().unwrap().clear();
    for (count, seed) in (1..).zip(2..12) {
        let other = request(prompt(seed, 2000), 2);
        generate(&one, other.clone()).await.unwrap();
        // one that is evicted while another is on its way is dropped
        stores(&store, 15 + count * 31).await;
        generate(&two, other).await.unwrap();
    }
    until_idle(&one).await;
    until_idle(&two).await;
    let blocks = store.blocks.lock().unwrap();
    assert!(chain[..15].iter().all(|hash| !blocks.contains_key(hash)));
}

#[tokio::test(flavor = "multi_thread")]
async fn which_blocks_are_offered_and_fetched_can_be_set() {
    let shared = Arc::new(Store { is_shared: true, ..Store::default() });
    let own = Arc::new(Store::default());
    let wanted = request(prompt(1, 300), 20);
    let evicted = Config { prefix_store_offer: OfferPolicy::Evicted, ..config() };
    let full = Config { prefix_store_offer: OfferPolicy::Full, ..config() };
    let replica = over(&own, full, &Arc::default()).await;
    generate(&replica, wanted.clone()).await.unwrap();
    stores(&own, 4).await;
    let replica = over(&shared, evicted, &Arc::default()).await;
    generate(&replica, wanted.clone()).await.unwrap();
    until_idle(&replica).await;
    assert_eq!(*shared.count.borrow(), 0);
    let never = Config { prefix_store_fetch: FetchPolicy::Never, ..config() };
    let replica = over(&own, never, &Arc::default()).await;
    assert_eq!(generate(&replica, wanted).await.unwrap().usage().cached_tokens, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_before_a_store_stalled_is_used() {
    let store = Arc::new(Store { stall_after: Some(3), is_shared: true, ..Store::default() });
    let wanted = request(prompt(1, 500), 20);
    let expected = generate(&*over(&store, config(), &Arc::default()).await, wanted.clone()).await.unwrap();
    stores(&store, 7).await;
    let levers: Arc<Levers> = Arc::default();
    let config = Config { prefix_store_timeout_ms: 100, ..config() };
    let found = generate(&*over(&store, config, &levers).await, wanted).await.unwrap();
    assert_eq!((found.usage().cached_tokens, found.tokens), (3 * 64, expected.tokens));
    assert_eq!(levers.computed.load(std::sync::atomic::Ordering::SeqCst), 500 - 3 * 64 + 19);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_whose_offer_failed_is_offered_again_when_it_is_evicted() {
    let store = Arc::new(Store { is_shared: true, refuse: 4.into(), ..Store::default() });
    // room for two such requests
    let config = Config { kv_blocks: Some(12), prefix_store_offers: 1024, ..config() };
    let replica = over(&store, config, &Arc::default()).await;
    let wanted = request(prompt(1, 300), 2);
    generate(&replica, wanted.clone()).await.unwrap();
    tokio::time::timeout(PATIENCE, async {
        while store.refuse.load(Ordering::SeqCst) > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    // some steps, in which the replica hears of it
    for seed in 5001..5004 {
        generate(&replica, request(prompt(seed, 20), 2)).await.unwrap();
    }
    let chain = hasher().chain(&wanted.salt, &wanted.prompt);
    let offered = || chain.iter().filter(|hash| store.blocks.lock().unwrap().contains_key(hash)).count();
    for seed in 2.. {
        assert!(seed < 1000, "{} of its blocks were offered", offered());
        generate(&replica, request(prompt(seed, 600), 2)).await.unwrap();
        if offered() == 4 {
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_that_changed_on_its_way_is_dropped_computed_and_offered_again() {
    let store = Arc::new(Store { is_shared: true, ..Store::default() });
    let config = Config { prefix_store_fetch: FetchPolicy::Always, ..config() };
    let wanted = request(prompt(1, 300), 20);
    let expected = generate(&*over(&store, config.clone(), &Arc::default()).await, wanted.clone()).await.unwrap();
    stores(&store, 4).await;
    let chain = hasher().chain(&wanted.salt, &wanted.prompt);
    let good = store.blocks.lock().unwrap()[&chain[2]].clone();
    let mut changed = good.to_vec();
    changed[7] ^= 1;
    store.blocks.lock().unwrap().insert(chain[2], changed.into());
    let two = over(&store, config.clone(), &Arc::default()).await;
    let found = generate(&two, wanted.clone()).await.unwrap();
    assert_eq!((found.usage().cached_tokens, &found.tokens), (2 * BLOCK_TOKENS, &expected.tokens));
    assert_eq!(*store.forgotten.borrow(), [chain[2]]);
    stores(&store, 5).await;
    assert_eq!(store.blocks.lock().unwrap()[&chain[2]], good);
    let three = over(&store, config, &Arc::default()).await;
    let found = generate(&three, wanted).await.unwrap();
    assert_eq!((found.usage().cached_tokens, found.tokens), (4 * BLOCK_TOKENS, expected.tokens));
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_that_spoil_a_request_spoil_one() {
    let store = Arc::new(Store { is_shared: true, ..Store::default() });
    let config = Config { prefix_store_fetch: FetchPolicy::Always, ..config() };
    let wanted = request(prompt(1, 300), 20);
    let faulty: Arc<Levers> = Arc::default();
    faulty.spoil_exports.store(true, std::sync::atomic::Ordering::SeqCst);
    let expected = generate(&*over(&store, config.clone(), &faulty).await, wanted.clone()).await.unwrap();
    stores(&store, 4).await;
    let two = over(&store, config.clone(), &Arc::default()).await;
    let error = generate(&two, wanted.clone()).await.unwrap_err();
    assert!(error.message.contains("cannot be used"), "{error}");
    let chain = hasher().chain(&wanted.salt, &wanted.prompt);
    let mut forgotten = store.forgotten.subscribe();
    let all = |forgotten: &Vec<BlockHash>| chain.iter().all(|hash| forgotten.contains(hash));
    tokio::time::timeout(PATIENCE, forgotten.wait_for(all)).await.unwrap().unwrap();
    // neither this replica nor another fails again
    for replica in [two, over(&store, config, &Arc::default()).await] {
        assert_eq!(generate(&replica, wanted.clone()).await.unwrap().tokens, expected.tokens);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_that_memory_has_no_room_for_are_computed() {
    let block = (BLOCK_TOKENS * 4) as u64;
    let full = Arc::new(Store { is_shared: true, ..Store::default() });
    let wanted: Vec<_> = (1..=12).map(|seed| request(prompt(seed, 300), 5)).collect();
    let mut expected = Vec::new();
    let first = over(&full, config(), &Arc::default()).await;
    for wanted in &wanted {
        expected.push(generate(&first, wanted.clone()).await.unwrap().tokens);
    }
    stores(&full, 48).await;
    let (open, opens) = watch::channel(false);
    let blocks = Mutex::new(full.blocks.lock().unwrap().clone());
    let store = Arc::new(Store { is_shared: true, blocks, opens: Some(opens), ..Store::default() });
    let config = Config {
        prefix_store_memory: ByteSize(6 * block + block / 2),
        prefix_store_timeout_ms: PATIENCE.as_millis() as u64,
        prefix_store_fetch: FetchPolicy::Always,
        ..config()
    };
    let replica = over(&store, config, &Arc::default()).await;
    let mut answers: FuturesUnordered<_> = wanted
        .iter()
        .enumerate()
        .take(10)
        .map(|(n, wanted)| {
            let (replica, wanted) = (Arc::clone(&replica), wanted.clone());
            async move { (n, generate(&replica, wanted).await.unwrap()) }
        })
        .collect();
    // two have all the room and wait for the store; the others do not wait for them
    for _ in 0..8 {
        let (n, answer) = tokio::time::timeout(PATIENCE, answers.next()).await.unwrap().unwrap();
        assert_eq!((answer.usage().cached_tokens, answer.tokens), (0, expected[n].clone()));
    }
    let mut asked = store.asked.lock().unwrap().clone();
    asked.sort_unstable();
    assert_eq!(asked, [2, 4]);
    open.send_replace(true);
    let mut cached = 0;
    while let Some((n, answer)) = tokio::time::timeout(PATIENCE, answers.next()).await.unwrap() {
        cached += answer.usage().cached_tokens;
        assert_eq!(answer.tokens, expected[n]);
    }
    assert_eq!(cached, 6 * BLOCK_TOKENS);
    // what was admitted gives its room back
    for wanted in &wanted[10..] {
        assert_eq!(generate(&replica, wanted.clone()).await.unwrap().usage().cached_tokens, 4 * BLOCK_TOKENS);
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
