//! What is known of a prompt's blocks when a replica is chosen.
use crate::policy::Known;
use moesaic_transport::kv::Tier;
use moesaic_types::ReplicaId;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

/// Numbers for replicas, small ones, each free again when its replica is forgotten.
#[derive(Clone, Debug, Default)]
pub struct Numbers {
    by_id: HashMap<ReplicaId, u32, BuildHasherDefault<Text>>,
    free: Vec<u32>,
}

impl Numbers {
    /// A replica's number, a new one if it has none.
    pub fn number(&mut self, id: &ReplicaId) -> u32 {
        if let Some(number) = self.by_id.get(id) {
            return *number;
        }
        let number = self.free.pop().unwrap_or(self.by_id.len() as u32);
        self.by_id.insert(id.clone(), number);
        number
    }

    /// A replica's number, if it has one.
    pub fn get(&self, id: &ReplicaId) -> Option<u32> {
        self.by_id.get(id).copied()
    }

    /// Forgets a replica.
    pub fn remove(&mut self, id: &ReplicaId) {
        self.free.extend(self.by_id.remove(id));
    }

    /// All numbers are below this.
    pub fn end(&self) -> usize {
        self.by_id.len() + self.free.len()
    }
}

/// Hashes ids of the cluster's own members, which nobody makes up to collide: each decision asks for all of them.
#[derive(Clone, Copy, Debug, Default)]
struct Text(u64);

impl Hasher for Text {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 32)
    }

    fn write(&mut self, bytes: &[u8]) {
        let mut parts = bytes.chunks_exact(8);
        for part in parts.by_ref() {
            self.write_u64(part.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)));
        }
        let rest = parts.remainder();
        if !rest.is_empty() {
            self.write_u64(rest.iter().rev().fold(rest.len() as u64, |word, byte| word << 8 | u64::from(*byte)));
        }
    }

    fn write_u8(&mut self, byte: u8) {
        self.write_u64(u64::from(byte));
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// Who has how much of a chain.
#[derive(Clone, Debug, Default)]
pub struct Prefixes {
    numbers: Arc<Numbers>,
    /// Blocks from the chain's start, by the replica's number; empty where no replica has the first.
    local: Vec<u32>,
    /// From each block on: how many the kv-stores have without a gap, in RAM and on disk.
    runs: Vec<(u32, u32)>,
}

impl Prefixes {
    /// From the blocks that each replica has by its number, and where the kv-stores have each block of the chain; blocks
    /// beyond are nowhere.
    pub fn new(numbers: Arc<Numbers>, local: Vec<u32>, tiers: &[Option<Tier>]) -> Self {
        if tiers.iter().all(Option::is_none) {
            return Self { numbers, local, runs: Vec::new() };
        }
        let mut runs = vec![(0, 0); tiers.len() + 1];
        for (at, tier) in tiers.iter().enumerate().rev() {
            let (ram, disk) = runs[at + 1];
            runs[at] = match tier {
                None => (0, 0),
                Some(Tier::Ram) => (ram + 1, disk),
                Some(Tier::Disk) => (ram, disk + 1),
            };
        }
        Self { numbers, local, runs }
    }

    /// Blocks from the chain's start that a replica has.
    pub fn local(&self, replica: &ReplicaId) -> usize {
        if self.local.is_empty() {
            return 0;
        }
        let number = self.numbers.get(replica);
        number.and_then(|number| self.local.get(number as usize)).map_or(0, |blocks| *blocks as usize)
    }

    /// Where a replica would find the chain's blocks.
    pub fn known(&self, replica: &ReplicaId) -> Known {
        let local = self.local(replica);
        let (ram, disk) = self.runs.get(local).copied().unwrap_or_default();
        Known { local, ram: ram as usize, disk: disk as usize }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::hash::BuildHasher;

    #[test]
    fn numbers_stay_small_and_are_given_again() {
        let (mut numbers, id) = (Numbers::default(), |number: usize| ReplicaId::new(format!("r-{number}")));
        for round in 0..50 {
            let given: BTreeSet<u32> = (0..4).map(|at| numbers.number(&id(round * 4 + at))).collect();
            assert_eq!(given, BTreeSet::from([0, 1, 2, 3]));
            assert_eq!((numbers.end(), numbers.number(&id(round * 4))), (4, numbers.get(&id(round * 4)).unwrap()));
            (0..4).for_each(|at| numbers.remove(&id(round * 4 + at)));
        }
        assert_eq!(numbers.get(&id(0)), None);
    }

    #[test]
    fn ids_that_differ_in_a_digit_are_spread() {
        let hasher = BuildHasherDefault::<Text>::default();
        for name in ["replica-", "moesaic-scheduler-", "r"] {
            let of = |number: usize| hasher.hash_one(ReplicaId::new(format!("{name}{number:04}")));
            let low: BTreeSet<u64> = (0..1000).map(|number| of(number) % 2048).collect();
            let high: BTreeSet<u64> = (0..1000).map(|number| of(number) >> 57).collect();
            // random ones would fall on some 790 of 2048 places, and on all 128
            assert!(low.len() > 650 && high.len() > 120, "{name}: {} {}", low.len(), high.len());
        }
    }
}
