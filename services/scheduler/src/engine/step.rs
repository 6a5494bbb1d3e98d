//! One step: carry out a plan, run the model, choose tokens, hand them over.
use super::{Engine, Phase, Sequence};
use crate::planner::{self, Limits, Plan, Running, Waiting};
use crate::pool::BlockIndex;
use crate::sampler;
use moesaic_model::{LogitsWanted, SequenceChunk};
use moesaic_types::{BLOCK_TOKENS, Error, ErrorCode, FinishReason, Result, SampledToken};
use std::cmp::Reverse;
use std::time::{Duration, Instant};

/// Waiting sequences that a plan looks at, where the batch has fewer places.
const MIN_CANDIDATES: usize = 8;

struct Work {
    key: u64,
    tokens: usize,
    logits: LogitsWanted,
}

impl Engine {
    /// Runs one step; false if there was nothing to run.
    pub(super) fn step(&mut self) -> bool {
        let plan = self.plan();
        for key in &plan.preempt {
            self.preempt(*key);
        }
        for key in &plan.admit {
            self.admit(*key);
        }
        let work = self.prepare(&plan);
        if work.is_empty() {
            return !plan.preempt.is_empty();
        }
        let started = Instant::now();
        let mut logits = std::mem::take(&mut self.logits);
        logits.clear();
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
        let outcome = self.runner.forward(&batch, &mut logits);
        drop(batch);
        let tokens = work.iter().map(|work| work.tokens).sum();
        self.metrics.step(started.elapsed(), tokens);
        match outcome {
            Ok(()) => self.collect(&work, &mut logits),
            Err(error) => {
                let code = match error {
                    moesaic_model::Error::Experts { .. } => ErrorCode::Unavailable,
                    _ => ErrorCode::Internal,
                };
                tracing::error!(%error, sequences = work.len(), "run a step");
                let error = Error::new(code, format!("the model failed: {error}"));
                work.iter().for_each(|work| self.fail(work.key, error.clone()));
            }
        }
        self.logits = logits;
        true
    }

    fn plan(&self) -> Plan {
        let limits = Limits {
            token_budget: self.parts.config.token_budget,
            max_chunk: self.parts.config.max_chunk,
            max_running: self.parts.config.max_running,
            available: self.pool.available(),
        };
        let batch: Vec<Running> = self.in_phase(Phase::Running).map(|(key, s)| self.running(key, s)).collect();
        let promote_after = Duration::from_millis(self.parts.config.promote_after_ms);
        let mut queue: Vec<_> = self
            .in_phase(Phase::Waiting)
            .map(|(key, s)| (Reverse(s.submitted.elapsed() > promote_after), Reverse(s.request.priority), key))
            .collect();
        queue.sort_unstable();
        queue.truncate(limits.max_running.saturating_sub(batch.len()).max(MIN_CANDIDATES));
        let queue: Vec<Waiting> = queue.into_iter().map(|(promoted, _, key)| self.waiting(key, promoted.0)).collect();
        planner::plan(&batch, &queue, &limits)
    }

    fn in_phase(&self, phase: Phase) -> impl Iterator<Item = (u64, &Sequence)> {
        self.sequences.iter().filter(move |(_, s)| s.phase == phase).map(|(key, s)| (*key, s))
    }

    fn running(&self, key: u64, sequence: &Sequence) -> Running {
        Running {
            key,
            priority: sequence.request.priority,
            tokens: sequence.tokens.len(),
            computed: sequence.computed,
            held: sequence.blocks.len(),
            exclusive: self.pool.exclusive(&sequence.blocks),
        }
    }

    fn waiting(&self, key: u64, promoted: bool) -> Waiting {
        let sequence = &self.sequences[&key];
        let hits = self.pool.peek(sequence.reusable());
        Waiting {
            key,
            priority: sequence.request.priority,
            promoted,
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
        sequence.phase = Phase::Waiting;
        self.release(blocks);
        self.metrics.preemptions.increment(1);
        self.preemptions += 1;
    }

    /// Gives a waiting sequence the blocks that are cached or fetched.
    fn admit(&mut self, key: u64) {
        let Some(sequence) = self.sequences.get_mut(&key) else { return };
        if let Some(queued) = sequence.start() {
            self.metrics.queued(queued);
            self.metrics.prompt_tokens.increment(sequence.request.prompt.len() as u64);
        }
        let reusable = sequence.reusable().to_vec();
        let mut blocks = self.pool.acquire(&reusable);
        let fetched = sequence.usable_fetched(blocks.len()).to_vec();
        sequence.fetched = None;
        for bytes in fetched {
            let Some(block) = self.allocate() else { break };
            if let Err(error) = self.runner.import_block(block, &bytes) {
                tracing::warn!(%error, "import a block of the prefix store");
                self.pool.release(block);
                break;
            }
            self.pool.register(block, reusable[blocks.len()]);
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
            if self.parts.config.prefix_cache {
                self.metrics.prefix_queries.increment(sequence.request.prompt.len() as u64);
                self.metrics.prefix_hits.increment(found as u64);
            }
        }
    }

    /// Allocates the blocks of the planned chunks. A chunk that cannot have them waits for the next step.
    fn prepare(&mut self, plan: &Plan) -> Vec<Work> {
        let mut work = Vec::with_capacity(plan.chunks.len());
        for &(key, planned) in &plan.chunks {
            let Some(sequence) = self.sequences.get(&key) else { continue };
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

    fn collect(&mut self, work: &[Work], logits: &mut [f32]) {
        let vocab = self.info.vocab;
        let mut rows = logits;
        for work in work {
            let count = match work.logits {
                LogitsWanted::None => 0,
                LogitsWanted::Last => 1,
                LogitsWanted::All => work.tokens,
            };
            let (own, rest) = rows.split_at_mut(count * vocab);
            rows = rest;
            let sequence = self.sequences.get_mut(&work.key).expect("sequences of a step stay until it ends");
            let start = sequence.computed;
            sequence.computed += work.tokens;
            self.register(work.key);
            let sequence = self.sequences.get_mut(&work.key).expect("registering removes nothing");
            let last = sequence.computed == sequence.tokens.len();
            let outcome = match (work.logits, last) {
                (LogitsWanted::None, _) => Ok(None),
                (LogitsWanted::All, false) => prompt_logprobs(sequence, start, own, vocab).map(|()| None),
                (LogitsWanted::All, true) => prompt_logprobs(sequence, start, own, vocab)
                    .and_then(|()| choose(sequence, &mut own[(count - 1) * vocab..])),
                (LogitsWanted::Last, _) => choose(sequence, own),
            };
            match outcome {
                Err(error) => self.fail(work.key, error),
                Ok(_) if !last => {}
                Ok(token) => self.accept(work.key, token),
            }
        }
    }

    /// Names blocks that became full, so that others can share them.
    fn register(&mut self, key: u64) {
        if !self.parts.config.prefix_cache {
            return;
        }
        let sequence = self.sequences.get_mut(&key).expect("sequences of a step stay until it ends");
        for index in sequence.registered..sequence.computed / BLOCK_TOKENS {
            if sequence.chain.len() == index {
                let tokens = &sequence.tokens[index * BLOCK_TOKENS..(index + 1) * BLOCK_TOKENS];
                let parent = index.checked_sub(1).map(|parent| &sequence.chain[parent]);
                sequence.chain.push(self.parts.hasher.next(&sequence.request.salt, parent, tokens));
            }
            self.pool.register(sequence.blocks[index], sequence.chain[index]);
            sequence.registered = index + 1;
        }
    }

    /// Appends a chosen token (`None`: the grammar was complete before it) and ends the sequence if it is time.
    fn accept(&mut self, key: u64, token: Option<SampledToken>) {
        let sequence = self.sequences.get_mut(&key).expect("sequences of a step stay until it ends");
        let Some(token) = token else { return self.finish(key, FinishReason::Stop) };
        let id = token.id;
        let (first, since) = sequence.push(token);
        self.metrics.token(first, since);
        let stop = &sequence.request.stop;
        let generated = sequence.generated();
        let ends = (!stop.ignore_eos && self.parts.eos.contains(&id)) || stop.stop_token_ids.contains(&id);
        let complete = sequence.grammar.as_ref().is_some_and(|grammar| grammar.is_complete());
        if complete || (ends && generated >= stop.min_tokens) {
            self.finish(key, FinishReason::Stop);
        } else if generated >= stop.max_tokens || sequence.tokens.len() >= self.info.max_context {
            self.finish(key, FinishReason::Length);
        } else {
            sequence.deliver();
        }
    }
}

/// Chooses the next token from its row; `None` if the grammar allows no further one.
fn choose(sequence: &mut Sequence, row: &mut [f32]) -> Result<Option<SampledToken>> {
    sampler::check(row)?;
    if sequence.grammar.as_ref().is_some_and(|grammar| grammar.is_complete()) {
        return Ok(None);
    }
    let mask = sequence.grammar.as_mut().map(|grammar| grammar.mask()).transpose()?;
    let raw = sequence.request.top_logprobs.map(|top| (top as usize, row.to_vec()));
    let position = sequence.tokens.len();
    let id = sampler::sample(row, sequence.sampling(), sequence.seen.as_ref(), mask.as_deref(), position)?;
    if let Some(grammar) = &mut sequence.grammar {
        grammar.advance(id)?;
    }
    Ok(Some(match raw {
        Some((top, raw)) => sampler::log_probabilities(&raw, id, top),
        None => SampledToken { id, logprob: None, top_logprobs: Vec::new() },
    }))
}

/// Gathers the log-probabilities of the prompt tokens that follow the positions from `start`.
fn prompt_logprobs(sequence: &mut Sequence, start: usize, rows: &[f32], vocab: usize) -> Result<()> {
    let top = sequence.request.top_logprobs.unwrap_or(0) as usize;
    let Some(gathered) = &mut sequence.prompt_logprobs else { return Ok(()) };
    for (position, row) in (start + 1..sequence.request.prompt.len()).zip(rows.chunks_exact(vocab)) {
        if position == gathered.len() + 1 {
            sampler::check(row)?;
            gathered.push(sampler::log_probabilities(row, sequence.request.prompt[position], top));
        }
    }
    Ok(())
}
