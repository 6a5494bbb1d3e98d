//! Runs a job: places each choice, turns its tokens into text, and goes on elsewhere when a replica fails.
use super::input::{Job, Limits};
use super::text::{Assembler, TokenPiece};
use crate::actors::admission::{Admission, Permit};
use crate::config::Config;
use crate::served::ServedModel;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use moesaic_telemetry::metrics::MIGRATIONS_TOTAL;
use moesaic_types::boundary::{DeltaStream, PlaceRequest, Placer, Replica};
use moesaic_types::{
    Delta, Error, ErrorCode, FinishReason, GenerateRequest, ReplicaId, RequestId, Result, SampledToken, TenantSalt,
    TokenId, Usage,
};
use std::sync::{Arc, OnceLock};

/// Finds a replica by its id.
pub type ReplicaLookup = Arc<dyn Fn(&ReplicaId) -> Option<Arc<dyn Replica>> + Send + Sync>;

/// What both doors share.
pub struct Core {
    /// Settings.
    pub config: Config,
    /// The door's keeper.
    pub admission: Admission,
    backend: OnceLock<Backend>,
    served: tokio::sync::Notify,
    secret: Vec<u8>,
}

/// What is known once the model is loaded.
struct Backend {
    models: Vec<Arc<ServedModel>>,
    placer: Arc<dyn Placer>,
    replicas: ReplicaLookup,
}

/// A piece of one choice's answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Piece {
    /// Which choice.
    pub choice: usize,
    /// New text.
    pub text: String,
    /// The tokens of this piece.
    pub tokens: Vec<TokenPiece>,
    /// Log-probabilities of prompt tokens 1.., once, where asked for.
    pub prompt_logprobs: Option<Vec<SampledToken>>,
    /// On the choice's last piece.
    pub finish: Option<(FinishReason, Usage)>,
}

/// An answer in pieces; dropping it cancels the request.
pub type PieceStream = BoxStream<'static, Result<Piece>>;

impl Core {
    /// A core without a model yet.
    pub fn new(config: Config) -> Self {
        let random = uuid::Uuid::new_v4();
        let secret = match config.salt_secret.as_str() {
            "" => random.as_bytes().to_vec(),
            secret => secret.as_bytes().to_vec(),
        };
        let admission = Admission::start(config.max_in_flight);
        Self { config, admission, backend: OnceLock::new(), served: tokio::sync::Notify::new(), secret }
    }

    /// Sets what is served; the gateway is ready from then on. The first call counts.
    pub fn serve(&self, models: Vec<Arc<ServedModel>>, placer: Arc<dyn Placer>, replicas: ReplicaLookup) {
        let _first_counts = self.backend.set(Backend { models, placer, replicas });
        self.served.notify_one();
    }

    /// Waits until [`Self::serve`] was called (once; for the one task that follows readiness).
    pub(crate) async fn served(&self) {
        self.served.notified().await;
    }

    fn backend(&self) -> Result<&Backend> {
        self.backend.get().ok_or_else(|| Error::unavailable("the model is being loaded; try again soon"))
    }

    /// The models that are served; none while they load.
    pub fn models(&self) -> &[Arc<ServedModel>] {
        self.backend.get().map_or(&[], |b| b.models.as_slice())
    }

    /// A model by its name; an empty name means the only one.
    ///
    /// # Errors
    /// `NotFound` naming the models there are, `Unavailable` while they load.
    pub fn model(&self, name: &str) -> Result<Arc<ServedModel>> {
        let models = &self.backend()?.models;
        if let ([only], "") = (models.as_slice(), name) {
            return Ok(only.clone());
        }
        models.iter().find(|m| m.id == name).cloned().ok_or_else(|| {
            let known: Vec<&str> = models.iter().map(|m| m.id.as_str()).collect();
            let message = format!("model '{name}' is not served here; use one of: {}", known.join(", "));
            Error { field: Some("model".into()), ..Error::new(ErrorCode::NotFound, message) }
        })
    }

    /// Whether a request would find a replica that answers.
    pub async fn ready(&self) -> Result<()> {
        let backend = self.backend()?;
        let probe = PlaceRequest {
            id: RequestId::new("ready"),
            blocks: Vec::new(),
            prompt_tokens: 1,
            max_tokens: 1,
            exclude: Vec::new(),
        };
        let placed = backend.placer.place(probe).await?;
        let replica = (backend.replicas)(&placed.replica);
        let replica = replica.ok_or_else(|| Error::unavailable("the placed replica is gone"))?;
        replica.load().await.map(|_| ())
    }

    /// The salt of an API key's tenant.
    pub fn salt(&self, key: Option<&str>) -> TenantSalt {
        match self.config.share_prefixes {
            true => TenantSalt::default(),
            false => TenantSalt::derive(&self.secret, key.unwrap_or_default()),
        }
    }

    /// The operator's limits.
    pub fn limits(&self) -> Limits {
        let deadline = self.config.default_deadline.get();
        Limits {
            max_n: self.config.max_n,
            max_stop: self.config.max_stop,
            default_deadline: (!deadline.is_zero()).then_some(deadline),
        }
    }

    /// Starts a job. Returns when all choices are accepted, so that a refusal comes before the first byte.
    ///
    /// # Errors
    /// What admission, the router or the scheduler say.
    pub async fn answer(self: &Arc<Self>, job: Job) -> Result<PieceStream> {
        let permit = Arc::new(self.admission.enter().await?);
        let job = Arc::new(job);
        let mut choices = Vec::with_capacity(job.n);
        for index in 0..job.n {
            choices.push(Choice::start(self.clone(), job.clone(), index, permit.clone()).await?.into_stream());
        }
        Ok(stream::select_all(choices).boxed())
    }
}

/// One choice under way.
struct Choice {
    core: Arc<Core>,
    job: Arc<Job>,
    index: usize,
    deltas: DeltaStream,
    replica: ReplicaId,
    failed: Vec<ReplicaId>,
    emitted: Vec<TokenId>,
    text: Assembler,
    done: bool,
    _permit: Arc<Permit>,
}

impl Choice {
    async fn start(core: Arc<Core>, job: Arc<Job>, index: usize, permit: Arc<Permit>) -> Result<Self> {
        let tokenizer = job.model.tokenizer.clone();
        let text = Assembler::new(tokenizer, job.skip_special, job.continues, job.stop_texts.clone());
        let mut failed = Vec::new();
        loop {
            match send(&core, &job, index, &[], &failed).await {
                Ok((replica, deltas)) => {
                    let emitted = Vec::new();
                    let _permit = permit;
                    return Ok(Self { core, job, index, deltas, replica, failed, emitted, text, done: false, _permit });
                }
                Err((Some(replica), error)) if may_go_on(&error) && failed.len() + 1 < core.config.attempts => {
                    tracing::warn!(%replica, %error, "replica refused a request; trying another");
                    failed.push(replica);
                }
                Err((_, error)) => return Err(error),
            }
        }
    }

    fn into_stream(self) -> PieceStream {
        stream::unfold(self, |mut choice| async move { choice.next().await.map(|piece| (piece, choice)) }).boxed()
    }

    async fn next(&mut self) -> Option<Result<Piece>> {
        while !self.done {
            let event = self.deltas.next().await;
            let event = event.unwrap_or_else(|| Err(Error::unavailable("the replica's stream ended early")));
            match event {
                Ok(delta) => {
                    let piece = self.take(delta);
                    if piece.finish.is_some() || !piece.tokens.is_empty() || piece.prompt_logprobs.is_some() {
                        return Some(Ok(piece));
                    }
                }
                Err(error) if may_go_on(&error) => {
                    if let Err(error) = self.migrate(error).await {
                        self.done = true;
                        return Some(Err(error));
                    }
                }
                Err(error) => {
                    self.done = true;
                    return Some(Err(error));
                }
            }
        }
        None
    }

    /// Asks another replica to go on with the prompt and the tokens so far.
    async fn migrate(&mut self, mut error: Error) -> Result<()> {
        self.failed.push(self.replica.clone());
        while self.failed.len() < self.core.config.attempts {
            tracing::warn!(id = %self.job.id, from = %self.replica, %error, "replica failed; going on elsewhere");
            match send(&self.core, &self.job, self.index, &self.emitted, &self.failed).await {
                Ok((replica, deltas)) => {
                    metrics::counter!(MIGRATIONS_TOTAL).increment(1);
                    (self.replica, self.deltas) = (replica, deltas);
                    return Ok(());
                }
                Err((Some(replica), next)) if may_go_on(&next) => {
                    self.failed.push(replica);
                    error = next;
                }
                // no other replica: the first failure says more than that
                Err(_) => return Err(error),
            }
        }
        Err(error)
    }

    fn take(&mut self, delta: Delta) -> Piece {
        let mut piece = Piece { choice: self.index, prompt_logprobs: delta.prompt_logprobs, ..Piece::default() };
        let count = delta.tokens.len();
        for (i, token) in delta.tokens.into_iter().enumerate() {
            self.emitted.push(token.id);
            let last = i + 1 == count;
            let stopped = matches!(delta.finish, Some((FinishReason::Stop, _)));
            if last && stopped && self.ends_sequence(token.id) {
                continue;
            }
            let (text, stop_text) = self.text.push(token.id);
            piece.text += &text;
            piece.tokens.push(self.text.piece(token));
            if stop_text {
                let usage = self.usage(delta.finish.map(|(_, usage)| usage));
                piece.finish = Some((FinishReason::Stop, usage));
                self.done = true;
                // dropping the stream cancels the sequence
                self.deltas = stream::empty().boxed();
                return piece;
            }
        }
        if let Some((reason, usage)) = delta.finish {
            piece.text += &self.text.finish();
            piece.finish = Some((reason, self.usage(Some(usage))));
            self.done = true;
        }
        piece
    }

    fn ends_sequence(&self, token: TokenId) -> bool {
        let stop = &self.job.stop;
        stop.stop_token_ids.contains(&token) || (!stop.ignore_eos && self.job.model.eos.contains(&token))
    }

    /// The whole request's usage, whatever number of replicas had a part in it.
    fn usage(&self, last: Option<Usage>) -> Usage {
        Usage {
            prompt_tokens: self.job.prompt.len(),
            cached_tokens: last.map_or(0, |usage| usage.cached_tokens.min(self.job.prompt.len())),
            completion_tokens: self.emitted.len(),
        }
    }
}

fn may_go_on(error: &Error) -> bool {
    error.code == ErrorCode::Unavailable
}

/// Places and sends a choice; an error comes with the replica that gave it, if it was one.
async fn send(
    core: &Core,
    job: &Job,
    index: usize,
    emitted: &[TokenId],
    failed: &[ReplicaId],
) -> Result<(ReplicaId, DeltaStream), (Option<ReplicaId>, Error)> {
    let backend = core.backend().map_err(|error| (None, error))?;
    let prompt: Arc<[TokenId]> = match emitted {
        [] => job.prompt.clone(),
        _ => job.prompt.iter().chain(emitted).copied().collect(),
    };
    let id = match job.n {
        1 => job.id.clone(),
        _ => RequestId::new(format!("{}-{index}", job.id)),
    };
    let left = job.stop.max_tokens - emitted.len().min(job.stop.max_tokens);
    let place = PlaceRequest {
        id: id.clone(),
        blocks: job.model.hasher.chain(&job.salt, &prompt),
        prompt_tokens: prompt.len(),
        max_tokens: left,
        exclude: failed.to_vec(),
    };
    let placed = backend.placer.place(place).await.map_err(|error| (None, error))?.replica;
    let replica = (backend.replicas)(&placed);
    let replica = replica.ok_or_else(|| (Some(placed.clone()), Error::unavailable("the placed replica is gone")))?;
    let mut sampling = job.sampling.clone();
    sampling.seed = sampling.seed.wrapping_add(index as u64);
    let mut stop = job.stop.clone();
    stop.max_tokens = left;
    stop.min_tokens = stop.min_tokens.saturating_sub(emitted.len());
    let request = GenerateRequest {
        id,
        prompt,
        resumed_tokens: emitted.len(),
        sampling,
        stop,
        top_logprobs: job.top_logprobs,
        prompt_logprobs: job.prompt_logprobs && emitted.is_empty(),
        grammar: job.grammar.clone(),
        priority: job.priority,
        deadline: job.deadline,
        salt: job.salt,
        traceparent: moesaic_telemetry::propagation::current_traceparent(),
    };
    match replica.generate(request).await {
        Ok(deltas) => Ok((placed, deltas)),
        Err(error) => Err((Some(placed), error)),
    }
}
