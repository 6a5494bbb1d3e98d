//! What the index knows, one entry for each block at an owner, in lists that an entry joins and leaves at once.
use moesaic_types::BlockHash;

/// An owner's life in the index: its kind in the highest bits, then a number.
pub(super) type Slot = u32;

/// Where an entry stands.
pub(super) type At = u32;

/// No entry.
pub(super) const NONE: At = At::MAX;

/// The list of all entries of a book, the oldest first.
pub(super) const AGE: usize = 0;
/// The list of the entries of one life.
pub(super) const LIFE: usize = 1;

/// A block at an owner.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) hash: BlockHash,
    pub(super) slot: Slot,
    /// When it was last stored, or kept for another round; in ticks of the index.
    pub(super) since: u32,
    links: [Link; 2],
}

#[derive(Clone, Copy, Debug)]
struct Link {
    before: At,
    after: At,
}

const UNLINKED: Link = Link { before: NONE, after: NONE };

/// The ends of a list.
#[derive(Clone, Copy, Debug)]
pub(super) struct List {
    first: At,
    last: At,
}

impl Default for List {
    fn default() -> Self {
        Self { first: NONE, last: NONE }
    }
}

impl List {
    /// The first entry.
    pub(super) fn first(&self) -> Option<At> {
        (self.first != NONE).then_some(self.first)
    }
}

/// All entries; those that are gone make room for new ones.
#[derive(Debug)]
pub(super) struct Entries {
    all: Vec<Entry>,
    /// The first that is free; each names the next.
    free: At,
}

impl Default for Entries {
    fn default() -> Self {
        Self { all: Vec::new(), free: NONE }
    }
}

impl Entries {
    /// An entry that is in use.
    pub(super) fn get(&self, at: At) -> &Entry {
        &self.all[at as usize]
    }

    /// The same.
    pub(super) fn get_mut(&mut self, at: At) -> &mut Entry {
        &mut self.all[at as usize]
    }

    /// Adds an entry that is in no list yet.
    pub(super) fn add(&mut self, hash: BlockHash, slot: Slot, since: u32) -> At {
        let entry = Entry { hash, slot, since, links: [UNLINKED; 2] };
        if self.free == NONE {
            self.all.push(entry);
            return (self.all.len() - 1) as At;
        }
        let at = self.free;
        self.free = self.get(at).links[AGE].after;
        *self.get_mut(at) = entry;
        at
    }

    /// Drops an entry that is in no list any longer.
    pub(super) fn drop(&mut self, at: At) {
        self.get_mut(at).links[AGE].after = self.free;
        self.free = at;
    }

    /// Entries for which there is room.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    /// Puts an entry at a list's end.
    pub(super) fn push<const BY: usize>(&mut self, list: &mut List, at: At) {
        self.get_mut(at).links[BY] = Link { before: list.last, after: NONE };
        match list.last {
            NONE => list.first = at,
            last => self.get_mut(last).links[BY].after = at,
        }
        list.last = at;
    }

    /// Takes an entry out of a list.
    pub(super) fn unlink<const BY: usize>(&mut self, list: &mut List, at: At) {
        let Link { before, after } = std::mem::replace(&mut self.get_mut(at).links[BY], UNLINKED);
        match before {
            NONE => list.first = after,
            before => self.get_mut(before).links[BY].after = after,
        }
        match after {
            NONE => list.last = before,
            after => self.get_mut(after).links[BY].before = before,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_order<const BY: usize>(entries: &Entries, list: &List) -> Vec<At> {
        let next = |at: &At| Some(entries.get(*at).links[BY].after).filter(|next| *next != NONE);
        std::iter::successors(list.first(), next).collect()
    }

    #[test]
    fn entries_join_and_leave_two_lists_and_make_room() {
        let (mut entries, mut ages, mut life) = (Entries::default(), List::default(), List::default());
        for number in 0..4 {
            let at = entries.add(BlockHash([number; 16]), 0, 0);
            entries.push::<AGE>(&mut ages, at);
            entries.push::<LIFE>(&mut life, at);
        }
        for at in [1, 0, 3] {
            entries.unlink::<AGE>(&mut ages, at);
            entries.push::<AGE>(&mut ages, at);
        }
        assert_eq!(in_order::<AGE>(&entries, &ages), [2, 1, 0, 3]);
        assert_eq!(in_order::<LIFE>(&entries, &life), [0, 1, 2, 3]);
        for at in [2, 3] {
            entries.unlink::<AGE>(&mut ages, at);
            entries.unlink::<LIFE>(&mut life, at);
            entries.drop(at);
        }
        assert_eq!(in_order::<AGE>(&entries, &ages), [1, 0]);
        let again = [7, 8, 9].map(|number| entries.add(BlockHash([number; 16]), 0, 0));
        assert_eq!(again, [3, 2, 4], "the free ones first");
        for at in [0, 1] {
            entries.unlink::<LIFE>(&mut life, at);
        }
        assert_eq!((life.first(), life.last), (None, NONE));
    }
}
