//! Puts a replica together: the engine under its control, the door for requests, the publisher of KV events.
use crate::actors::engine_control::{EngineControl, Slot, Status};
use crate::admission;
use crate::answer::{Answer, engine_restarted, overdue};
use crate::config::Config;
use crate::engine::{Command, Info, Parts, RunnerFactory, Snapshot, Submission};
use crate::grammar::Compiler;
use crate::health::{Health, Pulse};
use crate::metrics::Ends;
use crate::outcome::Outcomes;
use crate::telling;
use crate::vocabulary::Vocabulary;
use crate::watchdog;
use futures::future::BoxFuture;
use moesaic_actors::{Handle, Supervised};
use moesaic_telemetry::{count, propagation};
use moesaic_types::boundary::{DeltaStream, EventBus, PrefixStore, Replica, ReplicaLoad};
use moesaic_types::{BlockHasher, Error, ErrorCode, GenerateRequest, RequestId, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::TrySendError;
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use tracing::Span;

/// Batches of KV events that wait for the bus.
const EVENT_BATCHES: usize = 64;
/// When a refused request may try again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// One replica.
pub struct Scheduler {
    parts: Arc<Parts>,
    slot: Arc<Slot>,
    status: watch::Receiver<Status>,
    health: watch::Receiver<Health>,
    watchdog: JoinHandle<()>,
    compiler: Arc<Compiler>,
    places: Arc<Semaphore>,
    in_flight: Arc<()>,
    ends: Arc<Ends>,
    /// For canaries.
    uncounted: Arc<Ends>,
    outcomes: Arc<Outcomes>,
    draining: AtomicBool,
    control: Handle<EngineControl>,
}

impl Scheduler {
    /// Loads the model through `runner_factory` and starts the engine; returns when it takes requests. Waits while a part
    /// of the model in another process is away.
    ///
    /// `runner_factory` is called again whenever the engine crashed. Must be called on a tokio runtime, which must
    /// outlive the scheduler.
    pub async fn start(
        config: Config,
        runner_factory: RunnerFactory,
        vocabulary: Vocabulary,
        hasher: BlockHasher,
        prefix_store: Option<Arc<dyn PrefixStore>>,
        events: Option<Arc<dyn EventBus>>,
    ) -> Result<Arc<Self>> {
        config.validate()?;
        let eos = vocabulary.eos.clone();
        let limits = config.clone();
        let compiler = tokio::task::spawn_blocking(move || Compiler::new(&vocabulary, &limits))
            .await
            .map_err(|error| Error::internal(format!("prepare the vocabulary for grammars: {error}")))??;
        let (slot, mut told) = (Arc::new(Slot::default()), None);
        let events = events.map(|bus| {
            let (sender, batches) = mpsc::channel(EVENT_BATCHES);
            tokio::spawn(telling::blocks(Arc::clone(&bus), config.clone(), batches, Arc::clone(&slot)));
            told = Some(bus);
            sender
        });
        let places = Arc::new(Semaphore::new(config.max_waiting));
        // Blocks of the store are found by the names that the prefix cache uses.
        let store = prefix_store.filter(|_| config.prefix_cache);
        let parts = Arc::new(Parts {
            config,
            runner_factory,
            hasher,
            store,
            events,
            eos,
            runtime: tokio::runtime::Handle::current(),
            snapshot: watch::Sender::new(Snapshot::default()),
            pulse: Pulse::default(),
        });
        let mut status = slot.status();
        let (for_parts, for_slot) = (Arc::clone(&parts), Arc::clone(&slot));
        let control = Supervised::spawn("engine-control", 64, move || {
            EngineControl::new(Arc::clone(&for_parts), Arc::clone(&for_slot))
        });
        let first = status.wait_for(|status| matches!(status, Status::Ready(_) | Status::Failed(_))).await;
        let first = first.map(|status| status.clone()).unwrap_or(Status::Starting);
        if let Status::Failed(error) = first {
            control.stop();
            return Err(error);
        }
        let ends = Arc::new(Ends::new(&parts.config.model_name, &parts.config.replica));
        let (health_sender, health) = watch::channel(Health::Working);
        let watchdog = tokio::spawn(watchdog::watch(Arc::clone(&parts), health_sender));
        let uncounted = Arc::new(Ends::uncounted());
        let this = Arc::new(Self {
            parts,
            slot,
            status,
            health,
            watchdog,
            compiler: Arc::new(compiler),
            places,
            in_flight: Arc::new(()),
            ends,
            uncounted,
            outcomes: Arc::default(),
            draining: AtomicBool::new(false),
            control,
        });
        if let Some(bus) = told {
            tokio::spawn(telling::load(bus, this.parts.config.replica.clone(), Arc::downgrade(&this)));
        }
        Ok(this)
    }

    /// The state as of the engine's last step.
    pub fn snapshot(&self) -> Snapshot {
        self.parts.snapshot.borrow().clone()
    }

    /// Follows the state.
    pub fn watch(&self) -> watch::Receiver<Snapshot> {
        self.parts.snapshot.subscribe()
    }

    /// What the model and the pool allow; an error while no engine runs.
    pub fn info(&self) -> Result<Info> {
        match &*self.status.borrow() {
            Status::Ready(info) => Ok(*info),
            Status::Starting => Err(Error::unavailable("the engine is starting")),
            Status::Waiting(error) | Status::Failed(error) => Err(error.clone()),
        }
    }

    /// Whether a request would be served now: an engine runs and its steps end. `Unavailable`, with a reason, if not.
    pub fn ready(&self) -> Result<()> {
        if self.draining.load(Ordering::Acquire) {
            return Err(Error::unavailable("the scheduler is shutting down; send the request again"));
        }
        self.info()?;
        self.health().check()
    }

    /// Whether the process can still recover by itself; an error, with a reason, when it must be restarted.
    pub fn live(&self) -> Result<()> {
        match self.health() {
            dead @ Health::Dead(_) => dead.check(),
            Health::Working | Health::Stalled(_) | Health::Hanging(_) | Health::WithoutExperts(_) => Ok(()),
        }
    }

    /// How the present step does, looked at now.
    pub fn health(&self) -> Health {
        self.parts.health()
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.parts.config
    }

    /// Requests accepted and not answered yet.
    pub fn in_flight(&self) -> usize {
        Arc::strong_count(&self.in_flight) - 1
    }

    /// Refuses new requests and waits for those in flight; whether all were answered by the deadline.
    pub async fn drain(&self, deadline: Instant) -> bool {
        self.draining.store(true, Ordering::Release);
        let mut snapshot = self.parts.snapshot.subscribe();
        let until = tokio::time::Instant::from_std(deadline);
        // Answers that a slow reader has not taken leave after the engine's last change.
        let mut tick = tokio::time::interval(Duration::from_millis(50));
        while self.in_flight() > 0 {
            tokio::select! {
                changed = snapshot.changed() => if changed.is_err() { return false },
                _ = tick.tick() => {}
                () = tokio::time::sleep_until(until) => return self.in_flight() == 0,
            }
        }
        true
    }

    /// Stops the engine; requests in flight fail with `Unavailable`.
    pub fn stop(&self) {
        self.draining.store(true, Ordering::Release);
        self.control.stop();
    }

    /// Makes the engine's thread panic at its next command.
    #[cfg(any(test, feature = "fault-injection"))]
    pub fn panic_engine(&self) {
        if let Some(sender) = self.slot.sender() {
            let _ = sender.try_send(Command::Panic);
        }
    }

    /// Makes the actor that owns the engine panic.
    #[cfg(any(test, feature = "fault-injection"))]
    pub async fn panic_control(&self) {
        let _ = self.control.ask(crate::actors::engine_control::Fail, RETRY_AFTER).await;
    }

    /// How often the actor that owns the engine was built again.
    pub fn control_restarts(&self) -> u64 {
        self.control.restarts()
    }

    /// The request's span, a child of the trace that the request belongs to. Which operation it is, the gateway's root says:
    /// here tokens come and go.
    fn span(&self, request: &GenerateRequest) -> Span {
        let span = tracing::info_span!(
            "generate",
            gen_ai.provider.name = "moesaic",
            gen_ai.request.model = self.parts.config.model_name,
            gen_ai.response.model = self.parts.config.model_name,
            gen_ai.request.max_tokens = count(request.stop.max_tokens),
            gen_ai.request.temperature = request.sampling.temperature as f64,
            gen_ai.request.top_p = request.sampling.top_p as f64,
            gen_ai.usage.input_tokens = tracing::field::Empty,
            gen_ai.usage.output_tokens = tracing::field::Empty,
            "error.type" = tracing::field::Empty,
            moesaic.request = %request.id,
            moesaic.replica = self.parts.config.replica,
            moesaic.cached_tokens = tracing::field::Empty,
            moesaic.canary = request.is_canary().then_some(true),
        );
        if let Some(traceparent) = &request.traceparent {
            propagation::set_parent(&span, propagation::from_traceparent(traceparent));
        }
        span
    }

    fn ends(&self, request: &GenerateRequest) -> &Arc<Ends> {
        if request.is_canary() { &self.uncounted } else { &self.ends }
    }

    async fn submit(&self, request: GenerateRequest) -> Result<DeltaStream> {
        let submitted = Instant::now();
        self.ready()?;
        let in_flight = Arc::clone(&self.in_flight);
        admission::validate(&request, &self.info()?)?;
        if request.deadline.is_some_and(|deadline| deadline <= submitted) {
            return Err(Error::new(ErrorCode::DeadlineExceeded, "the deadline passed before the request was queued"));
        }
        let max_waiting = self.parts.config.max_waiting;
        let full = || Error::exhausted(format!("the queue is full: {max_waiting} requests wait already"), RETRY_AFTER);
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| full())?;
        let grammar = match request.grammar.clone() {
            None => None,
            Some(grammar) => {
                let resumed = request.prompt[request.prompt.len() - request.resumed_tokens..].to_vec();
                let compiling = self.compiler.compile_aside(grammar, resumed);
                Some(match request.deadline {
                    Some(deadline) => {
                        tokio::time::timeout_at(deadline.into(), compiling).await.map_err(|_| overdue(0))??
                    }
                    None => compiling.await?,
                })
            }
        };
        let chain = match self.parts.config.prefix_cache {
            true => self.parts.hasher.chain(&request.salt, &request.prompt),
            false => Vec::new(),
        };
        let span = self.span(&request);
        let (sender, deltas) = mpsc::channel(self.parts.config.delivery_capacity);
        let entered = self.outcomes.enter(&request.id, self.ends(&request), submitted);
        let outcome = Arc::clone(&entered.outcome);
        let (health, parts) = (self.health.clone(), Arc::clone(&self.parts));
        let answer = Answer { deltas, deadline: request.deadline, health, parts, entered };
        let submission =
            Submission { request, grammar, chain, deltas: sender, place, in_flight, outcome, submitted, span };
        let sender = self.slot.sender().ok_or_else(|| Error::unavailable("the engine is starting"))?;
        sender.try_send(Command::Submit(Box::new(submission))).map_err(|error| match error {
            TrySendError::Full(_) => full(),
            TrySendError::Disconnected(_) => engine_restarted(),
        })?;
        Ok(answer.into_stream())
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.watchdog.abort();
        self.control.stop();
    }
}

impl Replica for Scheduler {
    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<DeltaStream>> {
        Box::pin(async move {
            let ends = Arc::clone(self.ends(&request));
            self.submit(request).await.inspect_err(|error| ends.failed(error.code))
        })
    }

    fn enough(&self, id: &RequestId) {
        self.outcomes.enough(id);
    }

    fn load(&self) -> BoxFuture<'_, Result<ReplicaLoad>> {
        Box::pin(async move {
            self.ready()?;
            let snapshot = self.snapshot();
            // those that the engine has not seen yet, in the middle of a step, wait as well
            let submitted = self.parts.config.max_waiting.saturating_sub(self.places.available_permits());
            Ok(ReplicaLoad {
                running: snapshot.running,
                waiting: snapshot.waiting.max(submitted),
                kv_blocks_total: snapshot.kv_blocks_total,
                kv_blocks_used: snapshot.kv_blocks_used,
                max_context: snapshot.max_context,
                max_running: self.parts.config.max_running,
            })
        })
    }
}
