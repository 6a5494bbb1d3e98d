//! Owns the blocks. A restart begins empty: what was kept is computed again.
use crate::lru::Lru;
use actix::{Actor, Context, Handler, Message, MessageResult};
use bytes::Bytes;
use metrics::{counter, gauge};
use moesaic_telemetry::metrics as names;
use moesaic_types::BlockHash;

/// The actor's state.
pub struct BlockPool {
    lru: Lru,
}

impl BlockPool {
    /// An empty pool of `capacity` bytes.
    pub fn new(capacity: usize) -> Self {
        gauge!(names::KV_STORE_BYTES).set(0.0);
        Self { lru: Lru::new(capacity) }
    }
}

impl Actor for BlockPool {
    type Context = Context<Self>;
}

/// How many blocks of a chain are kept, from its start.
#[derive(Message)]
#[rtype(result = "usize")]
pub struct Longest(
    /// The chain.
    pub Vec<BlockHash>,
);

impl Handler<Longest> for BlockPool {
    type Result = usize;

    fn handle(&mut self, Longest(chain): Longest, _: &mut Context<Self>) -> usize {
        chain.iter().take_while(|hash| self.lru.contains(hash)).count()
    }
}

/// A chain's blocks from its start, up to the first that is not kept.
#[derive(Message)]
#[rtype(result = "Vec<Bytes>")]
pub struct Fetch(
    /// The chain.
    pub Vec<BlockHash>,
);

impl Handler<Fetch> for BlockPool {
    type Result = MessageResult<Fetch>;

    fn handle(&mut self, Fetch(chain): Fetch, _: &mut Context<Self>) -> Self::Result {
        let found: Vec<Bytes> = chain.iter().map_while(|hash| self.lru.get(hash)).collect();
        // A block is of no use without those before it: the chain's end goes first.
        chain[..found.len()].iter().rev().for_each(|hash| drop(self.lru.get(hash)));
        counter!(names::KV_STORE_HITS_TOTAL).increment(found.len() as u64);
        counter!(names::KV_STORE_MISSES_TOTAL).increment(u64::from(found.len() < chain.len()));
        MessageResult(found)
    }
}

/// Keeps a block; false when it is there already or has no room.
#[derive(Message)]
#[rtype(result = "bool")]
pub struct Offer {
    /// Its name.
    pub hash: BlockHash,
    /// Its bytes.
    pub bytes: Bytes,
}

impl Handler<Offer> for BlockPool {
    type Result = bool;

    fn handle(&mut self, offer: Offer, _: &mut Context<Self>) -> bool {
        let kept = self.lru.put(offer.hash, offer.bytes);
        if let Some(evicted) = kept {
            counter!(names::KV_STORE_EVICTIONS_TOTAL).increment(evicted as u64);
            gauge!(names::KV_STORE_BYTES).set(self.lru.bytes() as f64);
        }
        kept.is_some()
    }
}

/// Blocks and bytes that are kept.
#[derive(Message)]
#[rtype(result = "(usize, usize)")]
pub struct Size;

impl Handler<Size> for BlockPool {
    type Result = MessageResult<Size>;

    fn handle(&mut self, _: Size, _: &mut Context<Self>) -> Self::Result {
        MessageResult((self.lru.len(), self.lru.bytes()))
    }
}
