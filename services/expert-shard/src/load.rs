//! How many tokens each expert got: counters that the engine's thread adds to without a lock.
use moesaic_types::Routing;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Tokens by layer, then by expert.
pub type Counts = BTreeMap<usize, Vec<u64>>;

/// Counters of all layers since they were last taken.
#[derive(Debug)]
pub struct LoadCounters {
    layers: BTreeMap<usize, Vec<AtomicU64>>,
}

impl LoadCounters {
    /// Zeroes for `(layer, experts)` pairs.
    pub fn new(layers: impl IntoIterator<Item = (usize, usize)>) -> Self {
        let zeroes = |experts| std::iter::repeat_with(AtomicU64::default).take(experts).collect();
        Self { layers: layers.into_iter().map(|(layer, experts)| (layer, zeroes(experts))).collect() }
    }

    /// Adds a dispatch.
    pub fn add(&self, layer: usize, routing: &Routing) {
        let Some(counters) = self.layers.get(&layer) else { return };
        for expert in &routing.experts {
            if let Some(counter) = counters.get(*expert as usize) {
                counter.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// What was added since the last call.
    pub fn take(&self) -> Counts {
        let take = |counters: &Vec<AtomicU64>| counters.iter().map(|c| c.swap(0, Ordering::Relaxed)).collect();
        self.layers.iter().map(|(layer, counters)| (*layer, take(counters))).collect()
    }
}
