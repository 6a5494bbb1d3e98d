//! Blocks bounded by bytes, the least recently used put out first. Plain data.
use bytes::Bytes;
use moesaic_types::BlockHash;
use std::collections::{BTreeMap, HashMap};

/// The blocks.
#[derive(Debug, Default)]
pub struct Lru {
    capacity: usize,
    bytes: usize,
    clock: u64,
    blocks: HashMap<BlockHash, (Bytes, u64)>,
    by_use: BTreeMap<u64, BlockHash>,
}

impl Lru {
    /// An empty store of `capacity` bytes.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, ..Self::default() }
    }

    /// Bytes that are kept; never above the capacity.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Blocks that are kept.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Whether a block is kept; not a use.
    pub fn contains(&self, hash: &BlockHash) -> bool {
        self.blocks.contains_key(hash)
    }

    /// A block; it is now the most recently used.
    pub fn get(&mut self, hash: &BlockHash) -> Option<Bytes> {
        let (bytes, used) = self.blocks.get_mut(hash)?;
        self.clock += 1;
        self.by_use.remove(used);
        *used = self.clock;
        self.by_use.insert(self.clock, *hash);
        Some(bytes.clone())
    }

    /// Keeps a block and returns how many others went for it; `None` when it is there already or larger than the
    /// whole store.
    pub fn put(&mut self, hash: BlockHash, bytes: Bytes) -> Option<usize> {
        if self.contains(&hash) || bytes.len() > self.capacity {
            return None;
        }
        let mut evicted = 0;
        while self.bytes + bytes.len() > self.capacity {
            let (_, oldest) = self.by_use.pop_first()?;
            if let Some((gone, _)) = self.blocks.remove(&oldest) {
                self.bytes -= gone.len();
                evicted += 1;
            }
        }
        self.clock += 1;
        self.bytes += bytes.len();
        self.by_use.insert(self.clock, hash);
        self.blocks.insert(hash, (bytes, self.clock));
        Some(evicted)
    }
}
