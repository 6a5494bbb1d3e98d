//! The store keeps the boundary's promises.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)] // A test fails by panicking.
use bytes::Bytes;
use moesaic_config::ByteSize;
use moesaic_kv_store::{Config, KvStore};
use moesaic_testkit::conformance::{self, block};
use moesaic_types::boundary::PrefixStore;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_store_conforms() {
    conformance::prefix_store(KvStore::start(&Config::default()).unwrap()).await;
}

#[tokio::test]
async fn a_chain_that_is_used_goes_from_its_end() {
    let len = block(0).1.len() as u64;
    let store = KvStore::start(&Config { capacity: ByteSize(3 * len), ..Config::default() }).unwrap();
    let chain: Vec<_> = (0..3).map(|number| block(number).0).collect();
    for number in 0..3 {
        let (hash, bytes) = block(number);
        assert!(store.offer(hash, bytes).await.unwrap());
    }
    assert_eq!(store.fetch(&chain).await.unwrap().len(), 3);
    for (number, left) in [(10, 2), (11, 1), (12, 0)] {
        let (hash, bytes) = block(number);
        assert!(store.offer(hash, bytes).await.unwrap());
        assert_eq!(store.longest(&chain).await.unwrap(), left);
    }
    assert!(!store.offer(block(13).0, Bytes::from(vec![0; 4 * len as usize])).await.unwrap(), "larger than the store");
}
