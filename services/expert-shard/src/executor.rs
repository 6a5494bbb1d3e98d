//! The thread that computes what schedulers send: what waits for the same layer goes through it together, and what nobody
//! waits for any longer does not.
use crate::app::ExpertShard;
use crate::shelf::Held;
use futures::Stream;
use metrics::histogram;
use moesaic_model::backend::Backend;
use moesaic_telemetry::metrics as names;
use moesaic_transport::pulse::{DEAD_AFTER, Inbox, Outbox, STALLED_AFTER, queue};
use moesaic_types::{Error, Result, Routing};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tracing::Span;

/// Tokens that are computed at a time: many enough that weights are read once for many, few enough that the thread's
/// pulse is felt between them on any backend.
const PIECE: usize = 1024;

/// Tokens of one layer for this shard's experts.
pub struct Job<B: Backend> {
    /// What they are computed with.
    pub held: Held<B>,
    /// The decoder's index of the layer.
    pub layer: usize,
    /// `[tokens, hidden]`.
    pub x: Vec<f32>,
    /// Which experts each token goes to.
    pub routing: Routing,
    /// They were counted as load before.
    pub is_again: bool,
    /// Gone with who waits for the outcome: then there is none.
    pub caller: Weak<()>,
    /// Open from now until the reply.
    pub span: Span,
    /// When it came.
    pub submitted: Instant,
    /// Takes the outcome.
    pub reply: Reply,
}

/// Takes a job's outcome, on the executor's thread.
pub type Reply = Box<dyn FnOnce(Outcome) + Send>;

/// How a job ended.
#[derive(Debug)]
pub struct Outcome {
    /// `[tokens, hidden]`: for each token the weighted sum over this shard's experts.
    pub output: Result<Vec<f32>>,
    /// Time before its computation.
    pub queued: Duration,
    /// Time of the computation that it was part of.
    pub computed: Duration,
}

impl<B: Backend> Job<B> {
    /// Whether two can be computed together.
    fn is_like(&self, other: &Self) -> bool {
        self.layer == other.layer && Arc::ptr_eq(&self.held.experts, &other.held.experts)
    }
}

/// The way to the thread; it ends when all of them are gone.
pub struct Executor<B: Backend> {
    jobs: Outbox<Job<B>>,
}

impl<B: Backend> Clone for Executor<B> {
    fn clone(&self) -> Self {
        Self { jobs: self.jobs.clone() }
    }
}

impl<B: Backend> Executor<B> {
    /// Starts the thread. `queue` jobs wait at most; a computation has `max_batch_tokens` tokens at most, unless one
    /// job alone has more.
    ///
    /// # Errors
    /// `Unavailable` when the system gives no thread.
    pub fn start(shard: Arc<ExpertShard<B>>, queue: usize, max_batch_tokens: usize) -> Result<Self> {
        let (sender, jobs) = self::queue(queue);
        let backend = Arc::clone(shard.shelf().current().experts.backend());
        jobs.count_too(Box::new(move || backend.advanced()));
        let work = Work { shard, jobs, waiting: VecDeque::new(), look_ahead: queue, max_batch_tokens };
        let thread = std::thread::Builder::new().name("experts".into()).spawn(move || work.serve());
        thread.map_err(|error| Error::unavailable(format!("start the experts' thread: {error}")))?;
        Ok(Self { jobs: sender })
    }

    /// Whether the thread is there.
    ///
    /// # Errors
    /// `Unavailable` when it is gone, or hangs for good.
    pub fn live(&self) -> Result<()> {
        if self.jobs.is_closed() { Err(gone()) } else { self.jobs.check(DEAD_AFTER) }
    }

    /// Whether it gets on.
    ///
    /// # Errors
    /// `Unavailable` when it is gone or hangs.
    pub fn ready(&self) -> Result<()> {
        if self.jobs.is_closed() { Err(gone()) } else { self.jobs.check(STALLED_AFTER) }
    }

    /// Waits until the thread is gone. Cancel-safe.
    pub async fn ended(&self) {
        self.jobs.closed().await;
    }

    /// Hands a job over; waits while the queue is full.
    ///
    /// # Errors
    /// `Unavailable` when the thread is gone.
    pub async fn submit(&self, job: Job<B>) -> Result<()> {
        self.jobs.send(job).await.map_err(|_| gone())
    }

    /// A stream of answers with the thread's pulses between them.
    pub fn with_pulses<A: Send + 'static>(
        &self,
        answers: impl Stream<Item = A> + Send + 'static,
        pulse: impl Fn() -> A + Send + 'static,
    ) -> impl Stream<Item = A> + Send + 'static {
        self.jobs.with_pulses(answers, pulse)
    }
}

fn gone() -> Error {
    Error::unavailable("the experts' thread has ended; restart this shard")
}

/// The thread's state.
struct Work<B: Backend> {
    shard: Arc<ExpertShard<B>>,
    jobs: Inbox<Job<B>>,
    /// Taken from the queue; as many as that holds at most.
    waiting: VecDeque<Job<B>>,
    look_ahead: usize,
    max_batch_tokens: usize,
}

impl<B: Backend> Work<B> {
    fn serve(mut self) {
        loop {
            while self.waiting.len() < self.look_ahead
                && let Some(job) = self.jobs.try_take()
            {
                self.waiting.push_back(job);
            }
            match self.waiting.pop_front().or_else(|| self.jobs.take()) {
                Some(job) if job.caller.strong_count() == 0 => {}
                Some(first) => {
                    let batch = self.batch(first);
                    self.compute(batch);
                    self.jobs.beat();
                }
                None => return,
            }
        }
    }

    /// The job and those that can be computed with it, in the order in which they came.
    fn batch(&mut self, first: Job<B>) -> Vec<Job<B>> {
        let mut tokens = first.routing.tokens();
        let mut batch = vec![first];
        let mut rest = VecDeque::with_capacity(self.waiting.len());
        for job in self.waiting.drain(..).filter(|job| job.caller.strong_count() > 0) {
            if batch[0].is_like(&job) && tokens + job.routing.tokens() <= self.max_batch_tokens {
                tokens += job.routing.tokens();
                batch.push(job);
            } else {
                rest.push_back(job);
            }
        }
        self.waiting = rest;
        batch
    }

    fn compute(&self, batch: Vec<Job<B>>) {
        let begun = Instant::now();
        let counted = batch.iter().filter(|job| !job.is_again);
        counted.for_each(|job| self.shard.count(job.layer, &job.routing));
        let (mut jobs, waiting): (Vec<_>, Vec<_>) = batch.into_iter().map(split).unzip();
        let outputs = match self.run_together(&jobs) {
            Some(outputs) => outputs.into_iter().map(Ok).collect(),
            // one of several must not fail the others
            None => jobs.iter_mut().map(|job| self.run_alone(job)).collect(),
        };
        reply_all(waiting, outputs, begun);
    }

    fn run_alone(&self, job: &mut Input<B>) -> Result<Vec<f32>> {
        self.run(&job.held, job.layer, std::mem::take(&mut job.x), &job.routing)
    }

    /// The outputs of several jobs from one computation; `None` where that fails.
    fn run_together(&self, jobs: &[Input<B>]) -> Option<Vec<Vec<f32>>> {
        if jobs.len() < 2 {
            return None;
        }
        let (layer, count) = (jobs[0].layer, jobs.len());
        let failed = |error: &Error| tracing::warn!(layer, jobs = count, %error, "compute jobs one by one");
        self.run_all(jobs).inspect_err(failed).ok()
    }

    fn run_all(&self, jobs: &[Input<B>]) -> Result<Vec<Vec<f32>>> {
        let (mut x, mut routing) = (Vec::with_capacity(jobs.iter().map(|job| job.x.len()).sum()), Routing::new());
        for job in jobs {
            x.extend_from_slice(&job.x);
            (0..job.routing.tokens()).for_each(|token| routing.push(job.routing.token(token)));
        }
        let mut output = self.run(&jobs[0].held, jobs[0].layer, x, &routing)?;
        let mut outputs: Vec<_> = jobs.iter().rev().map(|job| output.split_off(output.len() - job.x.len())).collect();
        outputs.reverse();
        Ok(outputs)
    }

    fn run(&self, held: &Held<B>, layer: usize, x: Vec<f32>, routing: &Routing) -> Result<Vec<f32>> {
        let (backend, hidden) = (held.experts.backend(), self.shard.hidden());
        histogram!(names::EXPERT_BATCH_TOKENS).record(routing.tokens() as f64);
        let run = |x: Vec<f32>, routing: &Routing| {
            let x = backend.to_device(x, hidden)?;
            backend.to_host(&self.shard.compute(held, layer, &x, routing)?)
        };
        // a token's sum is the same in every batch
        let pieces = |x: Vec<f32>| {
            if routing.tokens() <= PIECE {
                return run(x, routing);
            }
            let mut output = Vec::with_capacity(x.len());
            for (piece, x) in x.chunks(PIECE * hidden).enumerate() {
                let (mut of_piece, first) = (Routing::new(), piece * PIECE);
                (first..first + x.len() / hidden).for_each(|token| of_piece.push(routing.token(token)));
                output.extend(run(x.to_vec(), &of_piece)?);
                self.jobs.beat();
            }
            Ok(output)
        };
        let output = catch_unwind(AssertUnwindSafe(|| pieces(x)));
        let output = output.map_err(|_| Error::internal(format!("the experts of layer {layer} panicked")))?;
        output.map_err(|error| Error::unavailable(error.to_string()))
    }
}

/// What of a job is computed.
struct Input<B: Backend> {
    held: Held<B>,
    layer: usize,
    x: Vec<f32>,
    routing: Routing,
}

/// Who waits for a job, since when, in which span.
type Waiting = (Reply, Instant, Span);

fn split<B: Backend>(job: Job<B>) -> (Input<B>, Waiting) {
    let Job { held, layer, x, routing, span, submitted, reply, .. } = job;
    (Input { held, layer, x, routing }, (reply, submitted, span))
}

fn reply_all(waiting: Vec<Waiting>, outputs: Vec<Result<Vec<f32>>>, begun: Instant) {
    let computed = begun.elapsed();
    for ((reply, submitted, span), output) in waiting.into_iter().zip(outputs) {
        let _entered = span.entered();
        reply(Outcome { output, queued: begun.saturating_duration_since(submitted), computed });
    }
}
