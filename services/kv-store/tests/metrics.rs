//! What the store counts. One test: the recorder is the process's.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)] // A test fails by panicking.
use moesaic_config::ByteSize;
use moesaic_kv_store::{Config, KvStore};
use moesaic_telemetry::metrics::{install, render};
use moesaic_testkit::conformance::{block, chain, fetched};
use moesaic_types::Link;
use moesaic_types::boundary::PrefixStore;

#[tokio::test]
async fn hits_misses_evictions_and_bytes_are_counted() {
    install().unwrap();
    let len = block(0).1.len();
    let store = KvStore::start(&Config { capacity: ByteSize(2 * len as u64), ..Config::default() }).unwrap();
    let chain = chain(0..3);
    for number in 0..2 {
        assert!(store.offer(Link::of(&chain, number), block(number as u32).1).await.unwrap());
    }
    assert_eq!(fetched(&*store, &chain[..2], 0).await.unwrap().len(), 2);
    assert_eq!(fetched(&*store, &chain, 0).await.unwrap().len(), 2, "the third is not there");
    let (hash, bytes) = block(2);
    assert!(store.offer(Link::of(&[hash], 0), bytes).await.unwrap(), "in the place of another");
    let text = render();
    let has = |line: &str| assert!(text.lines().any(|l| l == line), "no line '{line}' in\n{text}");
    has("moesaic_kv_store_hits_total 4");
    has("moesaic_kv_store_misses_total 1");
    has("moesaic_kv_store_evictions_total 1");
    has(&format!("moesaic_kv_store_bytes {}", 2 * len));
}
