//! The store behind its boundary, and its bounds under random use.
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use bytes::Bytes;
use moesaic_config::ByteSize;
use moesaic_kv_store::{Config, KvStore, lru::Lru};
use moesaic_types::BlockHash;
use moesaic_types::boundary::PrefixStore;
use proptest::prelude::*;

fn hash(i: u8) -> BlockHash {
    BlockHash([i; 16])
}

#[tokio::test]
async fn a_chain_is_found_up_to_its_first_gap() {
    let store = KvStore::start(&Config { capacity: ByteSize(300), ..Config::default() }).unwrap();
    let block = |i: u8| Bytes::from(vec![i; 100]);
    for i in [1, 2, 4] {
        assert!(store.offer(hash(i), block(i)).await.unwrap());
    }
    assert!(!store.offer(hash(1), block(1)).await.unwrap(), "it is there already");
    let chain = [1, 2, 3, 4].map(hash);
    assert_eq!(store.longest(&chain).await.unwrap(), 2);
    assert_eq!(store.fetch(&chain).await.unwrap(), [block(1), block(2)]);
    // 4 was used least recently and goes for 5
    assert!(store.offer(hash(5), block(5)).await.unwrap());
    assert_eq!(store.longest(&[hash(4)]).await.unwrap(), 0);
    assert_eq!(store.longest(&[hash(1), hash(2), hash(5)]).await.unwrap(), 3);
    assert!(!store.offer(hash(6), Bytes::from(vec![0; 301])).await.unwrap(), "larger than the store");
    assert_eq!(store.size().await.unwrap(), (3, 300));
}

proptest! {
    #[test]
    fn bytes_are_counted_and_never_above_the_capacity(
        capacity in 0usize..200,
        uses in prop::collection::vec((any::<bool>(), 0u8..20, 0usize..90), 0..200),
    ) {
        let mut lru = Lru::new(capacity);
        let mut kept: Vec<(u8, usize)> = Vec::new();
        for (put, name, len) in uses {
            if put {
                if lru.put(hash(name), Bytes::from(vec![name; len])).is_some() {
                    while kept.iter().map(|k| k.1).sum::<usize>() + len > capacity {
                        kept.remove(0);
                    }
                    kept.push((name, len));
                }
            } else if let Some(bytes) = lru.get(&hash(name)) {
                let at = kept.iter().position(|k| k.0 == name).expect("the model has what the store has");
                let entry = kept.remove(at);
                prop_assert_eq!(bytes.len(), entry.1);
                kept.push(entry);
            }
            prop_assert_eq!(lru.bytes(), kept.iter().map(|k| k.1).sum::<usize>());
            prop_assert_eq!(lru.len(), kept.len());
            prop_assert!(lru.bytes() <= capacity);
        }
    }
}
