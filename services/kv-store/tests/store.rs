//! The store behind its boundary.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use bytes::Bytes;
use moesaic_config::ByteSize;
use moesaic_kv_store::actors::block_pool::Sizes;
use moesaic_kv_store::{Config, KvStore};
use moesaic_testkit::conformance::fetched;
use moesaic_types::boundary::PrefixStore;
use moesaic_types::{BlockHash, Link};
use std::time::Duration;

fn hash(i: u8) -> BlockHash {
    BlockHash([i; 16])
}

fn alone(i: u8) -> Link {
    Link::of(&[hash(i)], 0)
}

#[tokio::test]
async fn a_chain_is_found_up_to_its_first_gap() {
    let store = KvStore::start(&Config { capacity: ByteSize(300), ..Config::default() }).unwrap();
    let block = |i: u8| Bytes::from(vec![i; 100]);
    for i in [1, 2, 4] {
        assert!(store.offer(alone(i), block(i)).await.unwrap());
    }
    assert!(!store.offer(alone(1), block(1)).await.unwrap(), "it is there already");
    let chain = [1, 2, 3, 4].map(hash);
    assert_eq!(store.longest(&chain, 0).await.unwrap(), 2);
    assert_eq!(fetched(&*store, &chain, 0).await.unwrap(), [block(1), block(2)]);
    // 4 was used least recently and goes for 5
    assert!(store.offer(alone(5), block(5)).await.unwrap());
    assert_eq!(store.longest(&[hash(4)], 0).await.unwrap(), 0);
    assert_eq!(store.longest(&[hash(1), hash(2), hash(5)], 0).await.unwrap(), 3);
    assert!(!store.offer(alone(6), Bytes::from(vec![0; 301])).await.unwrap(), "larger than the store");
    let sizes = Sizes { ram_blocks: 3, ram_bytes: 300, disk_blocks: 0, disk_bytes: 0 };
    assert_eq!(store.size().await.unwrap(), sizes);
    assert_eq!(store.pin([5, 9].map(hash).to_vec(), Duration::from_secs(60)).await.unwrap(), 1);
    for i in 10..13 {
        assert!(store.offer(alone(i), block(i)).await.unwrap());
    }
    assert_eq!(store.longest(&[hash(5), hash(12), hash(1)], 0).await.unwrap(), 2, "the pinned one stays");
}
