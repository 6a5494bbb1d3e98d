//! Bookkeeping of the KV pool: reference counts, the free list, and the prefix cache. Holds no keys or values.
pub use crate::prefix::BlockIndex;
use crate::prefix::PrefixIndex;
use moesaic_types::boundary::KvEvent;
use moesaic_types::{BlockHash, Link};

/// Above this many gathered events the pool says everything anew instead.
const MAX_PENDING_EVENTS: usize = 4096;

/// Blocks that are told anew at most, four million tokens: listeners lose events that come faster than they are read.
const MAX_TOLD_ANEW: usize = 1 << 16;

/// What a lookup would find, without taking it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hits {
    /// Blocks from the chain's start.
    pub blocks: usize,
    /// Of those, blocks that nobody refers to: taking them makes them unavailable to others.
    pub idle: usize,
}

/// The blocks of one replica. A block is free, or referenced, or idle (named and unreferenced).
#[derive(Debug)]
pub struct BlockPool {
    references: Vec<u32>,
    free: Vec<BlockIndex>,
    index: PrefixIndex,
    stored: Vec<BlockHash>,
    gone: Vec<BlockHash>,
    events: Vec<KvEvent>,
    evicted: Vec<(BlockIndex, Link)>,
}

impl BlockPool {
    /// A pool of free blocks.
    pub fn new(blocks: usize) -> Self {
        Self {
            references: vec![0; blocks],
            free: (0..blocks as BlockIndex).rev().collect(),
            index: PrefixIndex::default(),
            stored: Vec::new(),
            gone: Vec::new(),
            events: vec![KvEvent::Cleared],
            evicted: Vec::new(),
        }
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.references.len()
    }

    /// Blocks that `allocate` can give: free ones and idle ones.
    pub fn available(&self) -> usize {
        self.free.len() + self.index.idle()
    }

    /// Unreferenced blocks that still hold reusable tokens.
    pub fn cached(&self) -> usize {
        self.index.idle()
    }

    /// Blocks that someone refers to.
    pub fn used(&self) -> usize {
        self.total() - self.available()
    }

    /// Takes a block for new tokens; evicts the block that was idle longest if none is free.
    pub fn allocate(&mut self) -> Option<BlockIndex> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => {
                let (block, link, is_stored) = self.index.evict()?;
                self.flush_stored();
                self.gone.push(link.hash);
                if !is_stored {
                    self.evicted.push((block, link));
                }
                block
            }
        };
        debug_assert_eq!(self.references[block as usize], 0);
        self.references[block as usize] = 1;
        Some(block)
    }

    /// Gives a reference back. Release a sequence's blocks last to first, so that a chain's tail is evicted first.
    pub fn release(&mut self, block: BlockIndex) {
        let count = &mut self.references[block as usize];
        assert!(*count > 0, "block {block} was released more often than taken");
        *count -= 1;
        if *count == 0 {
            if self.index.name(block).is_some() {
                self.index.set_idle(block);
            } else {
                self.free.push(block);
            }
        }
    }

    /// Names a full block so that others can share it. False if another block has that name already.
    pub fn register(&mut self, block: BlockIndex, link: Link) -> bool {
        debug_assert!(self.references[block as usize] > 0);
        let named = self.index.insert(block, link);
        if named {
            self.flush_gone();
            self.stored.push(link.hash);
        }
        named
    }

    /// The prefix store has this block: it need not be offered when it is evicted.
    pub fn set_stored(&mut self, hash: &BlockHash) {
        self.index.set_stored(hash, true);
    }

    /// The prefix store did not get this block after all.
    pub fn set_unstored(&mut self, hash: &BlockHash) {
        self.index.set_stored(hash, false);
    }

    /// The block of a name that the prefix store does not have, as far as is known.
    pub fn unstored(&self, hash: &BlockHash) -> Option<BlockIndex> {
        self.index.get(hash).filter(|_| !self.index.is_stored(hash))
    }

    /// Takes a block's name away, so that nobody shares it from now on. Who refers to it keeps it.
    pub fn forget(&mut self, hash: &BlockHash) {
        if let Some((block, idle)) = self.index.remove(hash) {
            self.flush_stored();
            self.gone.push(*hash);
            if idle {
                self.free.push(block);
            }
        }
    }

    /// What `acquire` would find.
    pub fn peek(&self, chain: &[BlockHash]) -> Hits {
        let mut hits = Hits::default();
        for block in chain.iter().map_while(|hash| self.index.get(hash)) {
            hits.blocks += 1;
            hits.idle += usize::from(self.index.is_idle(block));
        }
        hits
    }

    /// Takes a reference to each block of the longest chain that is here.
    pub fn acquire(&mut self, chain: &[BlockHash]) -> Vec<BlockIndex> {
        let blocks: Vec<_> = chain.iter().map_while(|hash| self.index.get(hash)).collect();
        for &block in &blocks {
            self.index.set_busy(block);
            self.references[block as usize] += 1;
        }
        blocks
    }

    /// Blocks among these that become available when released.
    pub fn exclusive(&self, blocks: &[BlockIndex]) -> usize {
        blocks.iter().filter(|&&block| self.references[block as usize] == 1).count()
    }

    /// Blocks evicted since the last call that the prefix store does not have. Their contents stand until something writes to the pool.
    pub fn take_evicted(&mut self) -> Vec<(BlockIndex, Link)> {
        std::mem::take(&mut self.evicted)
    }

    /// Events since the last call, in order.
    pub fn take_events(&mut self) -> Vec<KvEvent> {
        self.flush_stored();
        self.flush_gone();
        std::mem::take(&mut self.events)
    }

    /// Puts events back that could not be sent; too many are replaced by a statement of everything that is here.
    pub fn return_events(&mut self, mut unsent: Vec<KvEvent>) {
        unsent.append(&mut self.events);
        self.events = unsent;
        if self.events.len() > MAX_PENDING_EVENTS {
            self.tell_anew();
        }
    }

    /// The next events say everything that is here, whatever was said before.
    pub fn tell_anew(&mut self) {
        let mut blocks: Vec<_> = self.index.hashes().collect();
        blocks.sort_unstable();
        blocks.truncate(MAX_TOLD_ANEW);
        self.stored.clear();
        self.gone.clear();
        self.events = vec![KvEvent::Cleared, KvEvent::Stored { blocks }];
    }

    fn flush_stored(&mut self) {
        if !self.stored.is_empty() {
            self.events.push(KvEvent::Stored { blocks: std::mem::take(&mut self.stored) });
        }
    }

    fn flush_gone(&mut self) {
        if !self.gone.is_empty() {
            self.events.push(KvEvent::Evicted { blocks: std::mem::take(&mut self.gone) });
        }
    }

    /// Checks that every block is in exactly one state. Linear in the pool; for tests.
    pub fn check(&self) -> Result<(), String> {
        let mut free = vec![false; self.total()];
        for &block in &self.free {
            if std::mem::replace(&mut free[block as usize], true) {
                return Err(format!("block {block} is free twice"));
            }
        }
        for (block, &references) in self.references.iter().enumerate() {
            let idle = self.index.is_idle(block as BlockIndex);
            let states = usize::from(free[block]) + usize::from(references > 0) + usize::from(idle);
            if states != 1 {
                return Err(format!("block {block}: free {}, references {references}, idle {idle}", free[block]));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hash(n: u8) -> BlockHash {
        BlockHash([n; 16])
    }

    fn link(n: u8) -> Link {
        Link::of(&[hash(n)], 0)
    }

    #[test]
    fn what_the_store_has_is_not_offered_again() {
        let mut pool = BlockPool::new(2);
        let (a, b) = (pool.allocate().unwrap(), pool.allocate().unwrap());
        assert!(pool.register(a, link(1)) && pool.register(b, link(2)));
        assert_eq!((pool.unstored(&hash(1)), pool.unstored(&hash(3))), (Some(a), None));
        pool.set_stored(&hash(1));
        assert_eq!(pool.unstored(&hash(1)), None);
        pool.set_unstored(&hash(1));
        assert_eq!(pool.unstored(&hash(1)), Some(a));
        pool.set_stored(&hash(1));
        [a, b].into_iter().for_each(|block| pool.release(block));
        assert!(pool.allocate().is_some() && pool.allocate().is_some());
        assert_eq!(pool.take_evicted(), [(b, link(2))]);
        assert!(pool.register(a, link(1)));
        assert_eq!(pool.unstored(&hash(1)), Some(a), "computed again, it is another block");
    }

    #[test]
    fn the_tail_of_the_oldest_chain_is_evicted_first() {
        let mut pool = BlockPool::new(2);
        let (a, b) = (pool.allocate().unwrap(), pool.allocate().unwrap());
        assert!(pool.register(a, link(1)) && pool.register(b, link(2)));
        assert!(pool.allocate().is_none());
        pool.release(b);
        pool.release(a);
        assert_eq!(pool.peek(&[hash(1), hash(2)]), Hits { blocks: 2, idle: 2 });
        assert_eq!(pool.allocate(), Some(b));
        assert_eq!(pool.take_evicted(), vec![(b, link(2))]);
        assert_eq!(pool.acquire(&[hash(1), hash(2)]), vec![a]);
        let stored = KvEvent::Stored { blocks: vec![hash(1), hash(2)] };
        assert_eq!(pool.take_events(), vec![KvEvent::Cleared, stored, KvEvent::Evicted { blocks: vec![hash(2)] }]);
    }

    proptest! {
        #[test]
        fn blocks_are_never_lost_nor_given_twice(
            size in 1usize..12,
            steps in prop::collection::vec((0u8..5, 0u8..6, 1usize..5), 1..200),
        ) {
            let mut pool = BlockPool::new(size);
            let mut held: Vec<Vec<BlockIndex>> = Vec::new();
            let mut known = std::collections::BTreeSet::new();
            for (action, name, count) in steps {
                match action {
                    0 => {
                        let available = pool.available();
                        let blocks: Vec<_> = (0..count).map_while(|_| pool.allocate()).collect();
                        prop_assert_eq!(blocks.len(), count.min(available));
                        for block in &blocks {
                            prop_assert!(held.iter().flatten().all(|other| other != block));
                        }
                        held.push(blocks);
                    }
                    1 if !held.is_empty() => {
                        let blocks = held.swap_remove(name as usize % held.len());
                        blocks.into_iter().rev().for_each(|block| pool.release(block));
                    }
                    2 => if let Some(&block) = held.iter().flatten().next() {
                        pool.register(block, link(name));
                    },
                    3 => {
                        pool.forget(&hash(name));
                        prop_assert_eq!(pool.peek(&[hash(name)]), Hits::default());
                    }
                    _ => {
                        let hits = pool.peek(&[hash(name)]);
                        let blocks = pool.acquire(&[hash(name)]);
                        prop_assert_eq!(hits.blocks, blocks.len());
                        held.push(blocks);
                    }
                }
                for event in pool.take_events() {
                    match event {
                        KvEvent::Cleared => known.clear(),
                        KvEvent::Stored { blocks } => known.extend(blocks),
                        KvEvent::Evicted { blocks } => blocks.iter().for_each(|b| { known.remove(b); }),
                    }
                }
                let here: std::collections::BTreeSet<_> = pool.index.hashes().collect();
                prop_assert_eq!(&known, &here);
                prop_assert_eq!(pool.check(), Ok(()));
            }
            held.into_iter().flatten().for_each(|block| pool.release(block));
            prop_assert_eq!(pool.available(), size);
            prop_assert_eq!(pool.used(), 0);
        }
    }
}
