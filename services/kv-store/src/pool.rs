//! What is in which tier, and what must be done on disk. Plain data: whoever asks does the reading and writing.
use crate::groups::Groups;
use crate::shelf::Shelf;
use bytes::Bytes;
use moesaic_transport::kv::Tier;
use moesaic_types::{BlockHash, Link};
use std::collections::{HashMap, VecDeque};
use std::time::Instant;

/// Bytes that wait to be written at most; what is evicted beyond is dropped.
pub const SPILL_BYTES: u64 = 64 << 20;

/// A block that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Its bytes.
    Ram(Bytes),
    /// To be read from its file.
    Disk(Link),
}

/// What is to be done on disk next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// Tell what is there.
    Scan,
    /// The disk did not answer: nothing but a retry, and that later.
    Wait,
    /// Remove files.
    Remove(Vec<BlockHash>),
    /// Write a block, after removing others for it.
    Write {
        /// Where it stands.
        link: Link,
        /// Its bytes.
        bytes: Bytes,
        /// To be removed before.
        remove: Vec<BlockHash>,
    },
}

/// How much of the disk may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Room {
    /// As configured.
    All,
    /// The disk was full: no more than what is there.
    Held,
    /// It was full even so, or broken: nothing is written.
    None,
}

/// What left the store, and what was written to it: for the metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Blocks that are in no tier any longer.
    pub evicted: u64,
    /// Files that were not intact.
    pub corrupt: u64,
    /// Writes that failed.
    pub failed: u64,
}

/// Both tiers.
#[derive(Debug)]
pub struct Pool {
    ram: Shelf<Bytes>,
    disk: Option<Disk>,
    groups: Groups,
    counts: Counts,
}

#[derive(Debug)]
struct Disk {
    capacity: u64,
    /// What is in files, and what will be as soon as it is written.
    shelf: Shelf<()>,
    /// Evicted from RAM and not written yet.
    spilling: HashMap<BlockHash, (Link, Bytes)>,
    spilling_bytes: u64,
    queue: VecDeque<BlockHash>,
    removing: Vec<BlockHash>,
    is_scanned: bool,
    /// It did not answer, and who works on it was not told.
    is_stalled: bool,
    room: Room,
}

impl Pool {
    /// Empty tiers; what is on disk is told later. `disk`: its capacity, where there is one.
    pub fn new(ram: u64, disk: Option<u64>) -> Self {
        let disk = disk.map(|capacity| Disk {
            capacity,
            shelf: Shelf::new(capacity),
            spilling: HashMap::new(),
            spilling_bytes: 0,
            queue: VecDeque::new(),
            removing: Vec::new(),
            is_scanned: false,
            is_stalled: false,
            room: Room::All,
        });
        Self { ram: Shelf::new(ram), disk, groups: Groups::default(), counts: Counts::default() }
    }

    /// Blocks and bytes in RAM.
    pub fn in_ram(&self) -> (usize, u64) {
        (self.ram.len(), self.ram.bytes())
    }

    /// Blocks and bytes on disk, those that are about to be written included.
    pub fn on_disk(&self) -> (usize, u64) {
        self.disk.as_ref().map_or((0, 0), |disk| (disk.shelf.len(), disk.shelf.bytes()))
    }

    /// The counts since the last call.
    pub fn take_counts(&mut self) -> Counts {
        std::mem::take(&mut self.counts)
    }

    /// What others must be told.
    pub fn groups(&mut self) -> &mut Groups {
        &mut self.groups
    }

    /// A tier's blocks, so many at most, in no order.
    pub fn blocks(&self, tier: Tier, limit: usize) -> Vec<BlockHash> {
        let hashes: Vec<_> = match (tier, &self.disk) {
            (Tier::Ram, _) => self.ram.links().map(|link| link.hash).take(limit).collect(),
            (Tier::Disk, None) => Vec::new(),
            (Tier::Disk, Some(disk)) => {
                let spilling = disk.spilling.keys().filter(|hash| !disk.shelf.contains(hash)).copied();
                disk.shelf.links().map(|link| link.hash).chain(spilling).take(limit).collect()
            }
        };
        hashes
    }

    fn is_in_memory(&self, hash: &BlockHash) -> bool {
        self.ram.contains(hash) || self.disk.as_ref().is_some_and(|disk| disk.spilling.contains_key(hash))
    }

    fn has(&self, hash: &BlockHash) -> bool {
        self.is_in_memory(hash) || self.disk.as_ref().is_some_and(|disk| disk.shelf.contains(hash))
    }

    /// How many blocks of a chain, from its start, are here; and how many of these are in memory.
    pub fn longest(&self, chain: &[BlockHash]) -> (usize, usize) {
        let blocks = chain.iter().take_while(|hash| self.has(hash)).count();
        (blocks, chain[..blocks].iter().filter(|hash| self.is_in_memory(hash)).count())
    }

    /// A chain's blocks from its start, up to the first that is gone.
    pub fn locate(&mut self, chain: &[BlockHash]) -> Vec<Place> {
        let found: Vec<_> = chain.iter().map_while(|hash| self.place(hash)).collect();
        for hash in chain[..found.len()].iter().rev() {
            self.ram.touch(hash);
            if let Some(disk) = &mut self.disk {
                disk.shelf.touch(hash);
            }
        }
        found
    }

    fn place(&self, hash: &BlockHash) -> Option<Place> {
        if let Some((_, _, bytes)) = self.ram.get(hash) {
            return Some(Place::Ram(bytes.clone()));
        }
        let disk = self.disk.as_ref()?;
        if let Some((_, bytes)) = disk.spilling.get(hash) {
            return Some(Place::Ram(bytes.clone()));
        }
        disk.shelf.get(hash).map(|(link, ..)| Place::Disk(*link))
    }

    /// Keeps a block: in RAM, or on disk where RAM has no room beside the block's own chain. False when it is here or
    /// there is no room.
    pub fn offer(&mut self, link: Link, bytes: Bytes, now: Instant) -> bool {
        !self.has(&link.hash) && (self.take(link, bytes.clone(), now) || self.spill(link, bytes))
    }

    /// A block was read from disk.
    pub fn promote(&mut self, link: Link, bytes: Bytes, now: Instant) {
        // meanwhile it may have been offered, or dropped: then its bytes may be wrong
        let is_on_disk = self.disk.as_ref().is_some_and(|disk| disk.shelf.contains(&link.hash));
        if is_on_disk && !self.is_in_memory(&link.hash) {
            self.take(link, bytes, now);
        }
    }

    fn take(&mut self, link: Link, bytes: Bytes, now: Instant) -> bool {
        let inserted = self.ram.insert(link, bytes.len() as u64, bytes, now);
        if inserted.taken {
            self.groups.add(Tier::Ram, &link);
        }
        for (link, _, bytes) in inserted.evicted {
            self.groups.remove(Tier::Ram, &link);
            if !self.spill(link, bytes) {
                self.counts.evicted += 1;
            }
        }
        inserted.taken
    }

    /// Puts a block on its way to disk, where it is not there yet; false when there is no room.
    fn spill(&mut self, link: Link, bytes: Bytes) -> bool {
        let Some(disk) = &mut self.disk else { return false };
        if disk.shelf.contains(&link.hash) || disk.spilling.contains_key(&link.hash) {
            return true;
        }
        let size = bytes.len() as u64;
        if disk.room == Room::None || size > disk.capacity || disk.spilling_bytes + size > SPILL_BYTES {
            return false;
        }
        disk.spilling_bytes += size;
        disk.spilling.insert(link.hash, (link, bytes));
        disk.queue.push_back(link.hash);
        self.groups.add(Tier::Disk, &link);
        true
    }

    /// Blocks that are in RAM alone, the starts of chains first.
    pub fn unsaved(&self) -> VecDeque<BlockHash> {
        let Some(disk) = &self.disk else { return VecDeque::new() };
        let is_saved = |hash| disk.shelf.contains(hash) || disk.spilling.contains_key(hash);
        let mut unsaved: Vec<_> = self.ram.links().filter(|link| !is_saved(&link.hash)).collect();
        unsaved.sort_unstable_by_key(|link| (link.position, link.hash));
        unsaved.into_iter().map(|link| link.hash).collect()
    }

    /// Puts blocks on their way to disk, as many as may be on it at once, and takes these off the list; whether any are
    /// on their way. A disk that takes nothing ends the list.
    pub fn save(&mut self, list: &mut VecDeque<BlockHash>) -> bool {
        while let Some(hash) = list.front() {
            let Some(disk) = self.disk.as_ref().filter(|disk| disk.room != Room::None) else {
                list.clear();
                return false;
            };
            if let Some((link, size, bytes)) = self.ram.get(hash) {
                if disk.spilling_bytes > 0 && disk.spilling_bytes + size > SPILL_BYTES {
                    break;
                }
                // one that has no place on the disk at all is left where it is
                self.spill(*link, bytes.clone());
            }
            list.pop_front();
        }
        self.disk.as_ref().is_some_and(|disk| !disk.spilling.is_empty())
    }

    /// Keeps a chain's blocks from eviction until then; how many, from its start.
    pub fn pin(&mut self, chain: &[BlockHash], until: Instant, now: Instant) -> usize {
        let Self { ram, disk, .. } = self;
        let mut pin = |hash: &BlockHash| {
            // where it is in both, RAM is enough: from there it goes to disk
            ram.pin(hash, until, now) || disk.as_mut().is_some_and(|disk| disk.shelf.pin(hash, until, now))
        };
        chain.iter().take_while(|hash| pin(hash)).count()
    }

    /// What is to be done on disk next; `None`: nothing. One at a time: a scan is ended by [`Pool::scanned`], a write by
    /// [`Pool::written`] or [`Pool::failed`].
    pub fn next_work(&mut self, now: Instant) -> Option<Work> {
        let disk = self.disk.as_mut()?;
        if std::mem::take(&mut disk.is_stalled) {
            return Some(Work::Wait);
        }
        let mut remove = std::mem::take(&mut disk.removing);
        if !disk.is_scanned {
            // a file that is to go is not to be found
            return Some(if remove.is_empty() { Work::Scan } else { Work::Remove(remove) });
        }
        while let Some(hash) = self.disk.as_mut().and_then(|disk| disk.queue.pop_front()) {
            let Some(disk) = &mut self.disk else { break };
            let Some((link, bytes)) = disk.spilling.get(&hash).cloned() else { continue };
            let inserted = disk.shelf.insert(link, bytes.len() as u64, (), now);
            for (gone, ..) in &inserted.evicted {
                self.counts.evicted += u64::from(!self.ram.contains(&gone.hash));
                self.groups.remove(Tier::Disk, gone);
            }
            remove.extend(inserted.evicted.iter().map(|(link, ..)| link.hash));
            if inserted.taken {
                return Some(Work::Write { link, bytes, remove });
            }
            self.counts.evicted += u64::from(!self.ram.contains(&hash));
            self.unspill(&hash);
        }
        (!remove.is_empty()).then_some(Work::Remove(remove))
    }

    /// Whether [`Pool::next_work`] has something.
    pub fn has_work(&self) -> bool {
        let waits =
            |disk: &Disk| disk.is_stalled || !disk.is_scanned || !disk.queue.is_empty() || !disk.removing.is_empty();
        self.disk.as_ref().is_some_and(waits)
    }

    /// Takes a block off the way to disk, and its group's count with it.
    fn unspill(&mut self, hash: &BlockHash) {
        let Some(disk) = &mut self.disk else { return };
        if let Some((link, bytes)) = disk.spilling.remove(hash) {
            disk.spilling_bytes -= bytes.len() as u64;
            self.groups.remove(Tier::Disk, &link);
        }
    }

    /// A file was found in a scan.
    pub fn found(&mut self, link: Link, size: u64, now: Instant) {
        let Some(disk) = &mut self.disk else { return };
        if disk.shelf.contains(&link.hash) {
            return;
        }
        let inserted = disk.shelf.insert(link, size, (), now);
        for (gone, ..) in &inserted.evicted {
            disk.removing.push(gone.hash);
            self.groups.remove(Tier::Disk, gone);
        }
        if inserted.taken {
            // it may have been evicted from RAM meanwhile, and is on its way to where it is already
            if disk.spilling.contains_key(&link.hash) {
                self.unspill(&link.hash);
            }
            self.groups.add(Tier::Disk, &link);
        } else {
            disk.removing.push(link.hash);
        }
    }

    /// The scan is over.
    pub fn scanned(&mut self) {
        if let Some(disk) = &mut self.disk {
            disk.is_scanned = true;
        }
    }

    /// A block was written.
    pub fn written(&mut self, hash: &BlockHash) {
        let Some(disk) = &mut self.disk else { return };
        let Some((link, bytes)) = disk.spilling.remove(hash) else { return };
        disk.spilling_bytes -= bytes.len() as u64;
        if !disk.shelf.contains(hash) {
            // it was dropped meanwhile
            disk.removing.push(*hash);
            self.groups.remove(Tier::Disk, &link);
        }
    }

    /// A block could not be written. A disk that is full is used for what is there, by replacing it; one that fails even
    /// so is left alone until [`Pool::retry`]: what is evicted from RAM meanwhile is gone.
    pub fn failed(&mut self, hash: &BlockHash, is_full: bool) {
        self.counts.failed += 1;
        let Some(disk) = &mut self.disk else { return };
        disk.shelf.remove(hash);
        disk.room = if is_full && disk.room == Room::All { Room::Held } else { Room::None };
        disk.shelf.set_capacity(disk.shelf.bytes());
        self.counts.evicted += u64::from(!self.ram.contains(hash));
        self.unspill(hash);
        if self.disk.as_ref().is_some_and(|disk| disk.room == Room::None) {
            self.drop_spilling();
        }
    }

    fn drop_spilling(&mut self) {
        let Some(disk) = &mut self.disk else { return };
        for hash in std::mem::take(&mut disk.queue) {
            self.counts.evicted += u64::from(!self.ram.contains(&hash));
            self.unspill(&hash);
        }
    }

    /// The disk does not answer. What is on it counts as gone, so that nobody waits for it, until it is looked at again.
    pub fn stalled(&mut self) {
        let Some(disk) = &mut self.disk else { return };
        (disk.room, disk.is_stalled) = (Room::None, true);
        let links: Vec<Link> = disk.shelf.links().copied().collect();
        for link in links {
            disk.shelf.remove(&link.hash);
            // one that is being written is on its way still, in memory
            if !disk.spilling.contains_key(&link.hash) {
                self.groups.remove(Tier::Disk, &link);
            }
        }
        self.drop_spilling();
    }

    /// The disk may be used as configured again; `looks_again`: there may be files that are not known here.
    pub fn retry(&mut self, looks_again: bool) {
        if let Some(disk) = &mut self.disk {
            disk.room = Room::All;
            disk.is_scanned &= !looks_again;
            disk.shelf.set_capacity(disk.capacity);
        }
    }

    /// Drops a block; whether it was here.
    pub fn forget(&mut self, hash: &BlockHash) -> bool {
        let in_ram = self.ram.remove(hash).map(|(link, ..)| link);
        if let Some(link) = &in_ram {
            self.groups.remove(Tier::Ram, link);
        }
        let mut on_disk = None;
        if let Some(disk) = &mut self.disk {
            on_disk = disk.shelf.remove(hash).map(|(link, ..)| link);
            // there is a file, or one is being written: it is removed next
            disk.removing.extend(on_disk.map(|link| link.hash));
            if let Some((link, bytes)) = disk.spilling.remove(hash) {
                disk.spilling_bytes -= bytes.len() as u64;
                on_disk = Some(link);
            }
        }
        if let Some(link) = &on_disk {
            self.groups.remove(Tier::Disk, link);
        }
        in_ram.or(on_disk).is_some()
    }

    /// A file is gone, or not intact.
    pub fn lost(&mut self, hash: &BlockHash, is_corrupt: bool) {
        self.counts.corrupt += u64::from(is_corrupt);
        let Some(disk) = &mut self.disk else { return };
        if is_corrupt {
            disk.removing.push(*hash);
        }
        // one that is being written stays: that is another file
        if !disk.spilling.contains_key(hash)
            && let Some((link, ..)) = disk.shelf.remove(hash)
        {
            self.groups.remove(Tier::Disk, &link);
        }
    }
}
