//! Which blocks hold which tokens: an index by block hash, with the unreferenced blocks in order of their last use.
use moesaic_types::BlockHash;
use std::collections::{BTreeMap, HashMap};

/// Index of a KV block in the replica's pool.
pub type BlockIndex = u32;

/// Blocks by name.
#[derive(Debug, Default)]
pub struct PrefixIndex {
    by_hash: HashMap<BlockHash, BlockIndex>,
    names: HashMap<BlockIndex, BlockHash>,
    idle: BTreeMap<u64, BlockIndex>,
    idle_since: HashMap<BlockIndex, u64>,
    clock: u64,
}

impl PrefixIndex {
    /// The block of a name.
    pub fn get(&self, hash: &BlockHash) -> Option<BlockIndex> {
        self.by_hash.get(hash).copied()
    }

    /// The name of a block, if it has one.
    pub fn name(&self, block: BlockIndex) -> Option<BlockHash> {
        self.names.get(&block).copied()
    }

    /// Names a block; false, with nothing changed, if another block has that name or this block has one.
    pub fn insert(&mut self, block: BlockIndex, hash: BlockHash) -> bool {
        if self.by_hash.contains_key(&hash) || self.names.contains_key(&block) {
            return false;
        }
        self.by_hash.insert(hash, block);
        self.names.insert(block, hash);
        true
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

    /// Forgets the block that has been idle longest.
    pub fn evict(&mut self) -> Option<(BlockIndex, BlockHash)> {
        let (_, block) = self.idle.pop_first()?;
        self.idle_since.remove(&block);
        let hash = self.names.remove(&block).expect("only named blocks are set idle");
        self.by_hash.remove(&hash);
        Some((block, hash))
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
