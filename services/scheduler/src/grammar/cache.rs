//! The grammars that were used last.
use moesaic_types::Grammar;
use std::collections::HashMap;

/// A bounded map that drops what has not been used for longest. Small: finding that is linear.
pub struct Cache<V> {
    capacity: usize,
    clock: u64,
    entries: HashMap<Grammar, (u64, V)>,
}

impl<V> Cache<V> {
    /// Keeps at most so many; 0 keeps none.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, clock: 0, entries: HashMap::new() }
    }

    /// What is kept for a grammar; counts as a use.
    pub fn get(&mut self, grammar: &Grammar) -> Option<&V> {
        self.clock += 1;
        let (used, value) = self.entries.get_mut(grammar)?;
        *used = self.clock;
        Some(value)
    }

    /// Keeps a value.
    pub fn insert(&mut self, grammar: Grammar, value: V) {
        if self.capacity == 0 {
            return;
        }
        if self.entries.len() >= self.capacity && !self.entries.contains_key(&grammar) {
            let oldest = self.entries.iter().min_by_key(|(_, (used, _))| *used).map(|(grammar, _)| grammar.clone());
            oldest.map(|oldest| self.entries.remove(&oldest));
        }
        self.clock += 1;
        self.entries.insert(grammar, (self.clock, value));
    }
}
