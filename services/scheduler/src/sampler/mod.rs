//! From a row of logits to a token. The order is that of `SamplingParams`: bias, penalties, grammar mask, tokens that
//! must not come yet, temperature, top-k, top-p, min-p, draw. Everything is a function of the row, the parameters, the tokens so far
//! and the position, so that neither batching nor preemption can change a draw. Ties go to the lowest id.
mod best;
mod candidates;
mod rng;

use best::{best, extremes, likeliest};
use candidates::Candidates;
use moesaic_types::{Error, Result, SampledToken, SamplingParams, TokenId};
use std::collections::{BTreeMap, BTreeSet};

/// Tokens seen so far, as far as penalties need them.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    anywhere: BTreeSet<TokenId>,
    output: BTreeMap<TokenId, u32>,
}

impl Seen {
    /// Of a prompt, whose last `resumed` tokens are output.
    pub fn new(prompt: &[TokenId], resumed: usize) -> Self {
        let mut seen = Self { anywhere: prompt.iter().copied().collect(), output: BTreeMap::new() };
        prompt[prompt.len() - resumed..].iter().for_each(|&token| seen.push(token));
        seen
    }

    /// Another token of output.
    pub fn push(&mut self, token: TokenId) {
        self.anywhere.insert(token);
        *self.output.entry(token).or_default() += 1;
    }

    /// Whether these parameters look at the tokens so far.
    pub fn needed(params: &SamplingParams) -> bool {
        params.repetition_penalty != 1.0 || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0
    }
}

/// Checks that a row is usable: no NaN, no +infinity, something above -infinity. Says what is wrong otherwise.
pub fn check(logits: &[f32]) -> Result<(), &'static str> {
    let (least, largest) = extremes(logits);
    if least.is_nan() || largest.is_nan() || largest == f32::INFINITY {
        return Err("NaN or infinity");
    }
    if largest == f32::NEG_INFINITY {
        return Err("no finite number");
    }
    Ok(())
}

/// A token with its log-probability and the `top` likeliest tokens, under the raw logits.
pub fn log_probabilities(logits: &[f32], token: TokenId, top: usize) -> SampledToken {
    let largest = f64::from(extremes(logits).1);
    let total = logits.iter().map(|&l| (l as f64 - largest).exp()).sum::<f64>().ln() + largest;
    let logprob = |id: TokenId| (logits[id as usize] as f64 - total) as f32;
    let mut likeliest = Vec::with_capacity(top + 1);
    best(logits, top, &mut likeliest);
    SampledToken {
        id: token,
        logprob: Some(logprob(token)),
        top_logprobs: likeliest.into_iter().map(|id| (id, logprob(id))).collect(),
    }
}

/// Memory that is kept from one token to the next.
#[derive(Debug, Default)]
pub struct Scratch {
    /// A row before [`sample`] changed it, for whoever needs it afterwards.
    pub raw: Vec<f32>,
    candidates: Candidates,
}

/// What may come next.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allowed<'a> {
    /// A bit per token that the grammar allows.
    pub mask: Option<&'a [u32]>,
    /// Tokens that must not come yet; they may where nothing else can.
    pub held_back: &'a [TokenId],
}

/// Chooses the token at `position`. Changes `logits`.
pub fn sample(
    logits: &mut [f32],
    params: &SamplingParams,
    seen: Option<&Seen>,
    allowed: Allowed<'_>,
    position: usize,
    scratch: &mut Scratch,
) -> Result<TokenId> {
    for (&token, &bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit += bias;
        }
    }
    if let Some(seen) = seen {
        penalize(logits, params, seen);
    }
    if let Some(mask) = allowed.mask {
        let words = mask.iter().copied().chain(std::iter::repeat(0));
        for (run, word) in logits.chunks_mut(32).zip(words).filter(|(_, word)| *word != u32::MAX) {
            let forbidden = run.iter_mut().enumerate().filter(|(bit, _)| word >> bit & 1 == 0);
            forbidden.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
        }
    }
    hold_back(logits, allowed.held_back);
    let greedy = likeliest(logits)
        .filter(|&id| logits[id as usize] > f32::NEG_INFINITY)
        .ok_or_else(|| Error::internal("no token is allowed here by the grammar and the model"))?;
    if params.temperature == 0.0 {
        return Ok(greedy);
    }
    let share = rng::uniform(params.seed, position as u64);
    Ok(scratch.candidates.draw(logits, params, greedy, share))
}

fn hold_back(logits: &mut [f32], tokens: &[TokenId]) {
    let tokens = tokens.iter().map(|&token| token as usize).filter(|&token| token < logits.len());
    let before: Vec<(usize, f32)> = tokens.map(|token| (token, logits[token])).collect();
    before.iter().for_each(|&(token, _)| logits[token] = f32::NEG_INFINITY);
    // A grammar at its end allows nothing else.
    if !before.is_empty() && logits.iter().all(|&logit| logit == f32::NEG_INFINITY) {
        // Backwards: a token that is named twice was already masked when it was saved again.
        before.iter().rev().for_each(|&(token, logit)| logits[token] = logit);
    }
}

fn penalize(logits: &mut [f32], params: &SamplingParams, seen: &Seen) {
    if params.repetition_penalty != 1.0 {
        for &token in &seen.anywhere {
            if let Some(logit) = logits.get_mut(token as usize) {
                let penalty = params.repetition_penalty;
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }
    for (&token, &count) in &seen.output {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit -= params.presence_penalty + params.frequency_penalty * count as f32;
        }
    }
}

#[cfg(test)]
mod tests;
