//! One step: carry out a plan, run the model, choose tokens, hand them over.
use super::{Engine, Fetched, Phase, Sequence};
use crate::config::Batching;
use crate::planner::{self, Limits, Plan, Running, Waiting};
use crate::pool::BlockIndex;
use moesaic_model::{LogitsWanted, SequenceChunk};
use moesaic_telemetry::count;
use moesaic_types::{BLOCK_TOKENS, Error, Link};
use std::cmp::Reverse;
use std::time::{Duration, Instant};
use tracing::Span;

/// Waiting sequences that a plan looks at, where the batch has fewer places.
const MIN_CANDIDATES: usize = 8;

/// After so many bytes of fetched blocks that a step copies to the pool it admits nobody else.
const IMPORTED_PER_STEP: usize = 64 << 20;

/// One sequence's part of the step.
pub(super) struct Work {
    pub(super) key: u64,
    pub(super) tokens: usize,
    pub(super) logits: LogitsWanted,
}

impl Engine {
    /// Runs one step; false if there was nothing to run, or if it failed and is run again later.
    pub(super) fn step(&mut self) -> bool {
        if self.outage.pauses() {
            return false;
        }
        let began = Instant::now();
        let plan = self.plan();
        for key in &plan.preempt {
            self.preempt(*key);
        }
        let mut imported = 0;
        for key in &plan.admit {
            if imported >= IMPORTED_PER_STEP {
                break;
            }
            imported += self.admit(*key);
        }
        let work = self.prepare(&plan);
        if work.is_empty() {
            self.end_outage();
            return !plan.preempt.is_empty();
        }
        let started = Instant::now();
        let mut logits = std::mem::take(&mut self.logits);
        let batch: Vec<SequenceChunk<'_>> = work
            .iter()
            .map(|work| {
                let sequence = &self.sequences[&work.key];
                SequenceChunk {
                    tokens: &sequence.tokens[sequence.computed..sequence.computed + work.tokens],
                    start: sequence.computed,
                    blocks: &sequence.blocks,
                    logits: work.logits,
                }
            })
            .collect();
        let outcome = self.span(&work).in_scope(|| self.runner.forward(&batch, &mut logits));
        drop(batch);
        let tokens = work.iter().map(|work| work.tokens).sum();
        let elapsed = started.elapsed();
        self.metrics.step(started - began, elapsed, tokens);
        let advanced = match outcome {
            Ok(()) => {
                self.end_outage();
                self.economy.computed(self.prompt_tokens(&work), tokens, elapsed);
                let collecting = Instant::now();
                self.collect(&work, &mut logits);
                self.metrics.collected(collecting.elapsed());
                true
            }
            Err(error @ moesaic_model::Error::Experts { .. }) => {
                self.wait_for_experts(&work, &error);
                false
            }
            Err(error @ moesaic_model::Error::Stage { .. }) => {
                self.lose(Error::unavailable(format!("{error}; send the request again")));
                false
            }
            Err(error) => {
                tracing::error!(%error, sequences = work.len(), "run a step");
                let error = Error::internal(format!("the model failed: {error}"));
                work.iter().for_each(|work| self.fail(work.key, error.clone()));
                true
            }
        };
        // a step with log-probabilities of a prompt has far more rows than others
        logits.clear();
        logits.shrink_to(self.parts.config.max_running * self.info.vocab);
        self.logits = logits;
        advanced
    }

    /// A step's span, which shards' spans are children of: in the trace of the first sequence that computes its prompt.
    /// Others' steps have none: there are as many as tokens.
    fn span(&self, work: &[Work]) -> Span {
        let sequence = |work: &Work| &self.sequences[&work.key];
        let traced = work.iter().map(sequence).find(|sequence| sequence.computed < sequence.request.prompt.len());
        traced.map_or_else(Span::none, |sequence| {
            let tokens = count(work.iter().map(|work| work.tokens).sum());
            tracing::info_span!(parent: &sequence.span, "step", sequences = count(work.len()), tokens)
        })
    }

    /// Tokens of a step that are of prompts.
    fn prompt_tokens(&self, work: &[Work]) -> usize {
        let is_prompt = |work: &&Work| {
            let sequence = &self.sequences[&work.key];
            sequence.computed < sequence.request.prompt.len()
        };
        work.iter().filter(is_prompt).map(|work| work.tokens).sum()
    }

    fn plan(&mut self) -> Plan {
        let limits = Limits {
            token_budget: self.parts.config.token_budget,
            max_chunk: self.parts.config.max_chunk,
            max_running: self.parts.config.max_running,
            available: self.pool.available(),
        };
        let batch: Vec<Running> = self.in_phase(Phase::Running).map(|(key, s)| self.running(key, s)).collect();
        let highest = self.in_phase(Phase::Waiting).map(|(_, s)| s.request.priority).max();
        // those who wait may have something to fetch meanwhile
        if !self.fetches() && planner::ignores_waiting(&batch, highest, &limits) {
            return planner::plan(&batch, &[], &limits);
        }
        let promote_after = Duration::from_millis(self.parts.config.promote_after_ms);
        for sequence in self.sequences.values_mut().filter(|s| s.phase == Phase::Waiting) {
            sequence.promoted |= sequence.waiting_since.elapsed() > promote_after;
        }
        let is_static = self.parts.config.batching == Batching::Static;
        let closed = is_static && !batch.is_empty();
        let mut queue: Vec<_> = self
            .in_phase(Phase::Waiting)
            .filter(|(key, _)| !closed || self.members.contains(key))
            .map(|(key, s)| (Reverse(s.promoted), Reverse(s.request.priority), key))
            .collect();
        queue.sort_unstable();
        let places = limits.max_running.saturating_sub(batch.len()).max(MIN_CANDIDATES);
        let next: Vec<u64> = queue.into_iter().map(|(_, _, key)| key).take(places).collect();
        if is_static && batch.is_empty() {
            self.members = next.iter().copied().take(limits.max_running).collect();
        }
        let queue = self.fetch_for(next, places);
        let queue: Vec<Waiting> = queue.into_iter().map(|key| self.waiting(key)).collect();
        planner::plan(&batch, &queue, &limits)
    }

    fn in_phase(&self, phase: Phase) -> impl Iterator<Item = (u64, &Sequence)> {
        self.sequences.iter().filter(move |(_, s)| s.phase == phase).map(|(key, s)| (*key, s))
    }

    fn running(&self, key: u64, sequence: &Sequence) -> Running {
        Running {
            key,
            priority: sequence.request.priority,
            promoted: sequence.promoted,
            tokens: sequence.tokens.len(),
            computed: sequence.computed,
            held: sequence.blocks.len(),
            exclusive: self.pool.exclusive(&sequence.blocks),
        }
    }

    fn waiting(&self, key: u64) -> Waiting {
        let sequence = &self.sequences[&key];
        let hits = self.pool.peek(sequence.reusable());
        Waiting {
            key,
            priority: sequence.request.priority,
            promoted: sequence.promoted,
            tokens: sequence.tokens.len(),
            hits: hits.blocks,
            idle_hits: hits.idle,
            fetched: sequence.usable_fetched(hits.blocks).len(),
        }
    }

    /// Takes a sequence out of the batch and its blocks away; it computes everything again later.
    fn preempt(&mut self, key: u64) {
        let Some(sequence) = self.sequences.get_mut(&key) else { return };
        tracing::debug!(request = %sequence.request.id, tokens = sequence.tokens.len(), "preempted");
        let blocks = std::mem::take(&mut sequence.blocks);
        sequence.computed = 0;
        sequence.registered = 0;
        sequence.wait();
        self.release(blocks);
        self.metrics.preemptions.increment(1);
        self.preemptions += 1;
    }

    /// Gives a waiting sequence the blocks that are cached or fetched; how many bytes of the latter.
    fn admit(&mut self, key: u64) -> usize {
        let Some(sequence) = self.sequences.get_mut(&key) else { return 0 };
        let is_counted = !sequence.request.is_canary();
        if let Some(queued) = sequence.start().filter(|_| is_counted) {
            self.metrics.queued(queued);
            self.metrics.prompt_tokens.increment(sequence.request.prompt.len() as u64);
        }
        let reusable = sequence.reusable().to_vec();
        let mut blocks = self.pool.acquire(&reusable);
        let fetched = sequence.usable_fetched(blocks.len()).to_vec();
        let Fetched { room: _room, lacks_room, .. } = std::mem::take(&mut sequence.fetched);
        self.metrics.store_skipped.increment(lacks_room as u64);
        let mut imported = 0;
        for bytes in fetched {
            imported += bytes.len();
            let Some(block) = self.allocate() else { break };
            if let Err(error) = self.runner.import_block(block, &bytes) {
                tracing::warn!(%error, "import a block of the prefix store");
                self.pool.release(block);
                break;
            }
            let link = Link::of(&reusable, blocks.len());
            self.pool.register(block, link);
            if self.offers_full {
                self.pool.set_stored(&link.hash);
            }
            blocks.push(block);
            self.metrics.store_fetched.increment(1);
        }
        let found = blocks.len() * BLOCK_TOKENS;
        let sequence = self.sequences.get_mut(&key).expect("nothing was removed since");
        sequence.computed = found;
        sequence.registered = blocks.len();
        sequence.blocks = blocks;
        if sequence.cached_tokens.is_none() {
            sequence.cached_tokens = Some(found);
            if self.parts.config.prefix_cache && is_counted {
                self.metrics.prefix_queries.increment(sequence.request.prompt.len() as u64);
                self.metrics.prefix_hits.increment(found as u64);
            }
        }
        imported
    }

    /// Allocates the blocks of the planned chunks. A chunk that cannot have them waits for the next step.
    fn prepare(&mut self, plan: &Plan) -> Vec<Work> {
        let mut work = Vec::with_capacity(plan.chunks.len());
        for &(key, planned) in &plan.chunks {
            // one that was to be admitted may still wait
            let Some(sequence) = self.sequences.get(&key).filter(|s| s.phase == Phase::Running) else { continue };
            let tokens = planned.min(sequence.tokens.len() - sequence.computed);
            let missing = planner::blocks_for(sequence.computed + tokens).saturating_sub(sequence.blocks.len());
            let blocks: Vec<BlockIndex> = (0..missing).map_while(|_| self.allocate()).collect();
            let complete = blocks.len() == missing;
            let sequence = self.sequences.get_mut(&key).expect("it was there above");
            sequence.blocks.extend(blocks);
            if !complete {
                continue;
            }
            let last = sequence.computed + tokens == sequence.tokens.len();
            let logits = match (sequence.wants_prompt_logprobs(), last) {
                (true, _) => LogitsWanted::All,
                (false, true) => LogitsWanted::Last,
                (false, false) => LogitsWanted::None,
            };
            work.push(Work { key, tokens, logits });
        }
        work
    }

    /// A block for new tokens. What it held goes to the prefix store before anything writes to it.
    fn allocate(&mut self) -> Option<BlockIndex> {
        let block = self.pool.allocate();
        self.offer_evicted();
        block
    }
}
