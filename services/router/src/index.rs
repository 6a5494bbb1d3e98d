//! Which replica and which kv-store is believed to have which KV blocks. Plain data, bounded.
//!
//! The index is a hint: a block that it misses costs some prefill, a block that it wrongly has costs the same. So a
//! gap in an owner's events clears what is known of it until it tells everything anew, and when the index is full the
//! oldest entries go.
use crate::prefixes::Prefixes;
use moesaic_transport::kv::Tier;
use moesaic_types::boundary::KvEvent;
use moesaic_types::{BlockHash, ReplicaId};
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

/// Who has blocks.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Owner {
    /// A replica, in its KV pool.
    Replica(ReplicaId),
    /// A kv-store, for all replicas.
    Store(
        /// The node.
        Arc<str>,
        /// Where it has them.
        Tier,
    ),
}

/// An owner's life in the index: its kind in the highest bits, then a number. Clearing an owner gives it a new number;
/// entries of old numbers are dead, and leave as they get old.
type Slot = u32;

/// Slots of replicas are below, those of kv-stores' RAM from here on.
const RAM: Slot = 1 << 30;
/// Slots of kv-stores' disks are from here on.
const DISK: Slot = 2 << 30;

/// What came of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// It was the next one.
    InOrder,
    /// It is the first that was heard of the owner's life, and not that life's first: it was applied, and the owner has
    /// blocks that are not known.
    Late,
    /// Events before it were lost; what was known of the owner is cleared, then it was applied.
    AfterGap,
    /// It, or a later one, was applied before.
    Stale,
}

/// Names of blocks are hashes already: a part of one is as good as another hash.
#[derive(Clone, Copy, Debug, Default)]
pub struct Named(u64);

impl Hasher for Named {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            self.0 = self.0.rotate_left(5) ^ u64::from_le_bytes(word);
        }
    }

    /// Names are equally long.
    fn write_usize(&mut self, _: usize) {}
}

/// Blocks and who has them.
#[derive(Debug)]
pub struct PrefixIndex {
    max_entries: usize,
    /// Of replicas and of kv-stores, each within the bound: what the stores have does not push out what replicas have.
    books: [Book; 2],
    /// By slot.
    holders: HashMap<BlockHash, Vec<Holder>, BuildHasherDefault<Named>>,
    feeds: HashMap<Owner, Feed>,
    live: HashMap<Slot, Owner>,
    next_slot: Slot,
    next_stamp: u64,
}

/// The entries of one kind of owner.
#[derive(Debug, Default)]
struct Book {
    entries: usize,
    /// By age; one that was stored again since has another stamp and is skipped.
    ages: VecDeque<(BlockHash, Slot, u64)>,
}

/// Which book an owner's entries stand in.
fn book_of(slot: Slot) -> usize {
    usize::from(slot >= RAM)
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
    /// An empty index that remembers at most `max_entries` (a block at an owner) of replicas and as many of kv-stores.
    pub fn new(max_entries: usize) -> Self {
        Self {
            max_entries: max_entries.max(1),
            books: Default::default(),
            holders: HashMap::default(),
            feeds: HashMap::new(),
            live: HashMap::new(),
            next_slot: 0,
            next_stamp: 0,
        }
    }

    /// Entries that are kept, dead ones included.
    pub fn len(&self) -> usize {
        self.books.iter().map(|book| book.entries).sum()
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Applies an event of an owner. `source` is the owner's life; a new life has no blocks of the old one.
    pub fn apply(&mut self, owner: &Owner, source: &Arc<str>, sequence: u64, event: &KvEvent) -> Applied {
        let known = self.feeds.get(owner).map(|feed| (feed.source == *source, feed.sequence));
        let applied = match known {
            Some((true, last)) if sequence <= last => return Applied::Stale,
            Some((true, last)) if sequence == last + 1 => Applied::InOrder,
            Some((true, _)) => Applied::AfterGap,
            None | Some((false, _)) if sequence == 1 => Applied::InOrder,
            None | Some((false, _)) => Applied::Late,
        };
        let same_feed = matches!(known, Some((true, _))) && applied == Applied::InOrder;
        if !same_feed || *event == KvEvent::Cleared {
            self.clear(owner);
        }
        let slot = self.slot(owner, source, sequence);
        match event {
            KvEvent::Stored { blocks } => blocks.iter().for_each(|hash| self.store(*hash, slot)),
            KvEvent::Evicted { blocks } => blocks.iter().for_each(|hash| self.evict(hash, slot)),
            KvEvent::Cleared => {}
        }
        match (applied, event) {
            // it says everything anew
            (Applied::AfterGap | Applied::Late, KvEvent::Cleared) => Applied::InOrder,
            (applied, _) => applied,
        }
    }

    /// Forgets an owner.
    pub fn forget(&mut self, owner: &Owner) {
        self.clear(owner);
    }

    /// Who has how much of a chain from its start, and what the kv-stores have of it.
    pub fn prefixes(&self, chain: &[BlockHash]) -> Prefixes {
        let mut matching: Vec<Slot> = Vec::new();
        let mut ended: Vec<(Slot, usize)> = Vec::new();
        let mut tiers = Vec::new();
        for (depth, hash) in chain.iter().enumerate() {
            let holders = self.holders.get(hash).map(Vec::as_slice).unwrap_or_default();
            let (replicas, stores) = holders.split_at(holders.partition_point(|holder| holder.slot < RAM));
            if depth == 0 {
                matching.extend(replicas.iter().map(|holder| holder.slot).filter(|slot| self.live.contains_key(slot)));
            } else if !is_same(&matching, replicas) {
                keep_common(&mut matching, replicas, |slot| ended.push((slot, depth)));
            }
            let stored = stores.iter().find(|holder| self.live.contains_key(&holder.slot));
            tiers.push(stored.map(|holder| if holder.slot < DISK { Tier::Ram } else { Tier::Disk }));
            if matching.is_empty() && stored.is_none() {
                break;
            }
        }
        ended.extend(matching.into_iter().map(|slot| (slot, chain.len())));
        let local = ended.into_iter().filter_map(|(slot, depth)| match self.live.get(&slot)? {
            Owner::Replica(id) => Some((id.clone(), depth)),
            Owner::Store(..) => None,
        });
        Prefixes::new(local.collect(), &tiers)
    }

    fn clear(&mut self, owner: &Owner) {
        if let Some(feed) = self.feeds.remove(owner) {
            self.live.remove(&feed.slot);
        }
    }

    /// The owner's slot, a new one if it has none, with its feed moved to this event.
    fn slot(&mut self, owner: &Owner, source: &Arc<str>, sequence: u64) -> Slot {
        if let Some(feed) = self.feeds.get_mut(owner) {
            feed.sequence = sequence;
            return feed.slot;
        }
        let kind = match owner {
            Owner::Replica(_) => 0,
            Owner::Store(_, Tier::Ram) => RAM,
            Owner::Store(_, Tier::Disk) => DISK,
        };
        let slot = kind + self.next_slot;
        self.next_slot = (self.next_slot + 1) % RAM;
        self.live.insert(slot, owner.clone());
        self.feeds.insert(owner.clone(), Feed { slot, source: Arc::clone(source), sequence });
        slot
    }

    fn store(&mut self, hash: BlockHash, slot: Slot) {
        let stamp = self.next_stamp;
        self.next_stamp += 1;
        let holders = self.holders.entry(hash).or_default();
        match holders.binary_search_by_key(&slot, |holder| holder.slot) {
            Ok(at) => holders[at].stamp = stamp,
            Err(at) => {
                holders.insert(at, Holder { slot, stamp });
                self.books[book_of(slot)].entries += 1;
            }
        }
        let at = book_of(slot);
        self.books[at].ages.push_back((hash, slot, stamp));
        while self.books[at].entries > self.max_entries {
            let Some((hash, slot, stamp)) = self.books[at].ages.pop_front() else { break };
            self.remove(&hash, |holder| holder.slot == slot && holder.stamp == stamp);
        }
        // Blocks that come and go leave outdated ages behind.
        if self.books[at].ages.len() > 2 * self.max_entries {
            let holders = &self.holders;
            self.books[at].ages.retain(|(hash, slot, stamp)| {
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
            holders.retain(|holder| {
                let goes = which(holder);
                self.books[book_of(holder.slot)].entries -= usize::from(goes);
                !goes
            });
            if holders.is_empty() {
                self.holders.remove(hash);
            }
        }
    }
}

/// Whether the holders are just these.
fn is_same(slots: &[Slot], holders: &[Holder]) -> bool {
    slots.len() == holders.len() && slots.iter().zip(holders).all(|(slot, holder)| *slot == holder.slot)
}

/// Keeps those of the slots that are among the holders; both are in order. `gone` is told of the others.
fn keep_common(slots: &mut Vec<Slot>, holders: &[Holder], mut gone: impl FnMut(Slot)) {
    let mut holders = holders.iter().map(|holder| holder.slot).peekable();
    slots.retain(|slot| {
        while holders.next_if(|holder| holder < slot).is_some() {}
        let stays = holders.peek() == Some(slot);
        if !stays {
            gone(*slot);
        }
        stays
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Known;
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
        let prefixes = index.prefixes(&hashes(chain));
        prefixes.local().iter().map(|(id, depth)| (id.to_string(), *depth)).collect()
    }

    fn replica(id: &str) -> Owner {
        Owner::Replica(ReplicaId::new(id))
    }

    fn store(tier: Tier) -> Owner {
        Owner::Store("kv-0".into(), tier)
    }

    fn expected(pairs: &[(&str, usize)]) -> BTreeMap<String, usize> {
        pairs.iter().map(|(id, depth)| ((*id).to_owned(), *depth)).collect()
    }

    #[test]
    fn overlap_counts_from_the_start_of_the_chain() {
        let (a, b, life) = (replica("a"), replica("b"), Arc::from("1"));
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
        let (a, b) = (replica("a"), replica("b"));
        let (first, second) = (Arc::from("1"), Arc::from("2"));
        let mut index = PrefixIndex::new(100);
        index.apply(&b, &first, 1, &stored(&[1, 2]));
        assert_eq!(index.apply(&a, &first, 5, &stored(&[1, 2])), Applied::Late, "subscribed late");
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
        let (a, life) = (replica("a"), Arc::from("1"));
        let mut index = PrefixIndex::new(3);
        for (sequence, number) in [1, 2, 3, 1, 4].into_iter().enumerate() {
            index.apply(&a, &life, sequence as u64 + 1, &stored(&[number]));
        }
        assert_eq!(index.len(), 3);
        let kept: Vec<u8> = (1..=4).filter(|&number| !overlap(&index, &[number]).is_empty()).collect();
        assert_eq!(kept, [1, 3, 4]);
    }

    #[test]
    fn what_the_stores_have_follows_what_a_replica_has() {
        let (a, life) = (replica("a"), Arc::from("1"));
        let mut index = PrefixIndex::new(100);
        index.apply(&a, &life, 1, &stored(&[1, 2]));
        index.apply(&store(Tier::Ram), &life, 1, &stored(&[2, 3, 4]));
        index.apply(&store(Tier::Disk), &life, 1, &stored(&[4, 5, 7]));
        let prefixes = index.prefixes(&hashes(&[1, 2, 3, 4, 5, 6, 7]));
        assert_eq!(prefixes.known(&ReplicaId::new("a")), Known { local: 2, ram: 2, disk: 1 });
        assert_eq!(prefixes.known(&ReplicaId::new("b")), Known { local: 0, ram: 0, disk: 0 }, "nobody has the first");
        let prefixes = index.prefixes(&hashes(&[4, 5]));
        assert_eq!(prefixes.known(&ReplicaId::new("b")), Known { local: 0, ram: 1, disk: 1 });
        index.forget(&store(Tier::Ram));
        let prefixes = index.prefixes(&hashes(&[4, 5]));
        assert_eq!(prefixes.known(&ReplicaId::new("b")), Known { local: 0, ram: 0, disk: 2 });
    }

    #[test]
    fn what_the_stores_have_pushes_nothing_out_that_replicas_have() {
        let (a, life) = (replica("a"), Arc::from("1"));
        let mut index = PrefixIndex::new(3);
        index.apply(&a, &life, 1, &stored(&[1, 2, 3]));
        index.apply(&store(Tier::Disk), &life, 1, &stored(&[1, 2, 3, 4, 5]));
        assert_eq!(overlap(&index, &[1, 2, 3]), expected(&[("a", 3)]));
        assert_eq!(index.len(), 6);
    }

    #[test]
    fn who_says_everything_anew_after_a_gap_is_known_again() {
        let (a, life) = (replica("a"), Arc::from("1"));
        let mut index = PrefixIndex::new(100);
        index.apply(&a, &life, 1, &stored(&[1, 2]));
        assert_eq!(index.apply(&a, &life, 3, &stored(&[3])), Applied::AfterGap);
        assert_eq!(index.apply(&a, &life, 4, &KvEvent::Cleared), Applied::InOrder);
        assert_eq!(index.apply(&a, &life, 5, &stored(&[1, 2, 3])), Applied::InOrder);
        assert_eq!(overlap(&index, &[1, 2, 3]), expected(&[("a", 3)]));
        assert_eq!(index.apply(&a, &life, 9, &KvEvent::Cleared), Applied::InOrder, "lost, and said anew");
        assert_eq!(overlap(&index, &[1]), expected(&[]));
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
                let id = Owner::Replica(ReplicaId::new(replica.to_string()));
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
                let gap = match (step, first, kind) {
                    (1, ..) | (.., 0) => Applied::InOrder,
                    (_, true, _) => Applied::Late,
                    _ => Applied::AfterGap,
                };
                prop_assert_eq!(roomy.apply(&id, &life, *sequence, &event), gap);
                tight.apply(&id, &life, *sequence, &event);
                prop_assert!(tight.len() <= small && tight.books[0].ages.len() <= 2 * small + 1);
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
