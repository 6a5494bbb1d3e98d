//! Looking a chain up: who has how much of it from its start.
//!
//! A look at a block takes as long as the memory takes to bring it, some 100 ns where there are millions; a prompt of
//! 100,000 tokens has 1,563 blocks. So of a long chain one block in 32 is looked at, many at the same time, and where two
//! have the same owners, those between are believed to have them too: a cache evicts a chain from its end, so it has all
//! before a block that it has. Where they differ, the place is halved until it is found.
use super::entries::Slot;
use super::{DISK, PrefixIndex};
use crate::prefixes::Prefixes;
use moesaic_transport::kv::Tier;
use moesaic_types::BlockHash;
use std::sync::Arc;

/// Blocks from one that is looked at to the next; in a chain that is no longer, all are.
pub(super) const STRIDE: usize = 32;

/// Blocks that are looked for at the same time: the memory has many of them on their way at once.
const AT_ONCE: usize = 16;

/// Who has a block.
#[derive(Clone, Copy, Default)]
struct Holders<'a> {
    /// In order; some may be dead.
    replicas: &'a [Slot],
    /// Equal for equal replicas.
    fingerprint: u64,
    tier: Option<Tier>,
}

impl Holders<'_> {
    fn is_like(&self, other: &Self) -> bool {
        self.fingerprint == other.fingerprint && self.tier == other.tier
    }
}

/// What came of a lookup.
#[derive(Debug, Default)]
pub struct Found {
    /// Who has how much.
    pub prefixes: Prefixes,
    /// So many blocks, from the chain's start, should be marked as in use: [`PrefixIndex::mark`].
    pub to_mark: Option<usize>,
}

/// A walk along a chain.
struct Walk<'a> {
    index: &'a PrefixIndex,
    chain: &'a [BlockHash],
    /// Those that have all blocks so far.
    matching: Vec<Slot>,
    /// Those that had so many.
    ended: Vec<(Slot, usize)>,
    /// Of the blocks so far.
    tiers: Vec<Option<Tier>>,
    /// Of the last of these.
    last: Holders<'a>,
    /// Nobody has the next.
    is_over: bool,
}

impl PrefixIndex {
    /// Who has how much of a chain from its start, and what the kv-stores have of it. What is looked up stays longer.
    pub fn prefixes(&self, chain: &[BlockHash]) -> Prefixes {
        let Found { prefixes, to_mark } = self.find(chain);
        if let Some(blocks) = to_mark {
            self.mark(&chain[..blocks]);
        }
        prefixes
    }

    /// The same, which leaves the marking to the caller, who need not wait for it.
    pub fn find(&self, chain: &[BlockHash]) -> Found {
        let mut walk = Walk {
            index: self,
            chain,
            matching: Vec::new(),
            ended: Vec::new(),
            tiers: Vec::new(),
            last: Holders::default(),
            is_over: chain.is_empty(),
        };
        if let Some(first) = chain.first() {
            let holders = self.holders(first);
            walk.matching.extend(holders.replicas);
            walk.take(holders);
        }
        let stride = if chain.len() <= STRIDE { 1 } else { STRIDE };
        while !walk.is_over && walk.tiers.len() < chain.len() {
            walk.stretch(stride);
        }
        walk.found()
    }

    /// Marks the blocks of a chain as in use, unless somebody did so a moment ago.
    pub fn mark(&self, chain: &[BlockHash]) {
        if !chain.last().is_some_and(|last| self.is_to_be_marked(last)) {
            return;
        }
        for place in chain.iter().filter_map(|hash| self.places.get(hash)) {
            place.look_up(self.clock);
        }
    }

    fn holders(&self, hash: &BlockHash) -> Holders<'_> {
        let Some(place) = self.places.get(hash) else { return Holders::default() };
        let (replicas, fingerprint) = place.replicas();
        let stored = place.stores().iter().find(|slot| self.owners.is_live(**slot));
        let tier = stored.map(|slot| if *slot < DISK { Tier::Ram } else { Tier::Disk });
        Holders { replicas, fingerprint, tier }
    }

    /// The chain is in use, and was not marked as such for some time. Where a block is marked, all before it are.
    fn is_to_be_marked(&self, last: &BlockHash) -> bool {
        self.places.get(last).is_some_and(|place| place.is_looked_up_before(self.clock.wrapping_sub(self.mark_after)))
    }
}

impl<'a> Walk<'a> {
    /// The next block has these owners.
    fn take(&mut self, holders: Holders<'a>) {
        let depth = self.tiers.len();
        // those that match are among those of the last block
        if depth > 0 && holders.fingerprint != self.last.fingerprint {
            keep_common(&mut self.matching, holders.replicas, |slot| self.ended.push((slot, depth)));
        }
        self.last = holders;
        self.is_over = self.matching.is_empty() && holders.tier.is_none();
        self.tiers.push(holders.tier);
    }

    /// Looks at the next few blocks that are so far apart, or at the chain's end.
    fn stretch(&mut self, stride: usize) {
        let (index, chain, from) = (self.index, self.chain, self.tiers.len());
        let mut seen = [(0, Holders::default()); AT_ONCE];
        let depths = (1..=AT_ONCE).map(|step| (from - 1 + step * stride).min(chain.len() - 1));
        for (seen, depth) in seen.iter_mut().zip(depths) {
            *seen = (depth, index.holders(&chain[depth]));
        }
        for (depth, holders) in seen {
            self.reach(depth, holders);
        }
    }

    /// Goes on up to a block that has these owners.
    fn reach(&mut self, depth: usize, holders: Holders<'a>) {
        if self.is_over || depth < self.tiers.len() {
            return;
        }
        if holders.is_like(&self.last) {
            self.tiers.resize(depth + 1, holders.tier);
        } else if depth == self.tiers.len() {
            self.take(holders);
        } else {
            let between = (self.tiers.len() + depth) / 2;
            self.reach(between, self.index.holders(&self.chain[between]));
            self.reach(depth, holders);
        }
    }

    fn found(mut self) -> Found {
        let (index, depth) = (self.index, self.tiers.len());
        let numbers = index.owners.numbers();
        self.ended.extend(self.matching.into_iter().map(|slot| (slot, depth)));
        let mut local = Vec::new();
        let live = self.ended.iter().filter_map(|(slot, depth)| Some((index.owners.number(*slot)?, *depth)));
        for (number, depth) in live {
            if local.is_empty() {
                local = vec![0; numbers.end()];
            }
            local[number as usize] = depth as u32;
        }
        // the block where it was over is nobody's
        let known = depth - usize::from(self.is_over && depth > 0);
        let to_mark = (known > 0 && index.is_to_be_marked(&self.chain[known - 1])).then_some(known);
        Found { prefixes: Prefixes::new(Arc::clone(numbers), local, &self.tiers), to_mark }
    }
}

/// Keeps those of the slots that are among the holders; both are in order. `gone` is told of the others.
fn keep_common(slots: &mut Vec<Slot>, holders: &[Slot], mut gone: impl FnMut(Slot)) {
    let mut holders = holders.iter().copied().peekable();
    slots.retain(|slot| {
        while holders.next_if(|holder| holder < slot).is_some() {}
        let stays = holders.peek() == Some(slot);
        if !stays {
            gone(*slot);
        }
        stays
    });
}
