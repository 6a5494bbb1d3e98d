//! Validation: from what a client sent, whichever door it took, to a job that the engine can run.
use super::check::{Open, at_most, fits, number, token, tokens, whole};
use super::job::{Job, Limits, Tenant};
use super::names::Names;
use super::told::Told;
use super::tools::Tools;
use crate::served::ServedModel;
use moesaic_types::{Error, Grammar, Priority, RequestId, Result, SamplingParams, StopConditions, TokenId};
use std::sync::Arc;
use std::time::Duration;

/// Longest stop text, in bytes.
const MAX_STOP_BYTES: usize = 256;
const MAX_STOP_TOKENS: usize = 64;
const MAX_LOGIT_BIAS: usize = 1024;
const MAX_TOP_LOGPROBS: u64 = 20;
const MAX_PRIORITY: i64 = 100;
/// Longest deadline: a day.
const MAX_DEADLINE_MS: u64 = 24 * 60 * 60 * 1000;

/// Sampling as a client sent it: absent where it did not.
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(missing_docs, reason = "the fields are those of the API, with its names and meanings")]
pub struct SamplingInput {
    pub temperature: Option<f64>,
    pub top_k: Option<i64>,
    pub top_p: Option<f64>,
    pub min_p: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub presence_penalty: Option<f64>,
    pub frequency_penalty: Option<f64>,
    pub logit_bias: Vec<(u64, f64)>,
    pub seed: Option<u64>,
    pub max_tokens: Option<u64>,
    pub min_tokens: Option<u64>,
    pub stop: Vec<String>,
    pub include_stop_text: bool,
    pub stop_token_ids: Vec<u64>,
    pub ignore_eos: bool,
    pub n: Option<u64>,
    pub top_logprobs: Option<u64>,
    pub grammar: Option<Grammar>,
    pub priority: i64,
    pub deadline_ms: Option<u64>,
    pub names: Names,
}

impl SamplingInput {
    /// Holds the answer to calls, where the tools' choice demands them.
    ///
    /// # Errors
    /// `InvalidArgument` where the answer is held to something else already.
    pub fn hold_to(&mut self, tools: &Tools) -> Result<()> {
        let Some(grammar) = tools.grammar() else { return Ok(()) };
        if self.grammar.is_some() {
            let field = self.names.grammar;
            let message = format!("{field} cannot be combined with a tool that must be called; leave one out");
            return Err(Error::invalid(field, message));
        }
        self.grammar = Some(grammar);
        self.names.grammar = "tools";
        Ok(())
    }

    /// Validates against the model and the limits. Takes a time that grows with the prompt.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field, as the client calls it, and the limit.
    pub fn into_job(
        self,
        id: RequestId,
        model: Arc<ServedModel>,
        prompt: Vec<TokenId>,
        limits: &Limits,
        tenant: Tenant,
    ) -> Result<Job> {
        let names = self.names;
        self.check(id, model, prompt, limits, tenant).map_err(|error| names.apply(error))
    }

    fn check(
        self,
        id: RequestId,
        model: Arc<ServedModel>,
        prompt: Vec<TokenId>,
        limits: &Limits,
        tenant: Tenant,
    ) -> Result<Job> {
        if prompt.is_empty() {
            return Err(Error::invalid("prompt", "prompt is empty; it must have at least one token"));
        }
        fits(&model, prompt.len())?;
        // a tokenizer may know tokens that the model has no embedding for
        for id in &prompt {
            token("prompt", u64::from(*id), model.vocab)?;
        }
        let n = whole("n", self.n.unwrap_or(1), 1, limits.max_n as u64)?;
        let top_logprobs = self.top_logprobs.map(|top| whole("top_logprobs", top, 0, MAX_TOP_LOGPROBS)).transpose()?;
        if !(-MAX_PRIORITY..=MAX_PRIORITY).contains(&self.priority) {
            let message = format!("priority is {}; it must be from -{MAX_PRIORITY} to {MAX_PRIORITY}", self.priority);
            return Err(Error::invalid("priority", message));
        }
        let deadline_ms = whole("deadline_ms", self.deadline_ms.unwrap_or(0), 0, MAX_DEADLINE_MS)?;
        let time = Some(deadline_ms).filter(|ms| *ms > 0).map(Duration::from_millis).or(limits.default_deadline);
        Ok(Job {
            id,
            told: Arc::new(Told::of_current_span()),
            sampling: self.sampling(&model)?,
            stop: self.stop_conditions(&model, prompt.len())?,
            stop_texts: self.stop_texts(limits)?,
            include_stop_text: self.include_stop_text,
            blocks: model.hasher.chain(&tenant.salt, &prompt),
            model,
            prompt: prompt.into(),
            top_logprobs: top_logprobs.map(|top| top as u8),
            prompt_logprobs: false,
            grammar: self.grammar,
            n: n as usize,
            priority: Priority(self.priority as i32),
            time,
            deadline: None,
            tenant,
            skip_special: true,
            continues: false,
            names: self.names,
        })
    }

    fn stop_conditions(&self, model: &ServedModel, prompt_tokens: usize) -> Result<StopConditions> {
        let (context, room) = (model.max_context, (model.max_context - prompt_tokens) as u64);
        let max_tokens = match self.max_tokens {
            None => room,
            Some(wanted) if wanted > room => {
                let message = format!(
                    "max_tokens is {wanted}; after the prompt's {prompt_tokens} tokens the context of {context} leaves {room}"
                );
                return Err(Error::invalid("max_tokens", message));
            }
            Some(wanted) => whole("max_tokens", wanted, 1, room)?,
        };
        let min_tokens = whole("min_tokens", self.min_tokens.unwrap_or(0), 0, max_tokens)?;
        at_most("stop_token_ids", self.stop_token_ids.len(), "tokens", MAX_STOP_TOKENS)?;
        Ok(StopConditions {
            max_tokens: max_tokens as usize,
            min_tokens: min_tokens as usize,
            stop_token_ids: tokens("stop_token_ids", &self.stop_token_ids, model)?,
            ignore_eos: self.ignore_eos,
        })
    }

    fn stop_texts(&self, limits: &Limits) -> Result<Vec<String>> {
        at_most("stop", self.stop.len(), "texts", limits.max_stop)?;
        for (i, text) in self.stop.iter().enumerate() {
            if text.is_empty() || text.len() > MAX_STOP_BYTES {
                let field = format!("stop[{i}]");
                let message = format!("{field} has {} bytes; it must have 1 to {MAX_STOP_BYTES}", text.len());
                return Err(Error::invalid(field, message));
            }
        }
        Ok(self.stop.clone())
    }

    fn sampling(&self, model: &ServedModel) -> Result<SamplingParams> {
        let defaults = &model.defaults;
        let top_k = match self.top_k {
            None => defaults.top_k,
            Some(0 | -1) => None,
            Some(k @ 1..) => Some(u32::try_from(k).unwrap_or(u32::MAX)),
            Some(k) => return Err(Error::invalid("top_k", format!("top_k is {k}; it must be -1, 0 (all) or more"))),
        };
        at_most("logit_bias", self.logit_bias.len(), "tokens", MAX_LOGIT_BIAS)?;
        let mut logit_bias = std::collections::BTreeMap::new();
        for (id, bias) in &self.logit_bias {
            let id = token("logit_bias", *id, model.vocab)?;
            let field = format!("logit_bias[{id}]");
            logit_bias.insert(id, number(&field, *bias, -100.0, 100.0, Open::None)?);
        }
        let or = |value: Option<f64>, own: f32| value.unwrap_or(f64::from(own));
        let temperature = or(self.temperature, defaults.temperature);
        let top_p = or(self.top_p, defaults.top_p);
        let min_p = or(self.min_p, defaults.min_p);
        let repetition = or(self.repetition_penalty, defaults.repetition_penalty);
        let presence = self.presence_penalty.unwrap_or(0.0);
        let frequency = self.frequency_penalty.unwrap_or(0.0);
        Ok(SamplingParams {
            temperature: number("temperature", temperature, 0.0, 2.0, Open::None)?,
            top_k,
            top_p: number("top_p", top_p, 0.0, 1.0, Open::Low)?,
            min_p: number("min_p", min_p, 0.0, 1.0, Open::High)?,
            repetition_penalty: number("repetition_penalty", repetition, 0.0, 10.0, Open::Low)?,
            presence_penalty: number("presence_penalty", presence, -2.0, 2.0, Open::None)?,
            frequency_penalty: number("frequency_penalty", frequency, -2.0, 2.0, Open::None)?,
            logit_bias,
            seed: self.seed.unwrap_or_else(random_seed),
        })
    }
}

fn random_seed() -> u64 {
    // version and variant stand in bytes 6 to 8
    let bytes = *uuid::Uuid::new_v4().as_bytes();
    u64::from_le_bytes([0, 1, 2, 3, 4, 5, 9, 10].map(|i| bytes[i]))
}
