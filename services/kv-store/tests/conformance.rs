//! The store keeps the boundary's promises.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)] // A test fails by panicking.
use bytes::Bytes;
use moesaic_config::ByteSize;
use moesaic_kv_store::{Config, KvStore};
use moesaic_testkit::conformance::{self, block, chain, fetched};
use moesaic_types::Link;
use moesaic_types::boundary::PrefixStore;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_store_conforms() {
    conformance::prefix_store(KvStore::start(&Config::default()).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_store_conforms_when_most_blocks_are_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let capacity = ByteSize(3 * block(0).1.len() as u64);
    let config = Config { capacity, disk_folder: Some(folder.path().to_owned()), ..Config::default() };
    conformance::prefix_store(KvStore::start(&config).unwrap()).await;
}

#[tokio::test]
async fn a_chain_that_is_used_goes_from_its_end() {
    let len = block(0).1.len() as u64;
    let store = KvStore::start(&Config { capacity: ByteSize(3 * len), ..Config::default() }).unwrap();
    let chain = chain(0..3);
    for number in 0..3 {
        assert!(store.offer(Link::of(&chain, number), block(number as u32).1).await.unwrap());
    }
    assert_eq!(fetched(&*store, &chain, 0).await.unwrap().len(), 3);
    for (number, left) in [(10, 2), (11, 1), (12, 0)] {
        let (hash, bytes) = block(number);
        assert!(store.offer(Link::of(&[hash], 0), bytes).await.unwrap());
        assert_eq!(store.longest(&chain, 0).await.unwrap(), left);
    }
    let large = Bytes::from(vec![0; 4 * len as usize]);
    assert!(!store.offer(Link::of(&[block(13).0], 0), large).await.unwrap(), "larger than the store");
}
