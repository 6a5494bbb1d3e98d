//! One request inside the engine.
use crate::grammar::State;
use crate::outcome::Outcome;
use crate::pool::BlockIndex;
use crate::sampler::Seen;
use bytes::Bytes;
use moesaic_telemetry::{count, genai};
use moesaic_types::{
    BLOCK_TOKENS, BlockHash, Delta, Error, FinishReason, GenerateRequest, Result, SampledToken, SamplingParams,
    TokenId, Usage,
};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tracing::Span;

/// A request on its way into the engine.
pub struct Submission {
    /// The request, checked.
    pub request: GenerateRequest,
    /// Its grammar, compiled.
    pub grammar: Option<State>,
    /// Names of the prompt's full blocks; empty where nothing is cached.
    pub chain: Vec<BlockHash>,
    /// Where the answer goes.
    pub deltas: mpsc::Sender<Result<Delta>>,
    /// A place in the queue, given back at the first step.
    pub place: OwnedSemaphorePermit,
    /// Counts the requests that are not answered yet.
    pub in_flight: Arc<()>,
    /// Told how the request ends.
    pub outcome: Arc<Outcome>,
    /// When it came.
    pub submitted: Instant,
    /// Open until the request ends.
    pub span: Span,
}

/// What a sequence is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Waits for blocks of the prefix store.
    Fetching,
    /// Waits for a place in the batch.
    Waiting,
    /// In the batch.
    Running,
}

/// Blocks of the prefix store that came for a sequence.
#[derive(Debug, Default)]
pub struct Fetched {
    /// Index of the first.
    pub first: usize,
    /// Their bytes, in order.
    pub blocks: Vec<Bytes>,
    /// What they take of the memory for fetched blocks.
    pub room: Option<OwnedSemaphorePermit>,
    /// So many are stored, and there was no room for any.
    pub lacks_room: usize,
}

/// A request inside the engine.
pub struct Sequence {
    /// The request.
    pub request: GenerateRequest,
    /// What it is doing.
    pub phase: Phase,
    /// Prompt and output.
    pub tokens: Vec<TokenId>,
    /// Tokens whose keys and values are in `blocks`.
    pub computed: usize,
    /// The blocks, in order.
    pub blocks: Vec<BlockIndex>,
    /// Names of the full blocks, as far as known.
    pub chain: Vec<BlockHash>,
    /// Leading blocks that were offered to the prefix index.
    pub registered: usize,
    /// The prefix store is to be asked for its blocks.
    pub is_unfetched: bool,
    /// Blocks of the prefix store.
    pub fetched: Fetched,
    /// Where it is in its grammar.
    pub grammar: Option<State>,
    /// Tokens so far, for penalties.
    pub seen: Option<Seen>,
    /// Log-probabilities of prompt tokens 1.. so far; `None` when not asked for or sent.
    pub prompt_logprobs: Option<Vec<SampledToken>>,
    /// Prompt tokens found in a cache at the first admission.
    pub cached_tokens: Option<usize>,
    /// When it came.
    pub submitted: Instant,
    /// Since when it waits, where it does.
    pub waiting_since: Instant,
    /// Since when its steps fail because experts do not answer.
    pub without_experts_since: Option<Instant>,
    /// It has waited so long that it goes before higher priorities, until it is preempted.
    pub promoted: bool,
    /// Open until the request ends.
    pub span: Span,
    /// When its first step was planned.
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    deltas: mpsc::Sender<Result<Delta>>,
    pending: Delta,
    place: Option<OwnedSemaphorePermit>,
    in_flight: Arc<()>,
    outcome: Arc<Outcome>,
}

impl Sequence {
    /// From a submission, with no block.
    pub fn new(submission: Submission) -> Self {
        let Submission { request, grammar, chain, deltas, place, in_flight, outcome, submitted, span } = submission;
        let seen = Seen::needed(&request.sampling).then(|| Seen::new(&request.prompt, request.resumed_tokens));
        // A migrated request's prompt log-probabilities went out with its first token.
        let prompt_logprobs = (request.prompt_logprobs && request.resumed_tokens == 0).then(Vec::new);
        Self {
            phase: Phase::Waiting,
            tokens: request.prompt.to_vec(),
            computed: 0,
            blocks: Vec::new(),
            chain,
            registered: 0,
            is_unfetched: true,
            fetched: Fetched::default(),
            grammar,
            seen,
            prompt_logprobs,
            cached_tokens: None,
            submitted,
            waiting_since: submitted,
            without_experts_since: None,
            promoted: false,
            span,
            started: None,
            first_token: None,
            last_token: None,
            deltas,
            pending: Delta::default(),
            place: Some(place),
            in_flight,
            outcome,
            request,
        }
    }

    /// Tokens generated here.
    pub fn generated(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Tokens that would end the sequence before `min_tokens`.
    pub fn held_back(&self, eos: &[TokenId]) -> Vec<TokenId> {
        match self.generated() < self.request.stop.min_tokens {
            true => eos.iter().chain(&self.request.stop.stop_token_ids).copied().collect(),
            false => Vec::new(),
        }
    }

    /// How the next token is chosen.
    pub fn sampling(&self) -> &SamplingParams {
        &self.request.sampling
    }

    /// Whether every position of the prompt must still be computed for its log-probabilities.
    pub fn wants_prompt_logprobs(&self) -> bool {
        self.prompt_logprobs.as_ref().is_some_and(|rows| rows.len() + 1 < self.request.prompt.len())
    }

    /// Names of the blocks that may come from a cache: never the last token's, whose logits are needed.
    pub fn reusable(&self) -> &[BlockHash] {
        if self.wants_prompt_logprobs() {
            return &[];
        }
        &self.chain[..self.chain.len().min((self.tokens.len() - 1) / BLOCK_TOKENS)]
    }

    /// Fetched blocks that follow `hits` local ones.
    pub fn usable_fetched(&self, hits: usize) -> &[Bytes] {
        let Fetched { first, blocks, .. } = &self.fetched;
        let Some(skip) = hits.checked_sub(*first) else { return &[] };
        let end = blocks.len().min(self.reusable().len().saturating_sub(*first));
        &blocks[skip.min(end)..end]
    }

    /// Leaves the queue; how long it was there, the first time.
    pub fn start(&mut self) -> Option<Duration> {
        self.phase = Phase::Running;
        let now = Instant::now();
        self.started.get_or_insert(now);
        self.place.take().map(|_| now - self.submitted)
    }

    /// Goes back to the queue.
    pub fn wait(&mut self) {
        self.phase = Phase::Waiting;
        self.waiting_since = Instant::now();
        self.promoted = false;
    }

    /// Another token; returns whether it is the first and the time since the last one or the request.
    pub fn push(&mut self, token: SampledToken) -> (bool, Duration) {
        let now = Instant::now();
        let first = self.last_token.is_none();
        let since = now - self.last_token.unwrap_or(self.submitted);
        self.last_token = Some(now);
        self.first_token.get_or_insert(now);
        self.tokens.push(token.id);
        if let Some(seen) = &mut self.seen {
            seen.push(token.id);
        }
        if self.prompt_logprobs.is_some() {
            self.pending.prompt_logprobs = self.prompt_logprobs.take();
        }
        if first {
            self.pending.cached_tokens = Some(self.cached());
        }
        self.pending.tokens.push(token);
        (first, since)
    }

    /// From its first step to its first token, once that came.
    pub fn prefill_time(&self) -> Option<Duration> {
        Some(self.first_token? - self.started?)
    }

    /// From its first token to its last so far.
    pub fn decode_time(&self) -> Option<Duration> {
        Some(self.last_token? - self.first_token?)
    }

    /// Tokens of the prompt, without those that another replica emitted.
    fn prompt_tokens(&self) -> usize {
        self.request.prompt.len() - self.request.resumed_tokens
    }

    /// Tokens of the prompt that came from the prefix cache.
    fn cached(&self) -> usize {
        self.cached_tokens.unwrap_or(0).min(self.prompt_tokens())
    }

    /// Whether the reader went away.
    pub fn is_abandoned(&self) -> bool {
        self.deltas.is_closed()
    }

    /// The reader went away.
    pub fn leave(self) {
        self.outcome.left();
    }

    /// Hands over what is there; a full channel leaves it for later.
    pub fn deliver(&mut self) {
        if self.pending.tokens.is_empty() {
            return;
        }
        if let Err(mpsc::error::TrySendError::Full(Ok(delta))) =
            self.deltas.try_send(Ok(std::mem::take(&mut self.pending)))
        {
            self.pending = delta;
        }
    }

    /// The last delta.
    pub fn finish(mut self, reason: FinishReason, runtime: &tokio::runtime::Handle) {
        self.outcome.answered(reason);
        let usage = Usage {
            prompt_tokens: self.prompt_tokens(),
            cached_tokens: self.cached(),
            completion_tokens: self.request.resumed_tokens + self.generated(),
        };
        genai::finish_reasons(&self.span, &[reason.name()]);
        self.span.record("gen_ai.usage.input_tokens", count(usage.prompt_tokens));
        self.span.record("gen_ai.usage.output_tokens", count(usage.completion_tokens));
        self.span.record("moesaic.cached_tokens", count(usage.cached_tokens));
        let mut delta = std::mem::take(&mut self.pending);
        // An empty answer: the grammar was complete before its first token.
        delta.prompt_logprobs = delta.prompt_logprobs.or(self.prompt_logprobs.take());
        delta.finish = Some((reason, usage));
        self.send_last(vec![Ok(delta)], runtime);
    }

    /// Tokens not handed over yet, then the error.
    pub fn fail(mut self, error: Error, runtime: &tokio::runtime::Handle) {
        self.outcome.failed(error.code);
        self.span.record("error.type", error.code.name());
        let delta = std::mem::take(&mut self.pending);
        let mut last = vec![Err(error)];
        if !delta.tokens.is_empty() {
            last.insert(0, Ok(delta));
        }
        self.send_last(last, runtime);
    }

    /// Sends in order; where the reader is slow, a task waits for it. It ends when the reader goes away.
    fn send_last(self, last: Vec<Result<Delta>>, runtime: &tokio::runtime::Handle) {
        let mut last = last.into_iter();
        while let Some(delta) = last.next() {
            if let Err(mpsc::error::TrySendError::Full(delta)) = self.deltas.try_send(delta) {
                let (deltas, in_flight) = (self.deltas.clone(), Arc::clone(&self.in_flight));
                runtime.spawn(async move {
                    for delta in std::iter::once(delta).chain(last) {
                        if deltas.send(delta).await.is_err() {
                            break;
                        }
                    }
                    drop(in_flight);
                });
                return;
            }
        }
    }
}
