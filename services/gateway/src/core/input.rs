//! Validation: from what a client sent, whichever door it took, to a job that the engine can run.
use crate::served::ServedModel;
use moesaic_types::{Error, Grammar, Priority, RequestId, Result, SamplingParams, StopConditions, TenantSalt, TokenId};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest stop text, in bytes.
const MAX_STOP_BYTES: usize = 256;
const MAX_STOP_TOKENS: usize = 64;
const MAX_LOGIT_BIAS: usize = 1024;
const MAX_TOP_LOGPROBS: u64 = 20;
const MAX_PRIORITY: i64 = 100;

/// The operator's limits on one request.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// `n` at most.
    pub max_n: usize,
    /// Stop texts at most.
    pub max_stop: usize,
    /// Deadline where the request sets none.
    pub default_deadline: Option<Duration>,
}

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
    pub stop_token_ids: Vec<u64>,
    pub ignore_eos: bool,
    pub n: Option<u64>,
    pub top_logprobs: Option<u64>,
    pub grammar: Option<Grammar>,
    pub priority: i64,
    pub deadline_ms: Option<u64>,
}

/// A request that is known to be good.
pub struct Job {
    /// The request's id.
    pub id: RequestId,
    /// The model.
    pub model: Arc<ServedModel>,
    /// The prompt.
    pub prompt: Arc<[TokenId]>,
    /// How to choose tokens; choice i draws with `seed + i`.
    pub sampling: SamplingParams,
    /// When to stop.
    pub stop: StopConditions,
    /// Stop texts.
    pub stop_texts: Vec<String>,
    /// Log-probabilities with so many alternatives.
    pub top_logprobs: Option<u8>,
    /// Log-probabilities of the prompt.
    pub prompt_logprobs: bool,
    /// What the answer must look like.
    pub grammar: Option<Grammar>,
    /// Answers.
    pub n: usize,
    /// Order of service.
    pub priority: Priority,
    /// Answer by then.
    pub deadline: Option<Instant>,
    /// The tenant's salt.
    pub salt: TenantSalt,
    /// Special tokens are not shown.
    pub skip_special: bool,
    /// The answer goes on with the prompt's own text (a completion).
    pub continues: bool,
}

fn number(field: &str, value: Option<f64>, default: f64, low: f64, high: f64, open: Open) -> Result<f32> {
    let Some(value) = value else { return Ok(default as f32) };
    let inside = match open {
        Open::None => (low..=high).contains(&value),
        Open::Low => value > low && value <= high,
        Open::High => value >= low && value < high,
    };
    if inside {
        return Ok(value as f32);
    }
    let bounds = match open {
        Open::None => format!("from {low} to {high}"),
        Open::Low => format!("above {low}, at most {high}"),
        Open::High => format!("from {low}, below {high}"),
    };
    Err(Error::invalid(field, format!("{field} is {value}; it must be {bounds}")))
}

#[derive(Clone, Copy)]
enum Open {
    None,
    Low,
    High,
}

fn whole(field: &str, value: Option<u64>, default: u64, low: u64, high: u64) -> Result<u64> {
    match value {
        None => Ok(default),
        Some(value) if (low..=high).contains(&value) => Ok(value),
        Some(value) => Err(Error::invalid(field, format!("{field} is {value}; it must be from {low} to {high}"))),
    }
}

fn token(field: &str, id: u64, vocab: usize) -> Result<TokenId> {
    match TokenId::try_from(id) {
        Ok(token) if (token as usize) < vocab => Ok(token),
        _ => Err(Error::invalid(field, format!("{field}: token {id} is outside the vocabulary of {vocab}"))),
    }
}

/// Checks that every token is in the model's vocabulary.
///
/// # Errors
/// `InvalidArgument` naming the field and the token.
pub(crate) fn tokens(field: &str, ids: &[u64], model: &ServedModel) -> Result<Vec<TokenId>> {
    ids.iter().map(|id| token(field, *id, model.vocab)).collect()
}

impl SamplingInput {
    /// Validates against the model and the limits.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field and the limit.
    pub fn into_job(
        self,
        id: RequestId,
        model: Arc<ServedModel>,
        prompt: Vec<TokenId>,
        limits: &Limits,
        salt: TenantSalt,
    ) -> Result<Job> {
        let (context, vocab) = (model.max_context, model.vocab);
        if prompt.is_empty() {
            return Err(Error::invalid("prompt", "prompt is empty; it must have at least one token"));
        }
        if prompt.len() >= context {
            let len = prompt.len();
            let message = format!("prompt has {len} tokens; with one token of answer the context holds {context}");
            return Err(Error::invalid("prompt", message));
        }
        let room = context - prompt.len();
        let defaults = &model.defaults;
        let default_temperature = match (defaults.temperature, defaults.do_sample) {
            (_, false) => 0.0,
            (temperature, true) => temperature.unwrap_or(1.0),
        };
        let n = whole("n", self.n, 1, 1, limits.max_n as u64)?;
        let max_tokens = whole("max_tokens", self.max_tokens, room as u64, 1, u64::from(u32::MAX))?.min(room as u64);
        let min_tokens = whole("min_tokens", self.min_tokens, 0, 0, max_tokens)?;
        let top_k = match self.top_k {
            None => defaults.top_k,
            Some(0 | -1) => None,
            Some(k @ 1..) => Some(u32::try_from(k).unwrap_or(u32::MAX)),
            Some(k) => return Err(Error::invalid("top_k", format!("top_k is {k}; it must be -1, 0 (all) or more"))),
        };
        if self.logit_bias.len() > MAX_LOGIT_BIAS {
            let len = self.logit_bias.len();
            return Err(Error::invalid(
                "logit_bias",
                format!("logit_bias has {len} tokens; the limit is {MAX_LOGIT_BIAS}"),
            ));
        }
        let mut logit_bias = std::collections::BTreeMap::new();
        for (id, bias) in &self.logit_bias {
            let bias = number("logit_bias", Some(*bias), 0.0, -100.0, 100.0, Open::None)?;
            logit_bias.insert(token("logit_bias", *id, vocab)?, bias);
        }
        let default = |value: Option<f32>, otherwise: f64| value.map_or(otherwise, f64::from);
        let sampling = SamplingParams {
            temperature: number("temperature", self.temperature, f64::from(default_temperature), 0.0, 2.0, Open::None)?,
            top_k,
            top_p: number("top_p", self.top_p, default(defaults.top_p, 1.0), 0.0, 1.0, Open::Low)?,
            min_p: number("min_p", self.min_p, default(defaults.min_p, 0.0), 0.0, 1.0, Open::High)?,
            repetition_penalty: number(
                "repetition_penalty",
                self.repetition_penalty,
                default(defaults.repetition_penalty, 1.0),
                0.0,
                10.0,
                Open::Low,
            )?,
            presence_penalty: number("presence_penalty", self.presence_penalty, 0.0, -2.0, 2.0, Open::None)?,
            frequency_penalty: number("frequency_penalty", self.frequency_penalty, 0.0, -2.0, 2.0, Open::None)?,
            logit_bias,
            seed: self.seed.unwrap_or_else(random_seed),
        };
        if self.stop.len() > limits.max_stop {
            let (len, limit) = (self.stop.len(), limits.max_stop);
            return Err(Error::invalid("stop", format!("stop has {len} texts; the limit is {limit}")));
        }
        if let Some(text) = self.stop.iter().find(|s| s.is_empty() || s.len() > MAX_STOP_BYTES) {
            let message = format!("stop has a text of {} bytes; it must be 1 to {MAX_STOP_BYTES}", text.len());
            return Err(Error::invalid("stop", message));
        }
        if self.stop_token_ids.len() > MAX_STOP_TOKENS {
            let message =
                format!("stop_token_ids has {} tokens; the limit is {MAX_STOP_TOKENS}", self.stop_token_ids.len());
            return Err(Error::invalid("stop_token_ids", message));
        }
        let top_logprobs = match self.top_logprobs {
            None => None,
            some => Some(whole("top_logprobs", some, 0, 0, MAX_TOP_LOGPROBS)? as u8),
        };
        if !(-MAX_PRIORITY..=MAX_PRIORITY).contains(&self.priority) {
            let message = format!("priority is {}; it must be from -{MAX_PRIORITY} to {MAX_PRIORITY}", self.priority);
            return Err(Error::invalid("priority", message));
        }
        let wait = self.deadline_ms.filter(|ms| *ms > 0).map(Duration::from_millis).or(limits.default_deadline);
        Ok(Job {
            id,
            prompt: prompt.into(),
            sampling,
            stop: StopConditions {
                max_tokens: max_tokens as usize,
                min_tokens: min_tokens as usize,
                stop_token_ids: tokens("stop_token_ids", &self.stop_token_ids, &model)?,
                ignore_eos: self.ignore_eos,
            },
            model,
            stop_texts: self.stop,
            top_logprobs,
            prompt_logprobs: false,
            grammar: self.grammar,
            n: n as usize,
            priority: Priority(self.priority as i32),
            deadline: wait.map(|wait| Instant::now() + wait),
            salt,
            skip_special: true,
            continues: false,
        })
    }
}

fn random_seed() -> u64 {
    let bytes = *uuid::Uuid::new_v4().as_bytes();
    u64::from_le_bytes([0, 1, 2, 3, 4, 5, 9, 10].map(|i| bytes[i]))
}
