//! Decides the next step: who runs, with how many tokens, who is preempted. Pure functions over plain data.
//!
//! Sequences are ranked: promoted ones first, then by priority, then by arrival. Decodes are served first. Prefill
//! chunks and admissions follow in the order of rank, so that a running prefill keeps nobody of higher priority out of
//! the step. A sequence that needs a block takes it from lower ranks, the lowest first, and otherwise skips the step;
//! the highest rank therefore always advances, and so everyone does.
//!
//! A sequence is admitted only if the blocks suffice until its first token, whatever the batch grows by meanwhile: an
//! admission is not undone before it was worth something. The first waiting sequence that does not fit blocks those
//! behind it, so that large requests do not starve. A step without tokens left preempts nobody.
use moesaic_types::{BLOCK_TOKENS, Priority};
use std::cmp::Reverse;

/// A sequence of the batch.
#[derive(Clone, Debug)]
pub struct Running {
    /// Names the sequence; also its number of arrival.
    pub key: u64,
    /// Its priority.
    pub priority: Priority,
    /// Whether it was admitted before higher priorities; these do not push it out again.
    pub promoted: bool,
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

type Rank = (Reverse<bool>, Reverse<Priority>, u64);

fn rank(promoted: bool, priority: Priority, key: u64) -> Rank {
    (Reverse(promoted), Reverse(priority), key)
}

impl Running {
    fn rank(&self) -> Rank {
        rank(self.promoted, self.priority, self.key)
    }

    fn decodes(&self) -> bool {
        self.tokens - self.computed == 1
    }
}

impl Waiting {
    fn rank(&self) -> Rank {
        rank(self.promoted, self.priority, self.key)
    }

    fn computed(&self) -> usize {
        (self.hits + self.fetched) * BLOCK_TOKENS
    }

    /// Whether it is of a higher class; among equals, who runs goes on first.
    fn outranks(&self, running: &Running) -> bool {
        (self.promoted, self.priority) > (running.promoted, running.priority)
    }
}

struct Slot {
    sequence: Running,
    admitted: bool,
    preempted: bool,
    granted: usize,
    chunk: usize,
}

impl Slot {
    fn new(sequence: Running, admitted: bool) -> Self {
        Self { sequence, admitted, preempted: false, granted: 0, chunk: 0 }
    }
}

struct Planner<'a> {
    limits: &'a Limits,
    /// The batch in order of rank, then the admitted.
    slots: Vec<Slot>,
    /// How many of the slots are the batch's.
    batch: usize,
    available: usize,
    budget: usize,
    /// The batch alone is too large for the pool.
    squeezed: bool,
}

impl<'a> Planner<'a> {
    fn new(running: &[Running], limits: &'a Limits) -> Self {
        let mut ranked = running.to_vec();
        ranked.sort_by_key(Running::rank);
        let slots: Vec<Slot> = ranked.into_iter().map(|sequence| Slot::new(sequence, false)).collect();
        let (available, budget) = (limits.available, limits.token_budget);
        Self { limits, batch: slots.len(), slots, available, budget, squeezed: false }
    }

    fn preempt(&mut self, slot: usize) {
        let slot = &mut self.slots[slot];
        slot.preempted = true;
        self.available += slot.sequence.exclusive + slot.granted;
        self.budget += slot.chunk;
        slot.chunk = 0;
        slot.granted = 0;
    }

    /// Gives a slot what is left to compute, as far as the limits go; preempts lower ranks if it could not advance.
    fn serve(&mut self, at: usize) {
        let Running { tokens, computed, held, .. } = self.slots[at].sequence;
        if self.slots[at].preempted || self.budget == 0 {
            return;
        }
        let room = |available: usize| (held + available) * BLOCK_TOKENS - computed;
        while room(self.available) == 0 {
            match (at + 1..self.batch).rev().find(|&lower| !self.slots[lower].preempted) {
                Some(victim) => self.preempt(victim),
                None => return,
            }
            self.squeezed = true;
        }
        let wanted = (tokens - computed).min(self.limits.max_chunk);
        let chunk = wanted.min(room(self.available)).min(self.budget);
        let granted = blocks_for(computed + chunk).saturating_sub(held);
        self.available -= granted;
        self.budget -= chunk;
        (self.slots[at].granted, self.slots[at].chunk) = (granted, chunk);
    }

    fn alive(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter(|slot| !slot.preempted)
    }

    /// Blocks that the batch needs from now on to run `steps` steps.
    fn outstanding(&self, steps: usize) -> usize {
        self.alive().map(|s| blocks_for(s.sequence.tokens + steps).saturating_sub(s.sequence.held + s.granted)).sum()
    }

    /// Whether a candidate has a place, and blocks up to its first token.
    fn fits(&self, candidate: &Waiting) -> bool {
        let required = blocks_for(candidate.tokens + 1) - candidate.hits + candidate.idle_hits;
        let largest_chunk = self.limits.max_chunk.min(self.limits.token_budget).max(1);
        let steps = (candidate.tokens - candidate.computed()).div_ceil(largest_chunk);
        self.alive().count() < self.limits.max_running && self.available >= self.outstanding(steps) + required
    }

    /// Takes a candidate into the batch if it fits, or if it does after preempting lower priorities.
    fn admit(&mut self, candidate: &Waiting) -> bool {
        let better_was_put_back = self.slots.iter().any(|s| s.preempted && s.sequence.rank() < candidate.rank());
        if self.squeezed || better_was_put_back || self.budget == 0 {
            return false;
        }
        if !self.fits(candidate) && !self.make_room(candidate) {
            return false;
        }
        self.available -= candidate.idle_hits + candidate.fetched;
        let sequence = Running {
            key: candidate.key,
            priority: candidate.priority,
            promoted: candidate.promoted,
            tokens: candidate.tokens,
            computed: candidate.computed(),
            held: candidate.hits + candidate.fetched,
            exclusive: candidate.idle_hits + candidate.fetched,
        };
        self.slots.push(Slot::new(sequence, true));
        self.serve(self.slots.len() - 1);
        true
    }

    /// Preempts sequences of lower priority, the lowest first, until the candidate fits; none if that is not enough.
    fn make_room(&mut self, candidate: &Waiting) -> bool {
        let before = (self.available, self.budget);
        let mut victims = Vec::new();
        for at in (0..self.batch).rev() {
            let Slot { ref sequence, preempted, granted, chunk, .. } = self.slots[at];
            if preempted || sequence.promoted || sequence.priority >= candidate.priority {
                continue;
            }
            victims.push((at, granted, chunk));
            self.preempt(at);
            if self.fits(candidate) {
                return true;
            }
        }
        for (at, granted, chunk) in victims {
            let slot = &mut self.slots[at];
            (slot.preempted, slot.granted, slot.chunk) = (false, granted, chunk);
        }
        (self.available, self.budget) = before;
        false
    }

    fn into_plan(self) -> Plan {
        let batch = &self.slots[..self.batch];
        Plan {
            preempt: batch.iter().rev().filter(|s| s.preempted).map(|s| s.sequence.key).collect(),
            admit: self.slots.iter().filter(|s| s.admitted).map(|s| s.sequence.key).collect(),
            chunks: self.slots.iter().filter(|s| s.chunk > 0).map(|s| (s.sequence.key, s.chunk)).collect(),
        }
    }
}

/// Whether [`plan`] does the same whoever waits: the batch is full, and nobody of it is of a lower priority than
/// `highest`, that of all who wait. Who is promoted is not pushed out by a priority.
pub fn ignores_waiting(running: &[Running], highest: Option<Priority>, limits: &Limits) -> bool {
    running.len() >= limits.max_running && running.iter().all(|s| s.promoted || Some(s.priority) >= highest)
}

/// Decides the next step. `waiting` need not be ordered.
pub fn plan(running: &[Running], waiting: &[Waiting], limits: &Limits) -> Plan {
    let mut planner = Planner::new(running, limits);
    for at in 0..planner.batch {
        if planner.slots[at].sequence.decodes() {
            planner.serve(at);
        }
    }
    let mut queue: Vec<&Waiting> = waiting.iter().collect();
    queue.sort_by_key(|candidate| candidate.rank());
    let mut queue = queue.into_iter().peekable();
    for at in 0..planner.batch {
        if planner.slots[at].sequence.decodes() {
            continue;
        }
        while let Some(candidate) = queue.next_if(|candidate| candidate.outranks(&planner.slots[at].sequence)) {
            if !planner.admit(candidate) {
                queue = Vec::new().into_iter().peekable();
            }
        }
        planner.serve(at);
    }
    while queue.next().is_some_and(|candidate| planner.admit(candidate)) {}
    planner.into_plan()
}

#[cfg(test)]
mod tests;
