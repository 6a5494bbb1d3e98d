//! Sends the requests: at times of their own, or by clients that each wait for their answer.
use super::target::Target;
use super::workload::{Wanted, Workload};
use crate::client::{Answer, Connection, Failure};
use anyhow::Result;
use bytes::Bytes;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// What decides when a request is sent.
pub enum Pacing {
    /// Each at its time from the start, whatever became of the others.
    Open {
        /// The times, in order.
        times: Box<dyn Iterator<Item = Duration> + Send>,
        /// More than so many are not in flight at once: one that comes then waits, which counts as time of its answer.
        most_at_once: usize,
    },
    /// So many clients, each of which sends the next request when it has its answer.
    Closed {
        /// How many.
        clients: usize,
        /// What a client waits before it sends the next.
        think: Duration,
    },
}

/// Where a run ends: no request is sent after either.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Limits {
    /// Requests in all.
    pub requests: Option<usize>,
    /// Time from the start; what runs then is waited for.
    pub duration: Option<Duration>,
}

/// A request and what became of it. Times are from the run's start.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Its number.
    pub index: usize,
    /// When it should have been sent; in a closed loop, when its client was free for it.
    pub scheduled: Duration,
    /// When it was begun to be sent.
    pub sent: Duration,
    /// When its answer ended, or it failed.
    pub ended: Duration,
    /// Tokens of the prompt that was made.
    pub prompt_tokens: usize,
    /// Tokens of the answer that was asked for.
    pub answer_tokens: usize,
    /// What came.
    pub outcome: Result<Answer, Failure>,
}

/// A whole run.
pub struct Run {
    /// When it began.
    pub begun: Instant,
    /// Its requests, in the order of their numbers.
    pub samples: Vec<Sample>,
}

/// Is told of each sample as it ends: requests that are done, and that failed.
pub type Progress = dyn Fn(usize, usize) + Send + Sync;

struct Shared {
    target: Target,
    path: String,
    begun: Instant,
    /// Connections that nothing runs on.
    idle: Mutex<Vec<Connection>>,
    done: AtomicUsize,
    failed: AtomicUsize,
    progress: Box<Progress>,
}

impl Shared {
    fn idle(&self) -> Option<Connection> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    fn put(&self, connection: Connection) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
    }

    async fn ask(&self, body: Bytes) -> Result<Answer, Failure> {
        let mut connection = match self.idle() {
            Some(connection) => connection,
            None => Connection::open_within(self.target.origin.clone(), self.target.patience).await?,
        };
        let outcome = connection.ask(&self.path, body, self.target.patience).await;
        self.put(connection);
        outcome
    }

    async fn sample(&self, index: usize, scheduled: Duration, wanted: &Wanted, body: Bytes) -> Sample {
        let sent = self.begun.elapsed();
        let outcome = self.ask(body).await;
        let (ended, failed) = match &outcome {
            Ok(answer) => (answer.ended.saturating_duration_since(self.begun), self.failed.load(Ordering::Relaxed)),
            Err(_) => (self.begun.elapsed(), self.failed.fetch_add(1, Ordering::Relaxed) + 1),
        };
        (self.progress)(self.done.fetch_add(1, Ordering::Relaxed) + 1, failed);
        let (prompt_tokens, answer_tokens) = (wanted.tokens.len(), wanted.answer_tokens);
        Sample { index, scheduled, sent, ended, prompt_tokens, answer_tokens, outcome }
    }
}

/// Sends all requests and waits for their answers.
///
/// # Errors
/// When a request cannot be written down; what the server does with it is in its sample.
pub async fn run(
    target: Target,
    workload: Workload,
    pacing: Pacing,
    limits: Limits,
    progress: Box<Progress>,
) -> Result<Run> {
    let path = target.path();
    let (done, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let begun = Instant::now();
    let shared = Arc::new(Shared { target, path, begun, idle: Mutex::default(), done, failed, progress });
    let mut samples = match pacing {
        Pacing::Open { times, most_at_once } => open(&shared, &workload, times, most_at_once, limits).await?,
        Pacing::Closed { clients, think } => closed(&shared, workload, clients, think, limits).await?,
    };
    samples.sort_by_key(|sample| sample.index);
    Ok(Run { begun, samples })
}

async fn open(
    shared: &Arc<Shared>,
    workload: &Workload,
    times: Box<dyn Iterator<Item = Duration> + Send>,
    most_at_once: usize,
    limits: Limits,
) -> Result<Vec<Sample>> {
    let places = Arc::new(Semaphore::new(most_at_once));
    let mut tasks = JoinSet::new();
    for (index, scheduled) in times.enumerate().take(limits.requests.unwrap_or(usize::MAX)) {
        if limits.duration.is_some_and(|end| scheduled >= end) {
            break;
        }
        // made before its time, so that making it does not make it late
        let Some(wanted) = workload.request(index) else { break };
        let body = shared.target.request(&wanted)?;
        tokio::time::sleep_until((shared.begun + scheduled).into()).await;
        let (shared, places) = (Arc::clone(shared), Arc::clone(&places));
        tasks.spawn(async move {
            // nobody closes it: without a place the request would go out all the same
            let _place = places.acquire_owned().await.ok();
            shared.sample(index, scheduled, &wanted, body).await
        });
    }
    Ok(tasks.join_all().await)
}

async fn closed(
    shared: &Arc<Shared>,
    workload: Workload,
    clients: usize,
    think: Duration,
    limits: Limits,
) -> Result<Vec<Sample>> {
    let (next, workload) = (Arc::new(AtomicUsize::new(0)), Arc::new(workload));
    let mut tasks = JoinSet::new();
    for _ in 0..clients {
        let (shared, next, workload) = (Arc::clone(shared), Arc::clone(&next), Arc::clone(&workload));
        tasks.spawn(async move {
            let mut samples = Vec::new();
            loop {
                if limits.duration.is_some_and(|end| shared.begun.elapsed() >= end) {
                    break;
                }
                let index = next.fetch_add(1, Ordering::Relaxed);
                if limits.requests.is_some_and(|most| index >= most) {
                    break;
                }
                let Some(wanted) = workload.request(index) else { break };
                let body = shared.target.request(&wanted)?;
                let scheduled = shared.begun.elapsed();
                let sample = shared.sample(index, scheduled, &wanted, body).await;
                // a server that refuses at once is not asked as fast as this program can
                let pause = if sample.outcome.is_err() { think.max(PAUSE_AFTER_FAILURE) } else { think };
                samples.push(sample);
                if !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
            }
            anyhow::Ok(samples)
        });
    }
    let all: Result<Vec<Vec<Sample>>> = tasks.join_all().await.into_iter().collect();
    Ok(all?.concat())
}

/// What a client waits at least after its request failed.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(100);
