//! Which groups of blocks are here, and in which tier: what others must be told.
use moesaic_transport::kv::Tier;
use moesaic_types::{BlockHash, Link};
use std::collections::{BTreeSet, HashMap};

/// Changes of single blocks that are kept for whoever tells of them; beyond, everything is told anew.
const CHANGES: usize = 1 << 16;

/// A block came to a tier, or left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The tier.
    pub tier: Tier,
    /// The block.
    pub hash: BlockHash,
    /// It came.
    pub is_here: bool,
}

/// Groups with at least one block.
#[derive(Debug, Default)]
pub struct Groups {
    known: HashMap<BlockHash, Group>,
    /// Groups whose tier is another than was told.
    untold: BTreeSet<BlockHash>,
    /// What happened to single blocks since it was last taken; `None` where that is not known.
    changes: Option<Vec<Change>>,
}

#[derive(Debug, Default)]
struct Group {
    ram: u32,
    disk: u32,
    told: Option<Tier>,
}

impl Group {
    fn tier(&self) -> Option<Tier> {
        match (self.ram, self.disk) {
            (0, 0) => None,
            (0, _) => Some(Tier::Disk),
            _ => Some(Tier::Ram),
        }
    }

    fn count(&mut self, tier: Tier) -> &mut u32 {
        match tier {
            Tier::Ram => &mut self.ram,
            Tier::Disk => &mut self.disk,
        }
    }
}

impl Groups {
    /// A block came to a tier.
    pub fn add(&mut self, tier: Tier, link: &Link) {
        self.record(Change { tier, hash: link.hash, is_here: true });
        *self.known.entry(link.group).or_default().count(tier) += 1;
        self.settle(link.group);
    }

    /// A block left a tier.
    pub fn remove(&mut self, tier: Tier, link: &Link) {
        self.record(Change { tier, hash: link.hash, is_here: false });
        if let Some(group) = self.known.get_mut(&link.group) {
            let count = group.count(tier);
            *count = count.saturating_sub(1);
        }
        self.settle(link.group);
    }

    fn record(&mut self, change: Change) {
        if let Some(changes) = &mut self.changes {
            changes.push(change);
            if changes.len() > CHANGES {
                self.changes = None;
            }
        }
    }

    /// What happened to single blocks since the last call, in order; `None` where that is not known: at first, after too
    /// many changes, and after [`Groups::forget_changes`].
    pub fn take_changes(&mut self) -> Option<Vec<Change>> {
        self.changes.replace(Vec::new())
    }

    /// The next taker must tell everything anew.
    pub fn forget_changes(&mut self) {
        self.changes = None;
    }

    /// Whether [`Groups::take_changes`] has something for who took before.
    pub fn has_changes(&self) -> bool {
        self.changes.as_ref().is_none_or(|changes| !changes.is_empty())
    }

    fn settle(&mut self, hash: BlockHash) {
        let Some(group) = self.known.get(&hash) else { return };
        if group.tier() == group.told {
            self.untold.remove(&hash);
        } else {
            self.untold.insert(hash);
        }
        if group.tier().is_none() && group.told.is_none() {
            self.known.remove(&hash);
        }
    }

    /// Up to `limit` groups whose tier changed since it was told; `None`: it is here no longer. They count as told.
    pub fn take_untold(&mut self, limit: usize) -> Vec<(BlockHash, Option<Tier>)> {
        let taken: Vec<_> = self.untold.iter().copied().take(limit).collect();
        let tell = |hash: BlockHash| {
            let tier = self.known.get(&hash).and_then(Group::tier);
            if let Some(group) = self.known.get_mut(&hash) {
                group.told = tier;
            }
            self.settle(hash);
            (hash, tier)
        };
        taken.into_iter().map(tell).collect()
    }

    /// Whether [`Groups::take_untold`] has something.
    pub fn has_untold(&self) -> bool {
        !self.untold.is_empty()
    }

    /// Nothing counts as told any longer.
    pub fn forget_told(&mut self) {
        for group in self.known.values_mut() {
            group.told = None;
        }
        for hash in self.known.keys().copied().collect::<Vec<_>>() {
            self.settle(hash);
        }
    }

    /// This group does not count as told.
    pub fn forget(&mut self, hash: BlockHash) {
        if let Some(group) = self.known.get_mut(&hash) {
            group.told = None;
        }
        self.settle(hash);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_of_blocks_are_kept_in_order_until_there_are_too_many() {
        let links = [1, 2].map(|n| Link::of(&[BlockHash([n; 16])], 0));
        let mut groups = Groups::default();
        groups.add(Tier::Ram, &links[0]);
        assert!(groups.has_changes());
        assert_eq!(groups.take_changes(), None, "nobody took them before");
        groups.add(Tier::Disk, &links[1]);
        groups.remove(Tier::Ram, &links[0]);
        let change = |tier, link: &Link, is_here| Change { tier, hash: link.hash, is_here };
        let expected = vec![change(Tier::Disk, &links[1], true), change(Tier::Ram, &links[0], false)];
        assert_eq!(groups.take_changes(), Some(expected));
        assert!(!groups.has_changes());
        for _ in 0..=CHANGES {
            groups.add(Tier::Ram, &links[0]);
        }
        assert_eq!((groups.take_changes(), groups.take_changes()), (None, Some(vec![])));
        groups.forget_changes();
        assert_eq!(groups.take_changes(), None);
    }

    #[test]
    fn a_change_is_told_once_and_one_that_was_undone_never() {
        let hash = BlockHash([1; 16]);
        let link = Link::of(&[hash], 0);
        let mut groups = Groups::default();
        groups.add(Tier::Ram, &link);
        groups.add(Tier::Ram, &link);
        assert_eq!(groups.take_untold(9), [(hash, Some(Tier::Ram))]);
        assert_eq!(groups.take_untold(9), []);
        groups.remove(Tier::Ram, &link);
        assert_eq!(groups.take_untold(9), [], "one is left");
        groups.add(Tier::Disk, &link);
        groups.remove(Tier::Ram, &link);
        assert_eq!(groups.take_untold(9), [(hash, Some(Tier::Disk))]);
        groups.add(Tier::Ram, &link);
        groups.remove(Tier::Ram, &link);
        assert_eq!(groups.take_untold(9), []);
        groups.forget_told();
        assert_eq!(groups.take_untold(9), [(hash, Some(Tier::Disk))]);
        groups.forget(hash);
        assert_eq!(groups.take_untold(0), []);
        groups.remove(Tier::Disk, &link);
        assert_eq!(groups.take_untold(9), [], "it was never told");
        assert!(groups.known.is_empty());
    }
}
