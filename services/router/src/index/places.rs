//! Where each block is: by its name, the owners that have it.
use super::entries::{At, Slot};
use super::{RAM, is_replica};
use moesaic_types::BlockHash;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicU32, Ordering};

/// Tables that grow by themselves: one table of millions would stop everybody for as long as it moves.
const TABLES: usize = 1024;

/// No owner's slot.
const VACANT: Slot = Slot::MAX;

/// Names of blocks are hashes already: a part of one is as good as another hash.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Named(u64);

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

type Table = HashMap<BlockHash, Place, BuildHasherDefault<Named>>;

/// Blocks by name.
#[derive(Debug)]
pub(super) struct Places(Vec<Table>);

impl Default for Places {
    fn default() -> Self {
        Self((0..TABLES).map(|_| Table::default()).collect())
    }
}

impl Places {
    fn table(hash: &BlockHash) -> usize {
        // other bits than those that choose within a table
        usize::from(u16::from_le_bytes([hash.0[3], hash.0[12]])) % TABLES
    }

    /// A block.
    pub(super) fn get(&self, hash: &BlockHash) -> Option<&Place> {
        self.0[Self::table(hash)].get(hash)
    }

    /// The entry of a block at an owner.
    pub(super) fn find(&self, hash: &BlockHash, slot: Slot) -> Option<At> {
        self.get(hash)?.find(slot)
    }

    /// Adds an owner's entry that is not there. A block that nobody had counts as looked up at this tick.
    pub(super) fn insert(&mut self, hash: BlockHash, slot: Slot, at: At, looked_up: u32) {
        match self.0[Self::table(&hash)].entry(hash) {
            Entry::Occupied(mut place) => place.get_mut().insert(slot, at),
            Entry::Vacant(vacant) => _ = vacant.insert(Place::new(slot, at, looked_up)),
        }
    }

    /// Takes an owner's entry out; which it was.
    pub(super) fn remove(&mut self, hash: &BlockHash, slot: Slot) -> Option<At> {
        let Entry::Occupied(mut place) = self.0[Self::table(hash)].entry(*hash) else { return None };
        let at = place.get_mut().remove(slot)?;
        if place.get().is_empty() {
            place.remove();
        }
        Some(at)
    }

    /// All holders of all blocks.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        let of = |place: &Place| place.replicas().0.len() + place.stores().len();
        self.0.iter().flat_map(HashMap::values).map(of).sum()
    }
}

/// Who has a block. One or two owners (a replica and a kv-store, as a rule) stand beside the name: each step to another
/// place in memory takes as long as all else that is done for a block.
#[derive(Debug)]
pub(super) enum Place {
    /// In the order of slots; vacancies are last.
    Few { looked_up: AtomicU32, slots: [Slot; 2], entries: [At; 2] },
    /// The same for any number.
    Many(Box<Many>),
}

#[derive(Debug)]
pub(super) struct Many {
    looked_up: AtomicU32,
    slots: Vec<Slot>,
    entries: Vec<At>,
    /// How many of them are replicas.
    replicas: usize,
    /// The sum of the replicas' [`mixed`] numbers.
    fingerprint: u64,
}

/// A number for a slot, so that sums of these are equal for equal sets, and for no others that anybody will meet.
fn mixed(slot: Slot) -> u64 {
    let mixed = (u64::from(slot) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

impl Place {
    fn new(slot: Slot, at: At, looked_up: u32) -> Self {
        Self::Few { looked_up: AtomicU32::new(looked_up), slots: [slot, VACANT], entries: [at, At::MAX] }
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::Few { slots, .. } => slots[0] == VACANT,
            Self::Many(many) => many.slots.is_empty(),
        }
    }

    fn find(&self, slot: Slot) -> Option<At> {
        match self {
            Self::Few { slots, entries, .. } => {
                slots.iter().zip(entries).find_map(|(own, at)| (*own == slot).then_some(*at))
            }
            Self::Many(many) => many.slots.binary_search(&slot).ok().map(|index| many.entries[index]),
        }
    }

    /// Adds one that is not there.
    fn insert(&mut self, slot: Slot, at: At) {
        match self {
            Self::Few { slots, entries, .. } if slots[1] == VACANT => {
                (slots[1], entries[1]) = (slot, at);
                if slots[0] > slot {
                    slots.swap(0, 1);
                    entries.swap(0, 1);
                }
            }
            Self::Few { looked_up, slots, entries } => {
                let replicas = slots.iter().filter(|slot| is_replica(**slot));
                let mut many = Many {
                    looked_up: AtomicU32::new(*looked_up.get_mut()),
                    replicas: replicas.clone().count(),
                    fingerprint: replicas.map(|slot| mixed(*slot)).fold(0, u64::wrapping_add),
                    slots: slots.to_vec(),
                    entries: entries.to_vec(),
                };
                many.insert(slot, at);
                *self = Self::Many(Box::new(many));
            }
            Self::Many(many) => many.insert(slot, at),
        }
    }

    fn remove(&mut self, slot: Slot) -> Option<At> {
        match self {
            Self::Few { slots, entries, .. } => {
                let index = slots.iter().position(|own| *own == slot)?;
                let at = entries[index];
                if index == 0 {
                    (slots[0], entries[0]) = (slots[1], entries[1]);
                }
                (slots[1], entries[1]) = (VACANT, At::MAX);
                Some(at)
            }
            Self::Many(many) => {
                let at = many.remove(slot)?;
                if let ([first, second], [first_at, second_at]) = (&many.slots[..], &many.entries[..]) {
                    let looked_up = AtomicU32::new(*many.looked_up.get_mut());
                    *self = Self::Few { looked_up, slots: [*first, *second], entries: [*first_at, *second_at] };
                }
                Some(at)
            }
        }
    }

    /// The replicas among its owners, in order, and a number that is theirs: where it is that of other replicas, those
    /// are the same.
    pub(super) fn replicas(&self) -> (&[Slot], u64) {
        match self {
            Self::Few { slots, .. } => {
                let count = slots.iter().filter(|slot| is_replica(**slot)).count();
                let replicas = &slots[..count];
                (replicas, replicas.iter().map(|slot| mixed(*slot)).fold(0, u64::wrapping_add))
            }
            Self::Many(many) => (&many.slots[..many.replicas], many.fingerprint),
        }
    }

    /// The kv-stores among its owners, in order.
    pub(super) fn stores(&self) -> &[Slot] {
        match self {
            Self::Few { slots, .. } => {
                let is_store = |slot: &&Slot| (RAM..VACANT).contains(*slot);
                let from = usize::from(is_replica(slots[0]));
                &slots[from..from + slots[from..].iter().filter(is_store).count()]
            }
            Self::Many(many) => &many.slots[many.replicas..],
        }
    }

    fn looked_up(&self) -> &AtomicU32 {
        match self {
            Self::Few { looked_up, .. } => looked_up,
            Self::Many(many) => &many.looked_up,
        }
    }

    /// Somebody looks it up at this tick.
    pub(super) fn look_up(&self, now: u32) {
        // many readers write the same: most of them need not
        if self.looked_up().load(Ordering::Relaxed) != now {
            self.looked_up().store(now, Ordering::Relaxed);
        }
    }

    /// Whether it was looked up after a tick. Ticks begin again after their last: half of them count as later.
    pub(super) fn is_looked_up_since(&self, tick: u32) -> bool {
        (self.looked_up().load(Ordering::Relaxed).wrapping_sub(tick) as i32) > 0
    }

    /// Whether it was looked up before a tick, and not since.
    pub(super) fn is_looked_up_before(&self, tick: u32) -> bool {
        (self.looked_up().load(Ordering::Relaxed).wrapping_sub(tick) as i32) < 0
    }
}

impl Many {
    fn insert(&mut self, slot: Slot, at: At) {
        let index = self.slots.partition_point(|own| *own < slot);
        self.slots.insert(index, slot);
        self.entries.insert(index, at);
        if is_replica(slot) {
            self.replicas += 1;
            self.fingerprint = self.fingerprint.wrapping_add(mixed(slot));
        }
    }

    fn remove(&mut self, slot: Slot) -> Option<At> {
        let index = self.slots.binary_search(&slot).ok()?;
        self.slots.remove(index);
        if is_replica(slot) {
            self.replicas -= 1;
            self.fingerprint = self.fingerprint.wrapping_sub(mixed(slot));
        }
        Some(self.entries.remove(index))
    }
}

#[cfg(test)]
mod tests {
    use super::super::DISK;
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[test]
    fn a_place_takes_little_room() {
        assert!(size_of::<(BlockHash, Place)>() <= 40);
    }

    proptest! {
        #[test]
        fn a_place_holds_what_was_put_there(
            changes in prop::collection::vec((any::<bool>(), 0u32..4, 0usize..3), 0..40),
        ) {
            let (hash, mut places, mut model) = (BlockHash([1; 16]), Places::default(), BTreeMap::new());
            for (at, (is_added, number, kind)) in changes.into_iter().enumerate() {
                let slot = [0, RAM, DISK][kind] + number;
                if is_added {
                    if places.find(&hash, slot).is_none() {
                        places.insert(hash, slot, at as At, 1);
                    }
                    model.entry(slot).or_insert(at as At);
                    prop_assert_eq!(places.find(&hash, slot), model.get(&slot).copied());
                } else {
                    prop_assert_eq!(places.remove(&hash, slot), model.remove(&slot));
                }
                let replicas: Vec<Slot> = model.keys().copied().filter(|slot| *slot < RAM).collect();
                let stores: Vec<Slot> = model.keys().copied().filter(|slot| *slot >= RAM).collect();
                let fingerprint = replicas.iter().map(|slot| mixed(*slot)).fold(0, u64::wrapping_add);
                prop_assert_eq!(places.get(&hash).is_some(), !model.is_empty());
                if let Some(place) = places.get(&hash) {
                    prop_assert_eq!(place.replicas(), (&replicas[..], fingerprint));
                    prop_assert_eq!(place.stores(), &stores[..]);
                    prop_assert_eq!(matches!(place, Place::Many(_)) , model.len() > 2);
                }
            }
        }
    }
}
