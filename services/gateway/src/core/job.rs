//! A request that is known to be good.
use super::names::Names;
use super::told::Told;
use crate::served::ServedModel;
use moesaic_types::{
    BlockHash, Grammar, Priority, RequestId, SamplingParams, StopConditions, TenantId, TenantSalt, TokenId,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

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

/// Whose a request is, as others may know it: the key itself stays at the door.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tenant {
    /// Keeps its prefix blocks apart; the default's where prefixes are shared.
    pub salt: TenantSalt,
    /// Stands for it where requests must wait.
    pub id: TenantId,
}

/// A request that is known to be good.
pub struct Job {
    /// The request's id.
    pub id: RequestId,
    /// The model.
    pub model: Arc<ServedModel>,
    /// The request's span, which all jobs of the request share.
    pub(crate) told: Arc<Told>,
    /// The prompt.
    pub prompt: Arc<[TokenId]>,
    /// Names of the prompt's full blocks, for the router.
    pub blocks: Vec<BlockHash>,
    /// How to choose tokens; choice i draws with `seed + i`.
    pub sampling: SamplingParams,
    /// When to stop.
    pub stop: StopConditions,
    /// Stop texts.
    pub stop_texts: Vec<String>,
    /// The stop text that ended an answer is part of it.
    pub include_stop_text: bool,
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
    /// How long it may take from when it was let in.
    pub time: Option<Duration>,
    /// Answer by then; set when it is started.
    pub deadline: Option<Instant>,
    /// Whose it is.
    pub tenant: Tenant,
    /// Special tokens are not shown.
    pub skip_special: bool,
    /// The answer goes on with the prompt's own text (a completion).
    pub continues: bool,
    /// What the client calls the fields.
    pub names: Names,
}
