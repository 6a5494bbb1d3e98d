//! `PrefixStore`: chains from their start, in order, each block as it was offered.
use bytes::Bytes;
use futures::TryStreamExt;
use moesaic_types::boundary::PrefixStore;
use moesaic_types::{BlockHash, GROUP_BLOCKS, Link, Result};
use std::sync::Arc;

/// A block's name and bytes, both made from a number.
pub fn block(number: u32) -> (BlockHash, Bytes) {
    let mut hash = [0x5a; 16];
    hash[..4].copy_from_slice(&number.to_le_bytes());
    let bytes: Vec<u8> = (0..257u32).map(|i| number.wrapping_mul(31).wrapping_add(i) as u8).collect();
    (BlockHash(hash), Bytes::from(bytes))
}

/// The names of the blocks of some numbers.
pub fn chain(numbers: impl IntoIterator<Item = u32>) -> Vec<BlockHash> {
    numbers.into_iter().map(|number| block(number).0).collect()
}

/// Everything that a store gives for a chain.
///
/// # Errors
/// The store's own.
pub async fn fetched(store: &dyn PrefixStore, chain: &[BlockHash], from: usize) -> Result<Vec<Bytes>> {
    store.fetch(chain, from).try_collect().await
}

/// Checks an empty prefix store with room for at least 64 KiB.
pub async fn prefix_store(store: Arc<dyn PrefixStore>) {
    one_chain(&*store).await;
    groups(&*store).await;
    taken_once(&store).await;
    forgotten(&*store).await;
}

async fn one_chain(store: &dyn PrefixStore) {
    let blocks: Vec<_> = (0..6).map(block).collect();
    let chain = chain(0..6);
    let bytes = |range: std::ops::Range<usize>| blocks[range].iter().map(|(_, bytes)| bytes.clone()).collect();
    assert_eq!(store.longest(&[], 0).await, Ok(0));
    assert_eq!(fetched(store, &[], 0).await, Ok(vec![]));
    assert_eq!(store.longest(&chain, 0).await, Ok(0));
    assert_eq!(fetched(store, &chain, 0).await, Ok(vec![]));

    for number in [0, 1, 3, 4] {
        let taken = store.offer(Link::of(&chain, number), blocks[number].1.clone()).await;
        assert_eq!(taken, Ok(true), "there is room");
    }
    let again = store.offer(Link::of(&chain, 1), blocks[1].1.clone()).await;
    assert_eq!(again, Ok(false), "it has the block");
    assert_eq!(store.longest(&chain, 0).await, Ok(2), "the chain breaks at the third block");
    assert_eq!(fetched(store, &chain, 0).await, Ok(bytes(0..2)));
    assert_eq!(store.longest(&chain, 1).await, Ok(1), "one may ask from any block on");
    assert_eq!(store.longest(&chain, 3).await, Ok(2), "also beyond a hole");
    assert_eq!(fetched(store, &chain, 3).await, Ok(bytes(3..5)));
    assert_eq!(store.longest(&chain, 2).await, Ok(0), "but not from one");
    for beyond in [6, 7, 1000] {
        assert_eq!(store.longest(&chain, beyond).await, Ok(0));
        assert_eq!(fetched(store, &chain, beyond).await, Ok(vec![]));
    }

    let taken = store.offer(Link::of(&chain, 2), blocks[2].1.clone()).await;
    assert_eq!(taken, Ok(true));
    assert_eq!(store.longest(&chain, 0).await, Ok(5));
    assert_eq!(fetched(store, &chain, 0).await, Ok(bytes(0..5)));
}

/// A chain of several groups, which may be kept in several places.
async fn groups(store: &dyn PrefixStore) {
    let numbers: Vec<u32> = (1000..1000 + 3 * GROUP_BLOCKS as u32 + 2).collect();
    let chain = chain(numbers.iter().copied());
    for (position, number) in numbers.iter().enumerate() {
        assert_eq!(store.offer(Link::of(&chain, position), block(*number).1).await, Ok(true));
    }
    for from in [0, 1, GROUP_BLOCKS - 1, GROUP_BLOCKS, 2 * GROUP_BLOCKS + 3, chain.len() - 1] {
        let expected: Vec<Bytes> = numbers[from..].iter().map(|number| block(*number).1).collect();
        assert_eq!(store.longest(&chain, from).await, Ok(expected.len()));
        assert_eq!(fetched(store, &chain, from).await, Ok(expected));
    }
    let mut forked = chain.clone();
    forked[GROUP_BLOCKS + 1] = block(5000).0;
    assert_eq!(store.longest(&forked, 0).await, Ok(GROUP_BLOCKS + 1));
    assert_eq!(fetched(store, &forked, 2).await.map(|blocks| blocks.len()), Ok(GROUP_BLOCKS - 1));
}

/// What is dropped is not given any longer, wherever it is, and is taken again.
async fn forgotten(store: &dyn PrefixStore) {
    let numbers: Vec<u32> = (2000..2000 + 2 * GROUP_BLOCKS as u32).collect();
    let chain = chain(numbers.iter().copied());
    for (position, number) in numbers.iter().enumerate() {
        assert_eq!(store.offer(Link::of(&chain, position), block(*number).1).await, Ok(true));
    }
    for gone in [GROUP_BLOCKS + 3, 2] {
        assert_eq!(store.forget(&[chain[gone], block(6000).0]).await, Ok(()), "it may have some of them only");
        assert_eq!(store.longest(&chain, 0).await, Ok(gone));
        assert_eq!(fetched(store, &chain, 0).await.map(|blocks| blocks.len()), Ok(gone));
        assert_eq!(store.longest(&chain, gone).await, Ok(0));
    }
    let other = Bytes::from_static(b"computed again");
    assert_eq!(store.offer(Link::of(&chain, 2), other.clone()).await, Ok(true));
    assert_eq!(fetched(store, &chain[..3], 2).await, Ok(vec![other]));
    assert_eq!(store.forget(&chain).await, Ok(()));
    assert_eq!(store.longest(&chain, 0).await, Ok(0));
}

async fn taken_once(store: &Arc<dyn PrefixStore>) {
    let offers: Vec<_> = (0..8)
        .map(|_| {
            let store = Arc::clone(store);
            tokio::spawn(async move {
                let (hash, bytes) = block(100);
                store.offer(Link::of(&[hash], 0), bytes).await.expect("offer works")
            })
        })
        .collect();
    let mut taken = 0;
    for offer in offers {
        taken += u32::from(offer.await.expect("no task panics"));
    }
    assert_eq!(taken, 1, "a block is taken once");
}
