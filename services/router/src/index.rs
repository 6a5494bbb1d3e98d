//! Which replica is believed to have which KV blocks. Plain data, bounded.
//!
//! The index is a hint: a block that it misses costs some prefill, a block that it wrongly has costs the same. So a
//! gap in a replica's events clears what is known of it, and when the index is full the oldest entries go.
use moesaic_types::boundary::KvEvent;
use moesaic_types::{BlockHash, ReplicaId};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// A replica's life in the index. Clearing a replica gives it a new number; entries of old numbers are dead, and
/// leave as they get old.
type Slot = u32;

/// What came of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// It was the next one.
    InOrder,
    /// Events before it were lost; what was known of the replica is cleared, then it was applied.
    AfterGap,
    /// It, or a later one, was applied before.
    Stale,
}

/// Blocks and who has them.
#[derive(Debug)]
pub struct PrefixIndex {
    max_entries: usize,
    entries: usize,
    holders: HashMap<BlockHash, Vec<Holder>>,
    replicas: HashMap<ReplicaId, Feed>,
    live: HashMap<Slot, ReplicaId>,
    next_slot: Slot,
    /// Entries by age; one that was stored again since has another stamp and is skipped.
    ages: VecDeque<(BlockHash, Slot, u64)>,
    next_stamp: u64,
}

#[derive(Clone, Copy, Debug)]
struct Holder {
    slot: Slot,
    stamp: u64,
}

#[derive(Debug)]
struct Feed {
    slot: Slot,
    source: Arc<str>,
    sequence: u64,
}

impl PrefixIndex {
    /// An empty index that remembers at most `max_entries` (a block at a replica).
    pub fn new(max_entries: usize) -> Self {
        Self {
            max_entries: max_entries.max(1),
            entries: 0,
            holders: HashMap::new(),
            replicas: HashMap::new(),
            live: HashMap::new(),
            next_slot: 0,
            ages: VecDeque::new(),
            next_stamp: 0,
        }
    }

    /// Entries that are kept, dead ones included; never more than the bound.
    pub fn len(&self) -> usize {
        self.entries
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Applies an event of a replica. `source` is the replica's life; a new life has no blocks of the old one.
    pub fn apply(&mut self, replica: &ReplicaId, source: &Arc<str>, sequence: u64, event: &KvEvent) -> Applied {
        let known = self.replicas.get(replica).map(|feed| (feed.source == *source, feed.sequence));
        let applied = match known {
            Some((true, last)) if sequence <= last => return Applied::Stale,
            Some((true, last)) if sequence == last + 1 => Applied::InOrder,
            // Of a life that was never heard of nothing is known that a gap could make wrong.
            None | Some((false, _)) => Applied::InOrder,
            Some((true, _)) => Applied::AfterGap,
        };
        let same_feed = matches!(known, Some((true, _))) && applied == Applied::InOrder;
        if !same_feed || *event == KvEvent::Cleared {
            self.clear(replica);
        }
        let slot = self.slot(replica, source, sequence);
        match event {
            KvEvent::Stored { blocks } => blocks.iter().for_each(|hash| self.store(*hash, slot)),
            KvEvent::Evicted { blocks } => blocks.iter().for_each(|hash| self.evict(hash, slot)),
            KvEvent::Cleared => {}
        }
        applied
    }

    /// Forgets a replica.
    pub fn forget(&mut self, replica: &ReplicaId) {
        self.clear(replica);
    }

    /// How many blocks of `chain`, from its start, each replica has; only those that have the first.
    pub fn overlap(&self, chain: &[BlockHash]) -> HashMap<ReplicaId, usize> {
        let mut matching: Vec<Slot> = Vec::new();
        let mut found = HashMap::new();
        let mut settle = |slot: Slot, depth: usize| {
            if let Some(replica) = self.live.get(&slot) {
                found.insert(replica.clone(), depth);
            }
        };
        for (depth, hash) in chain.iter().enumerate() {
            let holders = self.holders.get(hash).map(Vec::as_slice).unwrap_or_default();
            if depth == 0 {
                matching.extend(holders.iter().map(|holder| holder.slot).filter(|slot| self.live.contains_key(slot)));
            } else {
                matching.retain(|slot| {
                    let goes_on = holders.iter().any(|holder| holder.slot == *slot);
                    if !goes_on {
                        settle(*slot, depth);
                    }
                    goes_on
                });
            }
            if matching.is_empty() {
                break;
            }
        }
        matching.into_iter().for_each(|slot| settle(slot, chain.len()));
        found
    }

    fn clear(&mut self, replica: &ReplicaId) {
        if let Some(feed) = self.replicas.remove(replica) {
            self.live.remove(&feed.slot);
        }
    }

    /// The replica's slot, a new one if it has none, with its feed moved to this event.
    fn slot(&mut self, replica: &ReplicaId, source: &Arc<str>, sequence: u64) -> Slot {
        if let Some(feed) = self.replicas.get_mut(replica) {
            feed.sequence = sequence;
            return feed.slot;
        }
        let slot = self.next_slot;
        self.next_slot = self.next_slot.wrapping_add(1);
        self.live.insert(slot, replica.clone());
        self.replicas.insert(replica.clone(), Feed { slot, source: Arc::clone(source), sequence });
        slot
    }

    fn store(&mut self, hash: BlockHash, slot: Slot) {
        let stamp = self.next_stamp;
        self.next_stamp += 1;
        let holders = self.holders.entry(hash).or_default();
        match holders.iter_mut().find(|holder| holder.slot == slot) {
            Some(holder) => holder.stamp = stamp,
            None => {
                holders.push(Holder { slot, stamp });
                self.entries += 1;
            }
        }
        self.ages.push_back((hash, slot, stamp));
        while self.entries > self.max_entries {
            let Some((hash, slot, stamp)) = self.ages.pop_front() else { break };
            self.remove(&hash, |holder| holder.slot == slot && holder.stamp == stamp);
        }
        // Blocks that come and go leave outdated ages behind.
        if self.ages.len() > 2 * self.max_entries {
            let holders = &self.holders;
            self.ages.retain(|(hash, slot, stamp)| {
                let holders = holders.get(hash).map(Vec::as_slice).unwrap_or_default();
                holders.iter().any(|holder| holder.slot == *slot && holder.stamp == *stamp)
            });
        }
    }

    fn evict(&mut self, hash: &BlockHash, slot: Slot) {
        self.remove(hash, |holder| holder.slot == slot);
    }

    fn remove(&mut self, hash: &BlockHash, which: impl Fn(&Holder) -> bool) {
        if let Some(holders) = self.holders.get_mut(hash) {
            let before = holders.len();
            holders.retain(|holder| !which(holder));
            self.entries -= before - holders.len();
            if holders.is_empty() {
                self.holders.remove(hash);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    fn hash(number: u8) -> BlockHash {
        BlockHash([number; 16])
    }

    fn hashes(numbers: &[u8]) -> Vec<BlockHash> {
        numbers.iter().copied().map(hash).collect()
    }

    fn stored(numbers: &[u8]) -> KvEvent {
        KvEvent::Stored { blocks: hashes(numbers) }
    }

    fn evicted(numbers: &[u8]) -> KvEvent {
        KvEvent::Evicted { blocks: hashes(numbers) }
    }

    fn overlap(index: &PrefixIndex, chain: &[u8]) -> BTreeMap<String, usize> {
        index.overlap(&hashes(chain)).into_iter().map(|(id, depth)| (id.to_string(), depth)).collect()
    }

    fn expected(pairs: &[(&str, usize)]) -> BTreeMap<String, usize> {
        pairs.iter().map(|(id, depth)| ((*id).to_owned(), *depth)).collect()
    }

    #[test]
    fn overlap_counts_from_the_start_of_the_chain() {
        let (a, b, life) = (ReplicaId::new("a"), ReplicaId::new("b"), Arc::from("1"));
        let mut index = PrefixIndex::new(100);
        assert_eq!(index.apply(&a, &life, 1, &stored(&[1, 2, 3])), Applied::InOrder);
        assert_eq!(index.apply(&b, &life, 1, &stored(&[1, 3, 9])), Applied::InOrder);
        assert_eq!(overlap(&index, &[1, 2, 3, 4]), expected(&[("a", 3), ("b", 1)]));
        assert_eq!(overlap(&index, &[9, 1, 2]), expected(&[("b", 2)]));
        assert_eq!(overlap(&index, &[4, 1]), expected(&[]));
        assert_eq!(overlap(&index, &[]), expected(&[]));
        index.apply(&a, &life, 2, &evicted(&[2, 77]));
        assert_eq!(overlap(&index, &[1, 2, 3]), expected(&[("a", 1), ("b", 1)]));
        index.apply(&a, &life, 3, &KvEvent::Cleared);
        assert_eq!(overlap(&index, &[1]), expected(&[("b", 1)]));
        index.apply(&a, &life, 4, &stored(&[1]));
        index.forget(&b);
        assert_eq!(overlap(&index, &[1]), expected(&[("a", 1)]));
    }

    #[test]
    fn a_gap_or_a_new_life_clears_the_replica_alone() {
        let (a, b) = (ReplicaId::new("a"), ReplicaId::new("b"));
        let (first, second) = (Arc::from("1"), Arc::from("2"));
        let mut index = PrefixIndex::new(100);
        index.apply(&b, &first, 1, &stored(&[1, 2]));
        // Subscribed late: the first number that is seen is no gap.
        assert_eq!(index.apply(&a, &first, 5, &stored(&[1, 2])), Applied::InOrder);
        assert_eq!(index.apply(&a, &first, 5, &stored(&[3])), Applied::Stale);
        assert_eq!(overlap(&index, &[3]), expected(&[]));
        assert_eq!(index.apply(&a, &first, 7, &stored(&[3])), Applied::AfterGap);
        assert_eq!(overlap(&index, &[1, 2]), expected(&[("b", 2)]));
        assert_eq!(overlap(&index, &[3]), expected(&[("a", 1)]));
        assert_eq!(index.apply(&a, &first, 8, &stored(&[1])), Applied::InOrder);
        assert_eq!(index.apply(&a, &second, 1, &stored(&[4])), Applied::InOrder);
        assert_eq!(overlap(&index, &[1]), expected(&[("b", 1)]), "the old life's blocks are gone");
        assert_eq!(overlap(&index, &[4]), expected(&[("a", 1)]));
    }

    #[test]
    fn the_oldest_entries_go_first_and_storing_again_makes_new() {
        let (a, life) = (ReplicaId::new("a"), Arc::from("1"));
        let mut index = PrefixIndex::new(3);
        for (sequence, number) in [1, 2, 3, 1, 4].into_iter().enumerate() {
            index.apply(&a, &life, sequence as u64 + 1, &stored(&[number]));
        }
        assert_eq!(index.len(), 3);
        let kept: Vec<u8> = (1..=4).filter(|&number| !overlap(&index, &[number]).is_empty()).collect();
        assert_eq!(kept, [1, 3, 4]);
    }

    proptest! {
        #[test]
        fn within_its_bound_the_index_is_exact_and_it_never_grows_beyond(
            events in prop::collection::vec(
                (0u8..3, 0u8..10, prop::collection::vec(0u8..12, 0..5), 1u64..3), 0..120),
            chain in prop::collection::vec(0u8..12, 0..6),
            small in 1usize..8,
        ) {
            // 3 replicas x 12 blocks, with room for the dead: 120 events clear at most 120 times 12 entries.
            let (mut roomy, mut tight) = (PrefixIndex::new(10_000), PrefixIndex::new(small));
            let life: Arc<str> = Arc::from("1");
            let mut model: BTreeMap<u8, (u64, BTreeSet<u8>)> = BTreeMap::new();
            for (replica, kind, numbers, step) in events {
                let id = ReplicaId::new(replica.to_string());
                let event = match kind {
                    0 => KvEvent::Cleared,
                    1..=3 => evicted(&numbers),
                    _ => stored(&numbers),
                };
                let (sequence, blocks) = model.entry(replica).or_default();
                let first = *sequence == 0;
                *sequence += step;
                if (step > 1 && !first) || kind == 0 {
                    blocks.clear();
                }
                match kind {
                    0 => {}
                    1..=3 => numbers.iter().for_each(|number| { blocks.remove(number); }),
                    _ => blocks.extend(&numbers),
                }
                let gap = if step > 1 && !first { Applied::AfterGap } else { Applied::InOrder };
                prop_assert_eq!(roomy.apply(&id, &life, *sequence, &event), gap);
                tight.apply(&id, &life, *sequence, &event);
                prop_assert!(tight.len() <= small && tight.ages.len() <= 2 * small + 1);
                prop_assert_eq!(tight.len(), tight.holders.values().map(Vec::len).sum::<usize>());
            }
            let exact: BTreeMap<String, usize> = model
                .iter()
                .map(|(id, (_, blocks))| (id.to_string(), chain.iter().take_while(|n| blocks.contains(n)).count()))
                .filter(|(_, depth)| *depth > 0)
                .collect();
            prop_assert_eq!(overlap(&roomy, &chain), exact.clone());
            for (id, depth) in overlap(&tight, &chain) {
                prop_assert!(depth <= exact.get(&id).copied().unwrap_or(0), "a bound only forgets");
            }
        }
    }
}
