//! Who tells what it has, and in which life.
use super::entries::{List, Slot};
use super::{DISK, Owner, RAM};
use crate::prefixes::Numbers;
use moesaic_transport::kv::Tier;
use std::collections::HashMap;
use std::sync::Arc;

/// What was heard of an owner last.
#[derive(Debug)]
struct Feed {
    slot: Slot,
    source: Arc<str>,
    sequence: u64,
}

/// An owner's life in the index. Clearing an owner ends its life; what is left of it is dead.
#[derive(Debug, Default)]
pub(super) struct Life {
    /// Its entries, in no order that matters.
    pub(super) entries: List,
    is_live: bool,
    /// The replica's number among [`Numbers`]; 0 for a kv-store.
    number: u32,
}

/// The owners.
#[derive(Debug, Default)]
pub(super) struct Owners {
    feeds: HashMap<Owner, Feed>,
    /// By the number in a slot.
    lives: Vec<Life>,
    /// Slots' numbers that have no entries any longer.
    free: Vec<u32>,
    /// Shared with the answers to lookups.
    numbers: Arc<Numbers>,
}

impl Owners {
    /// What was heard of an owner last: whether it was this life's, and its number.
    pub(super) fn heard(&self, owner: &Owner, source: &str) -> Option<(bool, u64)> {
        self.feeds.get(owner).map(|feed| (*feed.source == *source, feed.sequence))
    }

    /// The owner's slot, a new one if it has none, with its feed moved to this event.
    pub(super) fn hear(&mut self, owner: &Owner, source: &Arc<str>, sequence: u64) -> Slot {
        if let Some(feed) = self.feeds.get_mut(owner) {
            feed.sequence = sequence;
            return feed.slot;
        }
        let (kind, number) = match owner {
            Owner::Replica(id) => (0, Arc::make_mut(&mut self.numbers).number(id)),
            Owner::Store(_, Tier::Ram) => (RAM, 0),
            Owner::Store(_, Tier::Disk) => (DISK, 0),
        };
        let at = self.free.pop().unwrap_or_else(|| {
            self.lives.push(Life::default());
            (self.lives.len() - 1) as u32
        });
        self.lives[at as usize] = Life { entries: List::default(), is_live: true, number };
        self.feeds.insert(owner.clone(), Feed { slot: kind + at, source: Arc::clone(source), sequence });
        kind + at
    }

    /// The kv-stores that were heard of.
    pub(super) fn stores(&self) -> impl Iterator<Item = &Owner> {
        self.feeds.keys().filter(|owner| matches!(owner, Owner::Store(..)))
    }

    /// Ends an owner's life; which it was.
    pub(super) fn end(&mut self, owner: &Owner) -> Option<Slot> {
        let Feed { slot, .. } = self.feeds.remove(owner)?;
        self.life_mut(slot).is_live = false;
        Some(slot)
    }

    /// Forgets a replica's number.
    pub(super) fn forget(&mut self, owner: &Owner) {
        if let Owner::Replica(id) = owner
            && self.numbers.get(id).is_some()
        {
            Arc::make_mut(&mut self.numbers).remove(id);
        }
    }

    /// A slot whose life is over and has no entries may be given to another.
    pub(super) fn release(&mut self, slot: Slot) {
        self.free.push(slot % RAM);
    }

    /// A life.
    pub(super) fn life_mut(&mut self, slot: Slot) -> &mut Life {
        &mut self.lives[(slot % RAM) as usize]
    }

    /// Whether the life goes on.
    pub(super) fn is_live(&self, slot: Slot) -> bool {
        self.lives[(slot % RAM) as usize].is_live
    }

    /// The replica whose life it is, if that goes on.
    pub(super) fn number(&self, slot: Slot) -> Option<u32> {
        let life = &self.lives[(slot % RAM) as usize];
        life.is_live.then_some(life.number)
    }

    /// The replicas' numbers.
    pub(super) fn numbers(&self) -> &Arc<Numbers> {
        &self.numbers
    }

    /// Owners and lives that are remembered.
    #[cfg(test)]
    pub(super) fn count(&self) -> (usize, usize) {
        (self.feeds.len(), self.lives.len() - self.free.len())
    }
}
