//! Blocks of one tier, and which of them goes first. Plain data.
//!
//! A block is of no use without those before it, so only a chain's ends may go: blocks whose successors are not on the
//! shelf. Among the ends the one of least worth goes. A block's worth is what it costs to compute it again, which grows
//! with its position because its attention reads all that is before it, on top of the shelf's age when it was last used;
//! the age is the worth of what went last, so that what is not used loses against what is (GreedyDual). Sizes do not
//! count: blocks of one model are equally large, and a larger one of another model costs more to compute as well. Pinned
//! blocks stay until their pins run out, and so do those before them.
use moesaic_types::{BlockHash, Link};
use std::collections::{BTreeSet, HashMap};
use std::time::Instant;

/// The position, in blocks, at which a block costs twice what the first one does: 4,096 tokens.
const DOUBLE_COST_AT: u64 = 64;

/// Of the capacity, pins may hold one part in so many.
const PINNED_PART: u64 = 2;

/// The blocks; each has a size and a value.
#[derive(Debug)]
pub struct Shelf<T> {
    capacity: u64,
    bytes: u64,
    pinned_bytes: u64,
    items: HashMap<BlockHash, Item<T>>,
    /// How many blocks on the shelf follow a block, whether it is on the shelf or not.
    successors: HashMap<BlockHash, u32>,
    /// What may go, by worth and then by last use.
    ends: BTreeSet<(u64, u64, BlockHash)>,
    pins: BTreeSet<(Instant, BlockHash)>,
    age: u64,
    clock: u64,
}

#[derive(Debug)]
struct Item<T> {
    link: Link,
    size: u64,
    value: T,
    worth: u64,
    used: u64,
    pinned_until: Option<Instant>,
}

impl<T> Item<T> {
    fn rank(&self) -> (u64, u64, BlockHash) {
        (self.worth, self.used, self.link.hash)
    }
}

fn cost(link: &Link) -> u64 {
    DOUBLE_COST_AT + u64::from(link.position)
}

/// What an insertion did.
#[derive(Debug, PartialEq, Eq)]
pub struct Inserted<T> {
    /// Whether the block is on the shelf now and was not before.
    pub taken: bool,
    /// What went for it, in order.
    pub evicted: Vec<(Link, u64, T)>,
}

impl<T> Shelf<T> {
    /// An empty shelf for so many bytes.
    pub fn new(capacity: u64) -> Self {
        Self {
            capacity,
            bytes: 0,
            pinned_bytes: 0,
            items: HashMap::new(),
            successors: HashMap::new(),
            ends: BTreeSet::new(),
            pins: BTreeSet::new(),
            age: 0,
            clock: 0,
        }
    }

    /// Changes the capacity, to no less than what is there.
    pub fn set_capacity(&mut self, capacity: u64) {
        self.capacity = capacity.max(self.bytes);
    }

    /// Bytes on the shelf; never above the capacity.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Blocks on the shelf.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether nothing is there.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Whether a block is there; not a use.
    pub fn contains(&self, hash: &BlockHash) -> bool {
        self.items.contains_key(hash)
    }

    /// A block; not a use.
    pub fn get(&self, hash: &BlockHash) -> Option<(&Link, u64, &T)> {
        self.items.get(hash).map(|item| (&item.link, item.size, &item.value))
    }

    /// All blocks, in no order.
    pub fn links(&self) -> impl Iterator<Item = &Link> {
        self.items.values().map(|item| &item.link)
    }

    /// A use.
    pub fn touch(&mut self, hash: &BlockHash) {
        let Some(item) = self.items.get_mut(hash) else { return };
        let was_end = self.ends.remove(&item.rank());
        self.clock += 1;
        (item.worth, item.used) = (self.age + cost(&item.link), self.clock);
        if was_end {
            self.ends.insert(item.rank());
        }
    }

    /// Puts a block there; others may go for it, but none before it in its own group.
    pub fn insert(&mut self, link: Link, size: u64, value: T, now: Instant) -> Inserted<T> {
        let mut evicted = Vec::new();
        if self.contains(&link.hash) || size > self.capacity {
            return Inserted { taken: false, evicted };
        }
        self.expire(now);
        self.follow(&link);
        while self.bytes + size > self.capacity {
            let Some((worth, hash)) = self.victim(&link) else { break };
            self.age = self.age.max(worth);
            evicted.extend(self.remove(&hash));
        }
        if self.bytes + size > self.capacity {
            self.unfollow(&link);
            return Inserted { taken: false, evicted };
        }
        self.clock += 1;
        self.bytes += size;
        let worth = self.age + cost(&link);
        self.items.insert(link.hash, Item { link, size, value, worth, used: self.clock, pinned_until: None });
        self.settle(&link.hash);
        Inserted { taken: true, evicted }
    }

    /// The end of least worth that is not before a block in its own group, which is all that is known of its chain.
    fn victim(&self, link: &Link) -> Option<(u64, BlockHash)> {
        let is_before = |hash: &BlockHash| {
            let end = self.items.get(hash).map(|item| &item.link);
            end.is_some_and(|end| end.group == link.group && end.position < link.position)
        };
        self.ends.iter().find(|(_, _, hash)| !is_before(hash)).map(|(worth, _, hash)| (*worth, *hash))
    }

    /// Takes a block away.
    pub fn remove(&mut self, hash: &BlockHash) -> Option<(Link, u64, T)> {
        let item = self.items.remove(hash)?;
        self.ends.remove(&item.rank());
        if let Some(until) = item.pinned_until {
            self.pins.remove(&(until, *hash));
            self.pinned_bytes -= item.size;
        }
        self.bytes -= item.size;
        self.unfollow(&item.link);
        Some((item.link, item.size, item.value))
    }

    /// Keeps a block until then, also where it was to be kept for longer; at once (or in the past) ends that. False when
    /// it is not there, or half the capacity is pinned already.
    pub fn pin(&mut self, hash: &BlockHash, until: Instant, now: Instant) -> bool {
        self.expire(now);
        let Some(item) = self.items.get_mut(hash) else { return false };
        if let Some(before) = item.pinned_until.take() {
            self.pins.remove(&(before, *hash));
            self.pinned_bytes -= item.size;
        }
        let fits = self.pinned_bytes + item.size <= self.capacity / PINNED_PART;
        if until > now && fits {
            item.pinned_until = Some(until);
            self.pinned_bytes += item.size;
            self.pins.insert((until, *hash));
        }
        self.settle(hash);
        until <= now || fits
    }

    fn expire(&mut self, now: Instant) {
        while let Some((until, hash)) = self.pins.first().copied().filter(|(until, _)| *until <= now) {
            self.pins.remove(&(until, hash));
            if let Some(item) = self.items.get_mut(&hash) {
                item.pinned_until = None;
                self.pinned_bytes -= item.size;
            }
            self.settle(&hash);
        }
    }

    fn follow(&mut self, link: &Link) {
        let Some(parent) = link.parent else { return };
        *self.successors.entry(parent).or_insert(0) += 1;
        self.settle(&parent);
    }

    fn unfollow(&mut self, link: &Link) {
        let Some(parent) = link.parent else { return };
        if let Some(count) = self.successors.get_mut(&parent) {
            *count -= 1;
            if *count == 0 {
                self.successors.remove(&parent);
            }
        }
        self.settle(&parent);
    }

    /// Enters a block among those that may go, or takes it out.
    fn settle(&mut self, hash: &BlockHash) {
        let Some(item) = self.items.get(hash) else { return };
        if item.pinned_until.is_none() && !self.successors.contains_key(hash) {
            self.ends.insert(item.rank());
        } else {
            self.ends.remove(&item.rank());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn hash(chain: u8, position: u8) -> BlockHash {
        let mut hash = [chain; 16];
        hash[0] = position;
        BlockHash(hash)
    }

    fn link(chain: u8, position: u8) -> Link {
        Link::of(&(0..=position).map(|at| hash(chain, at)).collect::<Vec<_>>(), position.into())
    }

    fn put(shelf: &mut Shelf<()>, chain: u8, position: u8, now: Instant) -> Vec<BlockHash> {
        let inserted = shelf.insert(link(chain, position), 10, (), now);
        assert!(inserted.taken);
        inserted.evicted.iter().map(|(link, ..)| link.hash).collect()
    }

    #[test]
    fn ends_go_first_then_what_was_used_least_recently() {
        let (mut shelf, now) = (Shelf::new(40), Instant::now());
        for (chain, position) in [(1, 0), (1, 1), (2, 0), (2, 1)] {
            assert_eq!(put(&mut shelf, chain, position, now), []);
        }
        shelf.touch(&hash(1, 0));
        shelf.touch(&hash(1, 1));
        assert_eq!(put(&mut shelf, 3, 0, now), [hash(2, 1)], "the end of the chain that was not used");
        assert_eq!(put(&mut shelf, 3, 1, now), [hash(2, 0)]);
        assert_eq!(put(&mut shelf, 3, 2, now), [hash(1, 1)]);
        assert_eq!(shelf.insert(link(3, 2), 10, (), now), Inserted { taken: false, evicted: vec![] }, "it is there");
    }

    #[test]
    fn a_block_that_costs_more_stays_longer_but_not_for_ever() {
        let (mut shelf, now) = (Shelf::new(20), Instant::now());
        put(&mut shelf, 1, 200, now);
        let mut survived = 0;
        for chain in 2.. {
            if put(&mut shelf, chain, 0, now) == [hash(1, 200)] {
                break;
            }
            survived += 1;
        }
        // it is worth 64 + 200; each block of the start that goes adds 64 to the age
        assert_eq!(survived, 5);
    }

    #[test]
    fn a_block_does_not_push_out_its_own_chain() {
        let (mut shelf, now) = (Shelf::new(20), Instant::now());
        put(&mut shelf, 1, 0, now);
        put(&mut shelf, 1, 1, now);
        for position in [2, 3, 15] {
            assert_eq!(shelf.insert(link(1, position), 10, (), now), Inserted { taken: false, evicted: vec![] });
        }
        assert_eq!((shelf.len(), shelf.bytes()), (2, 20));
        assert_eq!(put(&mut shelf, 2, 0, now), [hash(1, 1)], "nothing is left of the refused one");
    }

    #[test]
    fn pins_hold_until_they_run_out_and_never_more_than_half() {
        let (mut shelf, now) = (Shelf::new(40), Instant::now());
        let later = now + Duration::from_secs(9);
        for chain in 1..=4 {
            put(&mut shelf, chain, 0, now);
        }
        assert!(shelf.pin(&hash(1, 0), later, now) && shelf.pin(&hash(2, 0), later, now));
        assert!(!shelf.pin(&hash(3, 0), later, now), "half of it is pinned");
        assert!(!shelf.pin(&hash(9, 0), later, now), "it is not there");
        assert_eq!(put(&mut shelf, 5, 0, now), [hash(3, 0)]);
        assert!(shelf.pin(&hash(1, 0), now, now), "unpinned");
        assert_eq!(put(&mut shelf, 6, 0, now), [hash(1, 0)]);
        assert!(shelf.pin(&hash(5, 0), later + Duration::from_secs(1), now));
        assert_eq!(put(&mut shelf, 7, 0, later), [hash(2, 0)], "its pin ran out");
    }

    proptest! {
        /// Whatever happens, the bytes are right, no block outlives one before it that was there, and of the ends it is
        /// the one of least worth that goes.
        #[test]
        fn chains_go_from_their_ends_in_the_order_of_worth(
            capacity in 1u64..12,
            steps in prop::collection::vec((0u8..4, 1u8..5, 0u8..6), 1..120),
        ) {
            let (mut shelf, now) = (Shelf::new(capacity * 10), Instant::now());
            for (action, chain, position) in steps {
                match action {
                    0 => shelf.touch(&hash(chain, position)),
                    1 => drop(shelf.remove(&hash(chain, position))),
                    _ => {
                        let before: Vec<_> = shelf.items.values().map(|item| (item.link, item.worth)).collect();
                        let at = link(chain, position);
                        let gone = shelf.insert(at, 10, (), now).evicted;
                        if let [(gone, ..)] = &gone[..] {
                            let is_end = |link: &Link| {
                                let is_own = link.group == at.group && link.position < at.position;
                                !is_own && before.iter().all(|(l, _)| l.parent != Some(link.hash))
                            };
                            prop_assert!(is_end(gone));
                            let worth = |hash| before.iter().find(|(l, _)| l.hash == hash).map(|(_, worth)| *worth);
                            let least = before.iter().filter(|(l, _)| is_end(l)).map(|(_, worth)| *worth).min();
                            prop_assert_eq!(worth(gone.hash), least);
                        }
                        prop_assert!(gone.len() <= 1);
                    }
                }
                prop_assert_eq!(shelf.bytes(), 10 * shelf.len() as u64);
                prop_assert!(shelf.bytes() <= capacity * 10);
                let followers: u32 = shelf.successors.values().sum();
                prop_assert_eq!(followers as usize, shelf.links().filter(|link| link.parent.is_some()).count());
                let ends = shelf.links().filter(|link| !shelf.successors.contains_key(&link.hash)).count();
                prop_assert_eq!(shelf.ends.len(), ends);
            }
        }
    }
}
