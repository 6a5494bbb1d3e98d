//! What is served, and the start of every answer.
use super::budget::Budget;
use super::choice::Choice;
use super::job::{Job, Limits, Tenant};
use super::text::TokenPiece;
use super::workers::Workers;
use crate::actors::admission::{Admission, Permit};
use crate::config::Config;
use crate::served::ServedModel;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use moesaic_types::boundary::{Placer, Replica};
use moesaic_types::{Error, ErrorCode, FinishReason, ReplicaId, Result, SampledToken, TenantId, TenantSalt, Usage};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::timeout;

/// Finds a replica by its id.
pub type ReplicaLookup = Arc<dyn Fn(&ReplicaId) -> Option<Arc<dyn Replica>> + Send + Sync>;

/// Says whether the process can still recover by itself; an error, with a reason, when it must be restarted.
pub type Life = Arc<dyn Fn() -> Result<()> + Send + Sync>;

/// What both doors share.
pub struct Core {
    /// Settings.
    pub config: Config,
    /// The door's keeper.
    pub admission: Admission,
    pub(crate) workers: Workers,
    /// Memory for the bodies of requests, until they are read.
    pub(crate) bodies: Budget,
    /// What is served, or why nothing is yet.
    backend: watch::Sender<Result<Arc<Backend>>>,
    life: OnceLock<Life>,
    secret: RwLock<Vec<u8>>,
}

/// What is known once there is a replica.
pub(crate) struct Backend {
    /// Replicas that a request is tried on before one gives it a token.
    pub(super) attempts: usize,
    /// How long an answer that lost its replica waits for another.
    pub(super) patience: Duration,
    models: Vec<Arc<ServedModel>>,
    pub(super) placer: Arc<dyn Placer>,
    pub(super) replicas: ReplicaLookup,
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

impl Piece {
    /// About how many bytes it has when it is shown to a client.
    pub(crate) fn bytes_shown(&self) -> usize {
        const TOKEN: usize = 100;
        let shown = |token: &SampledToken| match token.logprob {
            Some(_) => TOKEN * (1 + token.top_logprobs.len()),
            None => 0,
        };
        let tokens: usize = self.tokens.iter().map(|piece| shown(&piece.token)).sum();
        let prompt: usize = self.prompt_logprobs.iter().flatten().map(shown).sum();
        self.text.len() + tokens + prompt
    }
}

/// An answer in pieces; dropping it cancels the request.
pub type PieceStream = BoxStream<'static, Result<Piece>>;

impl Core {
    /// A core without a model yet.
    pub fn new(config: Config) -> Self {
        let random = uuid::Uuid::new_v4();
        let secret = match config.salt_secret.expose() {
            "" => random.as_bytes().to_vec(),
            secret => secret.as_bytes().to_vec(),
        };
        let admission = Admission::start(config.max_in_flight);
        let threads = match config.text_threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let workers = Workers::new(threads);
        let bodies = Budget::new(config.body_memory.as_usize());
        let backend = watch::Sender::new(Err(Error::unavailable("the model is being loaded; try again soon")));
        Self { config, admission, workers, bodies, backend, life: OnceLock::new(), secret: RwLock::new(secret) }
    }

    /// Sets what is served; the gateway is ready from then on. A later call replaces it; requests that run go on with
    /// the model that they began with.
    pub fn serve(&self, models: Vec<Arc<ServedModel>>, placer: Arc<dyn Placer>, replicas: ReplicaLookup) {
        let (attempts, patience) = (self.config.attempts, self.config.migration_patience.get());
        let backend = Backend { attempts, patience, models, placer, replicas };
        self.backend.send_modify(|served| *served = Ok(Arc::new(backend)));
    }

    /// Says why nothing is served yet; without effect once something is.
    pub fn wait_for(&self, reason: &str) {
        self.backend.send_if_modified(|backend| {
            let waits = backend.is_err();
            if waits {
                *backend = Err(Error::unavailable(reason));
            }
            waits
        });
    }

    /// What tenants' salts are derived from.
    pub fn salt_secret(&self) -> Vec<u8> {
        self.secret.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sets what tenants' salts are derived from, where the configuration does not.
    pub fn set_salt_secret(&self, secret: Vec<u8>) {
        *self.secret.write().unwrap_or_else(PoisonError::into_inner) = secret;
    }

    /// Sets what liveness depends on besides this process answering at all. The first call counts.
    pub fn follow_life(&self, life: Life) {
        let _first_counts = self.life.set(life);
    }

    /// Whether the process can still recover by itself.
    ///
    /// # Errors
    /// With a reason, when it must be restarted.
    pub fn live(&self) -> Result<()> {
        self.life.get().map_or(Ok(()), |life| life())
    }

    /// Tells whenever what is served changes.
    pub(crate) fn watch(&self) -> watch::Receiver<Result<Arc<Backend>>> {
        self.backend.subscribe()
    }

    pub(super) fn backend(&self) -> Result<Arc<Backend>> {
        self.backend.borrow().clone()
    }

    /// Waits until something is served: a gateway that has just started has open doors before it has a model.
    ///
    /// # Errors
    /// `Unavailable`, with a reason, when nothing is after `gateway.loading_patience`.
    pub(crate) async fn loaded(&self) -> Result<()> {
        let mut backend = self.watch();
        match timeout(self.config.loading_patience.get(), backend.wait_for(Result::is_ok)).await {
            Ok(_) => Ok(()),
            Err(_) => self.backend().map(drop),
        }
    }

    /// The models that are served; none while they load.
    pub fn models(&self) -> Vec<Arc<ServedModel>> {
        self.backend().map_or_else(|_| Vec::new(), |backend| backend.models.clone())
    }

    /// A model by its name; an empty name means the only one.
    ///
    /// # Errors
    /// `NotFound` naming the models there are, `Unavailable` while they load.
    pub fn model(&self, name: &str) -> Result<Arc<ServedModel>> {
        let backend = self.backend()?;
        let models = &backend.models;
        if let ([only], "") = (models.as_slice(), name) {
            return Ok(only.clone());
        }
        models.iter().find(|m| m.id == name).cloned().ok_or_else(|| {
            let known: Vec<&str> = models.iter().map(|m| m.id.as_str()).collect();
            let message = format!("model '{name}' is not served here; use one of: {}", known.join(", "));
            Error { field: Some("model".into()), ..Error::new(ErrorCode::NotFound, message) }
        })
    }

    /// Whether a request would find a replica that answers. Looks without placing anything.
    ///
    /// # Errors
    /// `Unavailable`, with a reason.
    pub async fn ready(&self) -> Result<()> {
        let backend = self.backend()?;
        let mut reason = Error::unavailable("no replica is registered");
        for id in backend.placer.ready().await? {
            let Some(replica) = (backend.replicas)(&id) else { continue };
            match replica.load().await {
                Ok(_) => return Ok(()),
                Err(error) => reason = error,
            }
        }
        Err(reason)
    }

    /// The tenant of an API key.
    pub fn tenant(&self, key: Option<&str>) -> Tenant {
        let (secret, key) = (self.secret.read().unwrap_or_else(PoisonError::into_inner), key.unwrap_or_default());
        let salt = match self.config.share_prefixes {
            true => TenantSalt::default(),
            false => TenantSalt::derive(&secret, key),
        };
        Tenant { salt, id: TenantId::derive(&secret, key) }
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

    /// Lets a job in and starts it.
    ///
    /// # Errors
    /// What admission, the router or the scheduler say.
    pub async fn answer(self: &Arc<Self>, job: Job) -> Result<PieceStream> {
        let permit = Arc::new(self.admission.enter().await?);
        self.start(job, permit).await
    }

    /// Starts a job that was let in. Returns when all choices are accepted, so that a refusal comes before the first
    /// byte; the permit is held until the answer's end.
    ///
    /// # Errors
    /// What the router or the scheduler say.
    pub(crate) async fn start(&self, mut job: Job, permit: Arc<Permit>) -> Result<PieceStream> {
        job.deadline = job.time.map(|time| permit.since() + time);
        let (job, backend) = (Arc::new(job), self.backend()?);
        let mut choices = Vec::with_capacity(job.n);
        for index in 0..job.n {
            choices.push(Choice::start(backend.clone(), job.clone(), index, permit.clone()).await?.into_stream());
        }
        let told = job.told.clone();
        let pieces = stream::select_all(choices).inspect(move |piece| {
            if let Ok(Piece { finish: Some((reason, usage)), .. }) = piece {
                told.ended(*reason, usage);
            }
        });
        Ok(pieces.boxed())
    }
}
