//! What is known of a prompt's blocks when a replica is chosen.
use crate::policy::Known;
use moesaic_transport::kv::Tier;
use moesaic_types::ReplicaId;
use std::collections::HashMap;

/// Who has how much of a chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prefixes {
    /// Blocks from the chain's start, by replica; only those that have the first.
    local: HashMap<ReplicaId, usize>,
    /// From each block on: how many the kv-stores have without a gap, in RAM and on disk.
    runs: Vec<(usize, usize)>,
}

impl Prefixes {
    /// From the blocks that each replica has, and where the kv-stores have each block of the chain; blocks beyond are
    /// nowhere.
    pub fn new(local: HashMap<ReplicaId, usize>, tiers: &[Option<Tier>]) -> Self {
        if tiers.iter().all(Option::is_none) {
            return Self { local, runs: Vec::new() };
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
        Self { local, runs }
    }

    /// Blocks from the chain's start, by replica.
    pub fn local(&self) -> &HashMap<ReplicaId, usize> {
        &self.local
    }

    /// Where a replica would find the chain's blocks.
    pub fn known(&self, replica: &ReplicaId) -> Known {
        let local = if self.local.is_empty() { 0 } else { self.local.get(replica).copied().unwrap_or(0) };
        let (ram, disk) = self.runs.get(local).copied().unwrap_or_default();
        Known { local, ram, disk }
    }
}
