//! What the gateway asks of a scheduler, and what comes back.
use crate::{RequestId, TenantSalt, TokenId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

/// One sequence to generate. `n > 1` is several of these with seeds of their own; they share the prompt's blocks.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// Unique among the requests in flight.
    pub id: RequestId,
    /// The prompt's tokens, then any tokens that another replica already emitted; at least one.
    pub prompt: Arc<[TokenId]>,
    /// How many tokens at the end of `prompt` were emitted before (a migrated request); 0 otherwise.
    pub resumed_tokens: usize,
    /// How the next token is chosen.
    pub sampling: SamplingParams,
    /// When to stop.
    pub stop: StopConditions,
    /// Return the sampled token's log-probability and this many best alternatives (0..=20).
    pub top_logprobs: Option<u8>,
    /// Return the prompt tokens' log-probabilities (the `echo` + `logprobs` of completions).
    pub prompt_logprobs: bool,
    /// Constrains the output.
    pub grammar: Option<Grammar>,
    /// Higher runs first.
    pub priority: Priority,
    /// Answer by then or fail with `DeadlineExceeded`.
    pub deadline: Option<Instant>,
    /// Keeps tenants' blocks apart.
    pub salt: TenantSalt,
    /// The trace that this request belongs to, as a W3C `traceparent`; `None` where it is not traced.
    pub traceparent: Option<String>,
}

impl GenerateRequest {
    /// Whether it only shows whether the replica works: nobody's request, and not counted among them.
    pub fn is_canary(&self) -> bool {
        self.salt == TenantSalt::CANARY
    }
}

/// Order of service: a higher value runs first, and may preempt a lower one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Priority(pub i32);

/// How the next token is chosen from the logits. Applied in this order: bias, penalties, grammar mask, `min_tokens`,
/// temperature, top-k, top-p, min-p, draw.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// 0 is greedy; finite, 0..=2 at the door.
    pub temperature: f32,
    /// Keep the k likeliest tokens; `None` keeps all.
    pub top_k: Option<u32>,
    /// Keep the smallest set whose probability reaches this; in (0, 1].
    pub top_p: f32,
    /// Drop tokens whose probability is below this share of the likeliest token's; in [0, 1).
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output; > 0, 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from logits of tokens seen in the output; -2..=2.
    pub presence_penalty: f32,
    /// Subtracted once per occurrence in the output; -2..=2.
    pub frequency_penalty: f32,
    /// Added to logits; -100..=100.
    pub logit_bias: BTreeMap<TokenId, f32>,
    /// The draw at position p depends on this and on p only.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            seed: 0,
        }
    }
}

impl SamplingParams {
    /// The likeliest token always.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }
}

/// When a sequence ends. Stop strings are the gateway's work: it has the text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StopConditions {
    /// Tokens to generate at most (not counting resumed ones); at least 1.
    pub max_tokens: usize,
    /// End-of-sequence and stop tokens are not chosen before this many tokens (not counting resumed ones), unless a
    /// grammar allows nothing else.
    pub min_tokens: usize,
    /// Further tokens that end the sequence; the model's own are added by the scheduler.
    pub stop_token_ids: Vec<TokenId>,
    /// The model's own end-of-sequence tokens do not end the sequence.
    pub ignore_eos: bool,
}

/// Constrains the output to a language.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", content = "text", rename_all = "snake_case")]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// A JSON Schema, as JSON text.
    JsonSchema(Arc<str>),
    /// A regular expression that the whole output matches.
    Regex(Arc<str>),
    /// A grammar in llguidance's Lark dialect.
    Lark(Arc<str>),
}

/// One token of the output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampledToken {
    /// The token.
    pub id: TokenId,
    /// Its log-probability under the model (before temperature and cuts), where asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens with their log-probabilities, best first, where asked for.
    pub top_logprobs: Vec<(TokenId, f32)>,
}

/// A piece of the answer. The last one has `finish`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Delta {
    /// New tokens, in order; a token that ended the sequence (end of sequence, stop token) is included.
    pub tokens: Vec<SampledToken>,
    /// Log-probabilities of prompt tokens 1.., once, before the first token, where asked for.
    pub prompt_logprobs: Option<Vec<SampledToken>>,
    /// Prompt tokens that came from the prefix cache; with the first token, for an answer may be cut short.
    pub cached_tokens: Option<usize>,
    /// Set on the last delta.
    pub finish: Option<(FinishReason, Usage)>,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-sequence token, a stop token or string, or the end of the grammar.
    Stop,
    /// `max_tokens` or the context's end.
    Length,
    /// The model called a tool (set by the gateway).
    ToolCalls,
}

impl FinishReason {
    /// Its name in the APIs and in traces.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
        }
    }
}

/// What a request used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Prompt tokens whose keys and values came from the prefix cache.
    pub cached_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
}
