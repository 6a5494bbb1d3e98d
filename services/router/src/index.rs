//! Which replica and which kv-store is believed to have which KV blocks. Plain data, bounded.
//!
//! The index is a hint: a block that it misses costs some prefill, a block that it wrongly has costs the same. So a
//! gap in an owner's events clears what is known of it until it tells everything anew, and when the index is full some
//! entries go: those of lives that are over first, then the oldest whose block nobody looked up since. Of what an event
//! says, the chain's end goes before its start: what is behind a gap is of no use.
mod entries;
mod lookup;
mod owners;
mod places;
#[cfg(test)]
mod tests;

use entries::{AGE, At, Entries, LIFE, List, Slot};
pub use lookup::Found;
use moesaic_transport::kv::Tier;
use moesaic_types::boundary::KvEvent;
use moesaic_types::{BlockHash, ReplicaId};
use owners::Owners;
use places::Places;
use std::collections::VecDeque;
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

/// Slots of replicas are below, those of kv-stores' RAM from here on.
const RAM: Slot = 1 << 30;
/// Slots of kv-stores' disks are from here on.
const DISK: Slot = 2 << 30;

fn is_replica(slot: Slot) -> bool {
    slot < RAM
}

/// Entries that are kept for another round at most before one goes that was looked up too.
const CHANCES: usize = 32;

/// Dead entries that go with each new one, and with each event.
const REAPED: (usize, usize) = (2, 64);

/// Ticks of the clock while as many entries are stored as there may be.
const TICKS: usize = 1024;

/// How often what is in use is marked as such in that time.
const MARKS: usize = 8;

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

/// An owner's life to which changes are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life(Slot);

/// Blocks and who has them.
#[derive(Debug)]
pub struct PrefixIndex {
    max_entries: usize,
    /// Of replicas and of kv-stores, each within the bound: what the stores have does not push out what replicas have.
    books: [Book; 2],
    places: Places,
    entries: Entries,
    owners: Owners,
    /// Grows by one with every few entries that are stored.
    clock: u32,
    /// Entries that were stored since it did.
    stored: usize,
    /// What is in use is marked as such once in so many ticks.
    mark_after: u32,
}

/// The entries of one kind of owner.
#[derive(Debug, Default)]
struct Book {
    /// How many there are.
    entries: usize,
    /// All of them, by when they were stored last, or kept for another round.
    ages: List,
    /// Lives that are over and may have entries.
    dead: VecDeque<Slot>,
}

/// Which book an owner's entries stand in.
fn book_of(slot: Slot) -> usize {
    usize::from(!is_replica(slot))
}

impl PrefixIndex {
    /// An empty index that remembers at most `max_entries` (a block at an owner) of replicas and as many of kv-stores.
    pub fn new(max_entries: usize) -> Self {
        Self {
            max_entries: max_entries.max(1),
            books: Default::default(),
            places: Places::default(),
            entries: Entries::default(),
            owners: Owners::default(),
            clock: 0,
            stored: 0,
            mark_after: (max_entries.min(TICKS) / MARKS) as u32,
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
        let (applied, life) = self.begin(owner, source, sequence, event);
        match (event, life) {
            (KvEvent::Stored { blocks }, Some(life)) => self.store(life, blocks),
            (KvEvent::Evicted { blocks }, Some(life)) => self.evict(life, blocks),
            (KvEvent::Cleared, _) | (_, None) => {}
        }
        applied
    }

    /// The first part of [`Self::apply`]: all but its blocks, which are to be stored in or evicted from the life that is
    /// returned, before any other event. An event of many blocks takes a while; between its parts others can look up.
    pub fn begin(
        &mut self,
        owner: &Owner,
        source: &Arc<str>,
        sequence: u64,
        event: &KvEvent,
    ) -> (Applied, Option<Life>) {
        let known = self.owners.heard(owner, source);
        let applied = match known {
            Some((true, last)) if sequence <= last => return (Applied::Stale, None),
            Some((true, last)) if sequence == last + 1 => Applied::InOrder,
            Some((true, _)) => Applied::AfterGap,
            None | Some((false, _)) if sequence == 1 => Applied::InOrder,
            None | Some((false, _)) => Applied::Late,
        };
        let same_feed = matches!(known, Some((true, _))) && applied == Applied::InOrder;
        if !same_feed || *event == KvEvent::Cleared {
            self.clear(owner);
        }
        let slot = self.owners.hear(owner, source, sequence);
        self.reap(book_of(slot), REAPED.1);
        let applied = match (applied, event) {
            // it says everything anew
            (Applied::AfterGap | Applied::Late, KvEvent::Cleared) => Applied::InOrder,
            (applied, _) => applied,
        };
        (applied, Some(Life(slot)))
    }

    /// An owner has these blocks, a chain from its start on.
    pub fn store(&mut self, Life(slot): Life, blocks: &[BlockHash]) {
        // the chain's end is the older: it goes first
        blocks.iter().rev().for_each(|hash| self.store_one(*hash, slot));
    }

    /// An owner has these blocks no longer.
    pub fn evict(&mut self, Life(slot): Life, blocks: &[BlockHash]) {
        for hash in blocks {
            if let Some(at) = self.places.find(hash, slot) {
                self.remove(at);
            }
        }
    }

    /// Forgets an owner.
    pub fn forget(&mut self, owner: &Owner) {
        self.clear(owner);
        self.owners.forget(owner);
    }

    /// The kv-stores that were heard of.
    pub fn stores(&self) -> Vec<Owner> {
        self.owners.stores().cloned().collect()
    }

    /// Ends an owner's life.
    fn clear(&mut self, owner: &Owner) {
        if let Some(slot) = self.owners.end(owner) {
            self.books[book_of(slot)].dead.push_back(slot);
        }
    }

    fn store_one(&mut self, hash: BlockHash, slot: Slot) {
        let book = book_of(slot);
        match self.places.find(&hash, slot) {
            Some(at) => self.renew(at),
            None => {
                self.reap(book, REAPED.0);
                if self.books[book].entries >= self.max_entries {
                    self.make_room(book);
                }
                let at = self.entries.add(hash, slot, self.clock);
                self.entries.push::<AGE>(&mut self.books[book].ages, at);
                self.entries.push::<LIFE>(&mut self.owners.life_mut(slot).entries, at);
                // it is marked by its first lookup
                self.places.insert(hash, slot, at, self.clock.wrapping_sub(self.mark_after + 1));
                self.books[book].entries += 1;
            }
        }
        self.stored += 1;
        if self.stored > self.max_entries / TICKS {
            (self.clock, self.stored) = (self.clock.wrapping_add(1), 0);
        }
    }

    /// An entry is as good as new.
    fn renew(&mut self, at: At) {
        let ages = &mut self.books[book_of(self.entries.get(at).slot)].ages;
        self.entries.unlink::<AGE>(ages, at);
        self.entries.push::<AGE>(ages, at);
        self.entries.get_mut(at).since = self.clock;
    }

    /// Removes dead entries; at most so many.
    fn reap(&mut self, book: usize, most: usize) {
        for _ in 0..most {
            let Some(slot) = self.books[book].dead.front().copied() else { return };
            match self.owners.life_mut(slot).entries.first() {
                Some(at) => self.remove(at),
                None => {
                    self.books[book].dead.pop_front();
                    self.owners.release(slot);
                }
            }
        }
    }

    /// Removes an entry: a dead one, else the oldest that was not looked up since, as far as few were.
    fn make_room(&mut self, book: usize) {
        let before = self.books[book].entries;
        while !self.books[book].dead.is_empty() {
            self.reap(book, 1);
            if self.books[book].entries < before {
                return;
            }
        }
        for chance in 0..=CHANCES {
            let Some(at) = self.books[book].ages.first() else { return };
            let entry = self.entries.get(at);
            let is_in_use = || self.places.get(&entry.hash).is_some_and(|place| place.is_looked_up_since(entry.since));
            if chance == CHANCES || !is_in_use() {
                return self.remove(at);
            }
            self.renew(at);
        }
    }

    fn remove(&mut self, at: At) {
        let (hash, slot) = (self.entries.get(at).hash, self.entries.get(at).slot);
        let book = &mut self.books[book_of(slot)];
        self.entries.unlink::<AGE>(&mut book.ages, at);
        self.entries.unlink::<LIFE>(&mut self.owners.life_mut(slot).entries, at);
        self.entries.drop(at);
        self.places.remove(&hash, slot);
        book.entries -= 1;
    }
}
