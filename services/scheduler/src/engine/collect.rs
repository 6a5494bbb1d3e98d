//! The end of a step: from rows of logits to tokens, and from tokens to the ends of sequences.
use super::step::Work;
use super::{Engine, Sequence};
use crate::sampler::{self, Allowed, Scratch};
use moesaic_model::LogitsWanted;
use moesaic_types::{BLOCK_TOKENS, Error, FinishReason, Link, Result, SampledToken, TokenId};

impl Engine {
    /// Takes over what a step computed. Rows that cannot be used end their own sequence only.
    pub(super) fn collect(&mut self, work: &[Work], logits: &mut [f32]) {
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
            if let Err((row, reason)) = usable(own, vocab) {
                let position = sequence.computed + work.tokens - count + row;
                self.fail_poisoned(work.key, position, reason);
                continue;
            }
            let start = sequence.computed;
            sequence.computed += work.tokens;
            self.register(work.key);
            let sequence = self.sequences.get_mut(&work.key).expect("registering removes nothing");
            let last = sequence.computed == sequence.tokens.len();
            let outcome = match (work.logits, last) {
                (LogitsWanted::None, _) => Ok(None),
                (LogitsWanted::All, false) => {
                    prompt_logprobs(sequence, start, own, vocab);
                    Ok(None)
                }
                (LogitsWanted::All, true) => {
                    prompt_logprobs(sequence, start, own, vocab);
                    choose(sequence, &self.parts.eos, &mut own[(count - 1) * vocab..], &mut self.sampling)
                }
                (LogitsWanted::Last, _) => choose(sequence, &self.parts.eos, own, &mut self.sampling),
            };
            match outcome {
                Err(error) => self.fail(work.key, error),
                Ok(_) if !last => {}
                Ok(token) => self.accept(work.key, token),
            }
        }
    }

    /// Ends a sequence whose logits are no numbers. What led to them may be in any of its blocks, and in others' blocks
    /// of the same tokens: none of them is shared any longer. Who shares them already finds out by itself.
    fn fail_poisoned(&mut self, key: u64, position: usize, reason: &str) {
        let Some(sequence) = self.sequences.get(&key) else { return };
        tracing::error!(request = %sequence.request.id, position, reason, "the model's logits cannot be used");
        for hash in &sequence.chain {
            self.pool.forget(hash);
        }
        // a block of another replica may be what is wrong: without this every replica would try it
        self.forget_stored(sequence.chain.clone());
        let message = format!("the model's logits at position {position} cannot be used: {reason}");
        self.fail(key, Error::internal(message));
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
            self.pool.register(sequence.blocks[index], Link::of(&sequence.chain, index));
            sequence.registered = index + 1;
        }
    }

    /// Appends a chosen token (`None`: the grammar was complete before it) and ends the sequence if it is time.
    fn accept(&mut self, key: u64, token: Option<SampledToken>) {
        let sequence = self.sequences.get_mut(&key).expect("sequences of a step stay until it ends");
        let Some(token) = token else { return self.finish(key, FinishReason::Stop) };
        let id = token.id;
        let (first, since) = sequence.push(token);
        let is_counted = !sequence.request.is_canary();
        if is_counted {
            self.metrics.token(first, since);
        }
        if first {
            if let Some(time) = sequence.prefill_time().filter(|_| is_counted) {
                self.metrics.prefilled(time);
            }
            self.queue_prompt(key);
        }
        let sequence = self.sequences.get(&key).expect("queueing removes nothing");
        let stop = &sequence.request.stop;
        let generated = sequence.generated();
        let ends = (!stop.ignore_eos && self.parts.eos.contains(&id)) || stop.stop_token_ids.contains(&id);
        let complete = sequence.grammar.as_ref().is_some_and(|grammar| grammar.is_complete());
        if complete || (ends && generated >= stop.min_tokens) {
            self.finish(key, FinishReason::Stop);
        } else if generated >= stop.max_tokens || sequence.tokens.len() >= self.info.max_context {
            self.finish(key, FinishReason::Length);
        } else if let Some(sequence) = self.sequences.get_mut(&key) {
            sequence.deliver();
        }
    }
}

/// Whether each row can be used; which is the first that cannot, and why.
fn usable(rows: &[f32], vocab: usize) -> Result<(), (usize, &'static str)> {
    let mut rows = rows.chunks_exact(vocab).enumerate();
    rows.try_for_each(|(at, row)| sampler::check(row).map_err(|reason| (at, reason)))
}

/// Chooses the next token from its row; `None` if the grammar allows no further one.
fn choose(
    sequence: &mut Sequence,
    eos: &[TokenId],
    row: &mut [f32],
    scratch: &mut Scratch,
) -> Result<Option<SampledToken>> {
    if sequence.grammar.as_ref().is_some_and(|grammar| grammar.is_complete()) {
        return Ok(None);
    }
    let mask = sequence.grammar.as_mut().map(|grammar| grammar.mask()).transpose()?;
    let held_back = sequence.held_back(eos);
    let allowed = Allowed { mask: mask.as_deref(), held_back: &held_back };
    let top_logprobs = sequence.request.top_logprobs;
    if top_logprobs.is_some() {
        row.clone_into(&mut scratch.raw);
    }
    let position = sequence.tokens.len();
    let id = sampler::sample(row, sequence.sampling(), sequence.seen.as_ref(), allowed, position, scratch)?;
    if let Some(grammar) = &mut sequence.grammar {
        grammar.advance(id)?;
    }
    Ok(Some(match top_logprobs {
        Some(top) => sampler::log_probabilities(&scratch.raw, id, top as usize),
        None => SampledToken { id, logprob: None, top_logprobs: Vec::new() },
    }))
}

/// Gathers the log-probabilities of the prompt tokens that follow the positions from `start`.
fn prompt_logprobs(sequence: &mut Sequence, start: usize, rows: &[f32], vocab: usize) {
    let top = sequence.request.top_logprobs.unwrap_or(0) as usize;
    let Some(gathered) = &mut sequence.prompt_logprobs else { return };
    for (position, row) in (start + 1..sequence.request.prompt.len()).zip(rows.chunks_exact(vocab)) {
        if position == gathered.len() + 1 {
            gathered.push(sampler::log_probabilities(row, sequence.request.prompt[position], top));
        }
    }
}
