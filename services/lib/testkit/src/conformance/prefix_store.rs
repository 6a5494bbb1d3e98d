//! `PrefixStore`: chains from their start, in order, each block as it was offered.
use bytes::Bytes;
use moesaic_types::BlockHash;
use moesaic_types::boundary::PrefixStore;
use std::sync::Arc;

/// A block's name and bytes, both made from a number.
pub fn block(number: u32) -> (BlockHash, Bytes) {
    let mut hash = [0x5a; 16];
    hash[..4].copy_from_slice(&number.to_le_bytes());
    let bytes: Vec<u8> = (0..257u32).map(|i| number.wrapping_mul(31).wrapping_add(i) as u8).collect();
    (BlockHash(hash), Bytes::from(bytes))
}

/// Checks an empty prefix store with room for at least 64 KiB.
pub async fn prefix_store(store: Arc<dyn PrefixStore>) {
    let blocks: Vec<_> = (0..6).map(block).collect();
    let chain: Vec<BlockHash> = blocks.iter().map(|(hash, _)| *hash).collect();
    assert_eq!(store.longest(&[]).await, Ok(0));
    assert_eq!(store.fetch(&[]).await, Ok(vec![]));
    assert_eq!(store.longest(&chain).await, Ok(0));
    assert_eq!(store.fetch(&chain).await, Ok(vec![]));

    for number in [0, 1, 3, 4] {
        let (hash, bytes) = blocks[number].clone();
        assert_eq!(store.offer(hash, bytes).await, Ok(true), "there is room");
    }
    let (hash, bytes) = blocks[1].clone();
    assert_eq!(store.offer(hash, bytes).await, Ok(false), "it has the block");
    assert_eq!(store.longest(&chain).await, Ok(2), "the chain breaks at the third block");
    assert_eq!(store.fetch(&chain).await, Ok(vec![blocks[0].1.clone(), blocks[1].1.clone()]));
    assert_eq!(store.longest(&chain[3..]).await, Ok(2), "a chain may begin anywhere");
    assert_eq!(store.longest(&chain[2..]).await, Ok(0), "but not with a hole");

    let (hash, bytes) = blocks[2].clone();
    assert_eq!(store.offer(hash, bytes).await, Ok(true));
    assert_eq!(store.longest(&chain).await, Ok(5));
    let expected: Vec<Bytes> = blocks[..5].iter().map(|(_, bytes)| bytes.clone()).collect();
    assert_eq!(store.fetch(&chain).await, Ok(expected));

    let offers: Vec<_> = (0..8)
        .map(|_| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let (hash, bytes) = block(100);
                store.offer(hash, bytes).await.expect("offer works")
            })
        })
        .collect();
    let mut taken = 0;
    for offer in offers {
        taken += u32::from(offer.await.expect("no task panics"));
    }
    assert_eq!(taken, 1, "a block is taken once");
}
