//! Decides the next step: who runs, with how many tokens, who is preempted. Pure functions over plain data.
//!
//! Running sequences are ranked by priority, then by arrival. Decodes are served first, then prefill chunks, then
//! waiting sequences are admitted in order of rank. A sequence that needs a block takes it from lower ranks, the
//! lowest first, and otherwise skips the step; the highest rank therefore always advances, and so everyone does.
//! The first waiting sequence that does not fit blocks those behind it, so that large requests do not starve.
use moesaic_types::{BLOCK_TOKENS, Priority};
use std::cmp::Reverse;

/// A sequence of the batch.
#[derive(Clone, Debug)]
pub struct Running {
    /// Names the sequence; also its number of arrival.
    pub key: u64,
    /// Its priority.
    pub priority: Priority,
    /// Tokens so far.
    pub tokens: usize,
    /// Tokens whose keys and values are in its blocks; less than `tokens`.
    pub computed: usize,
    /// Blocks that it refers to.
    pub held: usize,
    /// Of those, blocks that nobody else refers to.
    pub exclusive: usize,
}

/// A sequence that is not in the batch.
#[derive(Clone, Debug)]
pub struct Waiting {
    /// Names the sequence; also its number of arrival.
    pub key: u64,
    /// Its priority.
    pub priority: Priority,
    /// Whether it has waited so long that it goes before higher priorities.
    pub promoted: bool,
    /// Tokens so far.
    pub tokens: usize,
    /// Blocks that the prefix cache has for it.
    pub hits: usize,
    /// Of those, blocks that are idle and so count as available.
    pub idle_hits: usize,
    /// Blocks after the hits that were fetched and only need a place.
    pub fetched: usize,
}

/// What the step may use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Tokens of the step.
    pub token_budget: usize,
    /// Prompt tokens of one sequence in the step.
    pub max_chunk: usize,
    /// Sequences in the batch.
    pub max_running: usize,
    /// Blocks that can be allocated.
    pub available: usize,
}

/// The next step. Carry it out in the order of the fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Sequences that lose their blocks and wait again.
    pub preempt: Vec<u64>,
    /// Waiting sequences that join the batch.
    pub admit: Vec<u64>,
    /// How many tokens each sequence computes; those left out skip the step.
    pub chunks: Vec<(u64, usize)>,
}

/// Blocks that hold so many tokens.
pub fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}

struct Slot<'a> {
    sequence: &'a Running,
    preempted: bool,
    granted: usize,
    chunk: usize,
}

struct Planner<'a> {
    slots: Vec<Slot<'a>>,
    available: usize,
    budget: usize,
}

impl Planner<'_> {
    fn preempt(&mut self, slot: usize) {
        let slot = &mut self.slots[slot];
        slot.preempted = true;
        self.available += slot.sequence.exclusive + slot.granted;
        self.budget += slot.chunk;
        slot.chunk = 0;
        slot.granted = 0;
    }

    /// Gives a slot up to `wanted` tokens, preempting lower ranks if it could not advance at all.
    fn serve(&mut self, at: usize, wanted: usize) {
        if self.slots[at].preempted || wanted == 0 {
            return;
        }
        let (computed, held) = (self.slots[at].sequence.computed, self.slots[at].sequence.held);
        let room = |available: usize| (held + available) * BLOCK_TOKENS - computed;
        while room(self.available) == 0 {
            match (at + 1..self.slots.len()).rev().find(|&lower| !self.slots[lower].preempted) {
                Some(victim) => self.preempt(victim),
                None => return,
            }
        }
        let chunk = wanted.min(room(self.available)).min(self.budget);
        let granted = blocks_for(computed + chunk).saturating_sub(held);
        self.available -= granted;
        self.budget -= chunk;
        (self.slots[at].granted, self.slots[at].chunk) = (granted, chunk);
    }

    /// Blocks that the prompts in the batch still need.
    fn outstanding(&self) -> usize {
        let alive = self.slots.iter().filter(|slot| !slot.preempted);
        alive.map(|s| blocks_for(s.sequence.tokens + 1).saturating_sub(s.sequence.held + s.granted)).sum()
    }
}

/// Decides the next step. `waiting` need not be ordered.
pub fn plan(running: &[Running], waiting: &[Waiting], limits: &Limits) -> Plan {
    let mut ranked: Vec<&Running> = running.iter().collect();
    ranked.sort_by_key(|s| (Reverse(s.priority), s.key));
    let slots = ranked.into_iter().map(|sequence| Slot { sequence, preempted: false, granted: 0, chunk: 0 }).collect();
    let mut planner = Planner { slots, available: limits.available, budget: limits.token_budget };
    let decodes = |s: &Slot<'_>| s.sequence.tokens - s.sequence.computed == 1;
    for at in 0..planner.slots.len() {
        if decodes(&planner.slots[at]) {
            planner.serve(at, 1);
        }
    }
    for at in 0..planner.slots.len() {
        if !decodes(&planner.slots[at]) {
            let left = planner.slots[at].sequence.tokens - planner.slots[at].sequence.computed;
            planner.serve(at, left.min(limits.max_chunk));
        }
    }
    let mut plan = Plan::default();
    let mut admitted = Vec::new();
    if planner.slots.iter().all(|slot| !slot.preempted) {
        let mut queue: Vec<&Waiting> = waiting.iter().collect();
        queue.sort_by_key(|s| (Reverse(s.promoted), Reverse(s.priority), s.key));
        let mut reserved = 0;
        for candidate in queue {
            let computed = (candidate.hits + candidate.fetched) * BLOCK_TOKENS;
            let required = blocks_for(candidate.tokens + 1) - candidate.hits + candidate.idle_hits;
            let batch = |planner: &Planner<'_>| planner.slots.iter().filter(|s| !s.preempted).count();
            let fits = |planner: &Planner<'_>, plan: &Plan| {
                batch(planner) + plan.admit.len() < limits.max_running
                    && planner.available >= planner.outstanding() + reserved + required
                    && planner.budget > 0
            };
            if !fits(&planner, &plan) && !make_room(&mut planner, candidate, |planner| fits(planner, &plan)) {
                break;
            }
            reserved += required;
            let chunk = (candidate.tokens - computed).min(limits.max_chunk).min(planner.budget);
            planner.budget -= chunk;
            plan.admit.push(candidate.key);
            admitted.push((candidate.key, chunk));
        }
    }
    plan.preempt = planner.slots.iter().rev().filter(|s| s.preempted).map(|s| s.sequence.key).collect();
    plan.chunks = planner.slots.iter().filter(|s| s.chunk > 0).map(|s| (s.sequence.key, s.chunk)).collect();
    plan.chunks.extend(admitted);
    plan
}

/// Preempts sequences of lower priority, the lowest first, until the candidate fits; none if that is not enough.
fn make_room(planner: &mut Planner<'_>, candidate: &Waiting, fits: impl Fn(&Planner<'_>) -> bool) -> bool {
    let before = (planner.available, planner.budget);
    let mut victims = Vec::new();
    for at in (0..planner.slots.len()).rev() {
        if planner.slots[at].preempted || planner.slots[at].sequence.priority >= candidate.priority {
            continue;
        }
        victims.push((at, planner.slots[at].granted, planner.slots[at].chunk));
        planner.preempt(at);
        if fits(planner) {
            return true;
        }
    }
    for (at, granted, chunk) in victims {
        let slot = &mut planner.slots[at];
        (slot.preempted, slot.granted, slot.chunk) = (false, granted, chunk);
    }
    (planner.available, planner.budget) = before;
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limits(available: usize) -> Limits {
        Limits { token_budget: 64, max_chunk: 64, max_running: 4, available }
    }

    fn running(key: u64, priority: i32, tokens: usize, computed: usize) -> Running {
        let held = blocks_for(computed);
        Running { key, priority: Priority(priority), tokens, computed, held, exclusive: held }
    }

    fn waiting(key: u64, priority: i32, tokens: usize) -> Waiting {
        Waiting { key, priority: Priority(priority), promoted: false, tokens, hits: 0, idle_hits: 0, fetched: 0 }
    }

    #[test]
    fn decodes_go_before_prefill_and_share_the_budget() {
        let batch = [running(1, 0, 200, 0), running(2, 0, 11, 10)];
        assert_eq!(plan(&batch, &[], &limits(9)).chunks, vec![(1, 63), (2, 1)]);
    }

    #[test]
    fn the_latest_of_the_lowest_priority_is_preempted() {
        let batch = [running(1, 0, 65, 64), running(2, 1, 65, 64), running(3, 0, 40, 39)];
        let plan = plan(&batch, &[], &limits(0));
        assert_eq!(plan.preempt, vec![3], "one block is enough; 1 keeps its own and waits for another");
        assert_eq!(plan.chunks, vec![(2, 1)]);
    }

    #[test]
    fn higher_priority_is_admitted_first_and_a_large_head_blocks_the_queue() {
        let plan = plan(&[], &[waiting(1, 0, 10), waiting(2, 5, 20), waiting(3, 0, 300), waiting(4, 0, 1)], &limits(5));
        assert_eq!(plan.admit, vec![2, 1]);
    }

    #[test]
    fn a_waiting_sequence_preempts_lower_priorities_only() {
        let batch = [running(1, 0, 100, 99), running(2, 0, 100, 99)];
        assert_eq!(plan(&batch, &[waiting(3, 0, 60)], &limits(0)).preempt, Vec::<u64>::new());
        let plan = plan(&batch, &[waiting(3, 1, 60)], &limits(0));
        assert_eq!((plan.preempt, plan.admit, plan.chunks), (vec![2], vec![3], vec![(1, 1), (3, 60)]));
    }

    #[test]
    fn a_promoted_sequence_goes_first() {
        let old = Waiting { promoted: true, ..waiting(9, -1, 60) };
        let one = Limits { max_running: 1, ..limits(9) };
        assert_eq!(plan(&[], &[waiting(1, 5, 60), old], &one).admit, vec![9]);
    }

    proptest! {
        #[test]
        fn a_plan_keeps_the_limits_and_the_first_rank_advances(
            batch in prop::collection::vec((0i32..3, 1usize..400, 0usize..400), 0..8),
            queue in prop::collection::vec((0i32..3, 1usize..400), 0..8),
            spare in 0usize..10,
            chunk in 1usize..100,
        ) {
            let batch: Vec<_> = batch.iter().enumerate()
                .map(|(key, &(priority, tokens, computed))| running(key as u64, priority, tokens, computed.min(tokens - 1)))
                .collect();
            let queue: Vec<_> = queue.iter().enumerate()
                .map(|(key, &(priority, tokens))| waiting(100 + key as u64, priority, tokens)).collect();
            let limits = Limits { token_budget: 64, max_chunk: chunk, max_running: 8, available: spare };
            let plan = plan(&batch, &queue, &limits);
            prop_assert!(plan.chunks.iter().map(|c| c.1).sum::<usize>() <= 64);
            prop_assert!(plan.chunks.iter().all(|c| c.1 >= 1 && c.1 <= chunk));
            prop_assert!(batch.len() - plan.preempt.len() + plan.admit.len() <= 8);
            let freed: usize = batch.iter().filter(|s| plan.preempt.contains(&s.key)).map(|s| s.exclusive).sum();
            let mut taken = 0;
            for (key, tokens) in &plan.chunks {
                prop_assert!(!plan.preempt.contains(key));
                taken += match batch.iter().find(|s| s.key == *key) {
                    Some(s) => blocks_for(s.computed + tokens).saturating_sub(s.held),
                    None => blocks_for(*tokens),
                };
            }
            prop_assert!(taken <= spare + freed);
            let first = batch.iter().min_by_key(|s| (Reverse(s.priority), s.key));
            if let Some(first) = first.filter(|f| queue.iter().all(|w| w.priority <= f.priority)) {
                let alone = batch.len() == 1 && spare == 0 && first.computed % 64 == 0;
                let stuck = freed == 0 && spare == 0 && first.computed % 64 == 0;
                prop_assert!(alone || stuck || plan.chunks.iter().any(|c| c.0 == first.key));
            }
        }
    }
}
