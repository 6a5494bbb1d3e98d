//! Which blocks hold which tokens: an index by block hash, with the unreferenced blocks in order of their last use.
use moesaic_types::{BlockHash, Link};
use std::collections::{BTreeMap, HashMap};

/// Index of a KV block in the replica's pool.
pub type BlockIndex = u32;

/// Blocks by name.
#[derive(Debug, Default)]
pub struct PrefixIndex {
    by_hash: HashMap<BlockHash, BlockIndex>,
    names: HashMap<BlockIndex, Named>,
    idle: BTreeMap<u64, BlockIndex>,
    idle_since: HashMap<BlockIndex, u64>,
    clock: u64,
}

#[derive(Debug)]
struct Named {
    link: Link,
    /// The prefix store was given it, or gave it.
    is_stored: bool,
}

impl PrefixIndex {
    /// The block of a name.
    pub fn get(&self, hash: &BlockHash) -> Option<BlockIndex> {
        self.by_hash.get(hash).copied()
    }

    /// The name of a block, if it has one.
    pub fn name(&self, block: BlockIndex) -> Option<BlockHash> {
        self.names.get(&block).map(|named| named.link.hash)
    }

    /// Names a block; false, with nothing changed, if another block has that name or this block has one.
    pub fn insert(&mut self, block: BlockIndex, link: Link) -> bool {
        if self.by_hash.contains_key(&link.hash) || self.names.contains_key(&block) {
            return false;
        }
        self.by_hash.insert(link.hash, block);
        self.names.insert(block, Named { link, is_stored: false });
        true
    }

    /// The prefix store has this block.
    pub fn set_stored(&mut self, hash: &BlockHash, is_stored: bool) {
        if let Some(named) = self.by_hash.get(hash).and_then(|block| self.names.get_mut(block)) {
            named.is_stored = is_stored;
        }
    }

    /// Whether the prefix store has this block, as far as is known.
    pub fn is_stored(&self, hash: &BlockHash) -> bool {
        self.by_hash.get(hash).and_then(|block| self.names.get(block)).is_some_and(|named| named.is_stored)
    }

    /// Nobody refers to this named block any longer: it may be evicted, after those that were set idle before.
    pub fn set_idle(&mut self, block: BlockIndex) {
        self.clock += 1;
        self.idle.insert(self.clock, block);
        self.idle_since.insert(block, self.clock);
    }

    /// Somebody refers to the block again.
    pub fn set_busy(&mut self, block: BlockIndex) {
        if let Some(since) = self.idle_since.remove(&block) {
            self.idle.remove(&since);
        }
    }

    /// Forgets the block that has been idle longest; also says whether the prefix store has it.
    pub fn evict(&mut self) -> Option<(BlockIndex, Link, bool)> {
        let (_, block) = self.idle.pop_first()?;
        self.idle_since.remove(&block);
        let Named { link, is_stored } = self.names.remove(&block).expect("only named blocks are set idle");
        self.by_hash.remove(&link.hash);
        Some((block, link, is_stored))
    }

    /// Forgets a name; its block, and whether that was idle.
    pub fn remove(&mut self, hash: &BlockHash) -> Option<(BlockIndex, bool)> {
        let block = self.by_hash.remove(hash)?;
        self.names.remove(&block);
        let idle = self.is_idle(block);
        self.set_busy(block);
        Some((block, idle))
    }

    /// Blocks that could be evicted.
    pub fn idle(&self) -> usize {
        self.idle.len()
    }

    /// Whether this block could be evicted.
    pub fn is_idle(&self, block: BlockIndex) -> bool {
        self.idle_since.contains_key(&block)
    }

    /// All names, in no order.
    pub fn hashes(&self) -> impl Iterator<Item = BlockHash> + '_ {
        self.by_hash.keys().copied()
    }
}
