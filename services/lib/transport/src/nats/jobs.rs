//! `JobQueue` over JetStream: one stream of work for each queue, one subject for each job, one durable consumer.
//!
//! A subject holds one message at most, so a job that is pushed again before it is done is refused by the server
//! itself, and a push whose answer was lost can be made again. A job that is done leaves the stream. JetStream gives a
//! job to another worker when it has not heard of it for [`JobLimits::ack_wait`]; leases of any length are kept by
//! reports in the background (see `lease`).
use super::lease::{Held, Step, end};
use super::{DEADLINE, Nats, check_payload};
use crate::subjects;
use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::consumer::pull::Config as ConsumerConfig;
use async_nats::jetstream::context::GetStreamErrorKind;
use async_nats::jetstream::message::{AckKind, Acker};
use async_nats::jetstream::stream::{Config as StreamConfig, DiscardPolicy, RetentionPolicy, StorageType};
use async_nats::jetstream::{Context, ErrorCode as ServerCode};
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use futures::{StreamExt, TryFutureExt};
use moesaic_types::boundary::{Job, JobQueue};
use moesaic_types::{Error, Result};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until, timeout};

/// How long a pull waits for a job: an empty queue answers after it.
const HEARD: Duration = Duration::from_millis(100);
/// The consumer that all workers of a queue share.
const WORKERS: &str = "workers";

/// Jobs of a queue that are pulled and not done at the same time, over all workers.
const IN_FLIGHT: i64 = 100_000;

/// What holds for all jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobLimits {
    /// A worker that was not heard of for so long has lost its jobs; default 30 seconds.
    pub ack_wait: Duration,
    /// A job that was pulled so often goes to [`dead_letters`] instead of being pulled again; default 32.
    pub max_deliveries: u32,
}

impl Default for JobLimits {
    fn default() -> Self {
        Self { ack_wait: Duration::from_secs(30), max_deliveries: 32 }
    }
}

/// The queue that takes the jobs that were pulled too often from `queue`. It is a queue like any other, but its own
/// jobs stay.
pub fn dead_letters(queue: &str) -> String {
    format!("{queue}{DEAD}")
}

const DEAD: &str = ".dead";

/// A durable queue in JetStream; cheap to clone.
///
/// A job is done at least once: it may be given to another worker as well when one stood still for longer than the
/// acknowledgement time, or when NATS was killed before it had written down to whom it gave it. `Unavailable` when JetStream does not answer in time; then a change may have been made.
#[derive(Clone)]
pub struct JetStreamQueue {
    inner: Arc<Inner>,
}

struct Inner {
    nats: Nats,
    context: Context,
    limits: JobLimits,
    /// Queues whose stream and consumer were there.
    consumers: Mutex<HashMap<Arc<str>, PullConsumer>>,
    leases: Mutex<Leases>,
}

#[derive(Default)]
struct Leases {
    last: u64,
    held: HashMap<u64, Lease>,
}

struct Lease {
    held: Held,
    acker: Arc<Acker>,
    keeper: AbortHandle,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl JetStreamQueue {
    /// A queue over a connection.
    pub fn new(nats: Nats, limits: JobLimits) -> Self {
        let mut context = async_nats::jetstream::new(nats.client.clone());
        context.set_timeout(DEADLINE);
        let (consumers, leases) = (Mutex::default(), Mutex::default());
        Self { inner: Arc::new(Inner { nats, context, limits, consumers, leases }) }
    }
}

impl Inner {
    fn leases(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn consumers(&self) -> MutexGuard<'_, HashMap<Arc<str>, PullConsumer>> {
        self.consumers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The queue's consumer; makes stream and consumer where there are none.
    async fn consumer(&self, queue: &Arc<str>) -> Result<PullConsumer> {
        if let Some(consumer) = self.consumers().get(queue) {
            return Ok(consumer.clone());
        }
        let config = StreamConfig {
            name: self.nats.namespace.job_stream(queue),
            subjects: vec![self.outer(&subjects::jobs(queue))?],
            retention: RetentionPolicy::WorkQueue,
            storage: StorageType::File,
            max_messages_per_subject: 1,
            discard: DiscardPolicy::New,
            discard_new_per_subject: true,
            ..StreamConfig::default()
        };
        let stream = self.context.get_or_create_stream(config).map_err(|e| self.nats.unavailable(e)).await?;
        let config = ConsumerConfig {
            durable_name: Some(WORKERS.into()),
            ack_wait: self.limits.ack_wait,
            max_ack_pending: IN_FLIGHT,
            ..ConsumerConfig::default()
        };
        let consumer = stream.create_consumer(config).map_err(|e| self.nats.unavailable(e)).await?;
        self.consumers().insert(queue.clone(), consumer.clone());
        Ok(consumer)
    }

    fn outer(&self, subject: &str) -> Result<String> {
        let outer = self.nats.namespace.outer(subject);
        outer.ok_or_else(|| Error::internal(format!("nats: {subject} is no job of ours")))
    }

    /// Looks for the queue anew at the next call: NATS may have come back without it.
    fn forget(&self, queue: &str) {
        self.consumers().remove(queue);
    }

    async fn push(&self, queue: &Arc<str>, id: &str, payload: Bytes) -> Result<bool> {
        check_payload("a job", payload.len())?;
        if queue.is_empty() || id.is_empty() {
            return Err(Error::invalid("id", "a queue and a job must have a name"));
        }
        self.consumer(queue).await?;
        let subject = self.outer(&subjects::job(queue, id))?;
        let published = async { self.context.publish(subject, payload).await?.await };
        match published.await {
            Ok(_) => Ok(true),
            Err(error) if is_already_there(&error) => Ok(false),
            Err(error) => {
                self.forget(queue);
                Err(self.nats.unavailable(error))
            }
        }
    }

    async fn pull(self: &Arc<Self>, queue: &Arc<str>, lease: Duration) -> Result<Option<Job>> {
        loop {
            let consumer = self.consumer(queue).await?;
            // the server's clock for this job starts after this
            let asked = Instant::now();
            let failed = |error: &dyn std::fmt::Display| {
                self.forget(queue);
                self.nats.unavailable(error)
            };
            // a consumer hears of what was just pushed a moment later
            let wait = consumer.batch().max_messages(1).expires(HEARD);
            let mut batch = wait.messages().await.map_err(|error| failed(&error))?;
            let Some(message) = batch.next().await else { return Ok(None) };
            let message = message.map_err(|error| failed(&error))?;
            let deliveries = message.info().map_or(1, |info| u32::try_from(info.delivered).unwrap_or(u32::MAX));
            let (message, acker) = message.split();
            let id = self.nats.namespace.inner(&message.subject).and_then(|subject| subjects::job_id(&subject));
            let Some(id) = id else {
                return Err(Error::internal(format!("nats: {} is in a queue and is no job", message.subject)));
            };
            if deliveries > self.limits.max_deliveries && !queue.ends_with(DEAD) {
                self.bury(queue, &id, message.payload, &acker).await?;
                continue;
            }
            let held = Held::new(asked, lease);
            let lease = self.hold(None, held, Arc::new(acker));
            let (queue, payload) = (queue.clone(), message.payload);
            return Ok(Some(Job { queue, id: id.into(), payload, deliveries, lease }));
        }
    }

    /// Moves a job to the dead letters. It may be there already, from an attempt that was cut off.
    async fn bury(&self, queue: &str, id: &str, payload: Bytes, acker: &Acker) -> Result<()> {
        self.push(&dead_letters(queue).into(), id, payload).await?;
        acker.double_ack_with(AckKind::Term).await.map_err(|error| self.nats.unavailable(error))?;
        tracing::error!(queue, id, max_deliveries = self.limits.max_deliveries, "a job was pulled too often");
        Ok(())
    }

    /// Keeps a lease, under a new number or the old one.
    fn hold(self: &Arc<Self>, number: Option<u64>, held: Held, acker: Arc<Acker>) -> u64 {
        let mut leases = self.leases();
        let number = number.unwrap_or_else(|| {
            leases.last += 1;
            leases.last
        });
        let keeper = tokio::spawn(keep(Arc::downgrade(self), number)).abort_handle();
        leases.held.insert(number, Lease { held, acker, keeper });
        number
    }

    /// Takes a lease out, if it is surely ours.
    fn take(&self, job: &Job) -> Option<(Held, Arc<Acker>)> {
        let mut leases = self.leases();
        let is_ours = leases.held.get(&job.lease)?.held.is_ours(Instant::now(), self.limits.ack_wait);
        is_ours.then(|| leases.held.remove(&job.lease)).flatten().map(|lease| (lease.held, Arc::clone(&lease.acker)))
    }

    /// Says what becomes of a job; the lease is kept where the answer does not come, so that it can be said again.
    async fn conclude(self: &Arc<Self>, job: &Job, kind: AckKind) -> Result<bool> {
        let Some((held, acker)) = self.take(job) else { return Ok(false) };
        let said = self.nats.call(acker.double_ack_with(kind).map_err(|error| self.nats.unavailable(error))).await;
        if said.is_err() {
            self.hold(Some(job.lease), held, acker);
        }
        said.map(|()| true)
    }

    async fn extend(self: &Arc<Self>, job: &Job, lease: Duration) -> Result<bool> {
        let Some((mut held, acker)) = self.take(job) else { return Ok(false) };
        let now = Instant::now();
        (held.until, held.reported) = (end(now, lease), now);
        let reported = acker.double_ack_with(AckKind::Progress).map_err(|error| self.nats.unavailable(error));
        let reported = self.nats.call(reported).await;
        if reported.is_ok() {
            held.confirmed = now;
        }
        self.hold(Some(job.lease), held, acker);
        reported.map(|()| true)
    }

    async fn pending(&self, queue: &str) -> Result<usize> {
        match self.context.get_stream(self.nats.namespace.job_stream(queue)).await {
            Ok(stream) => Ok(usize::try_from(stream.cached_info().state.messages).unwrap_or(usize::MAX)),
            Err(error) => match error.kind() {
                GetStreamErrorKind::JetStream(reason) if reason.error_code() == ServerCode::STREAM_NOT_FOUND => Ok(0),
                _ => Err(self.nats.unavailable(error)),
            },
        }
    }

    /// What is to be done for a lease, with the means to do it; `None` when there is no such lease any longer.
    fn step(&self, number: u64) -> Option<(Step, Arc<Acker>)> {
        let now = Instant::now();
        let mut leases = self.leases();
        let lease = leases.held.get_mut(&number)?;
        let step = lease.held.step(now, self.limits.ack_wait);
        if step == Step::Report {
            lease.held.reported = now;
        }
        Some((step, Arc::clone(&lease.acker)))
    }

    fn confirm(&self, number: u64, sent: Instant) {
        if let Some(lease) = self.leases().held.get_mut(&number) {
            lease.held.confirmed = sent;
        }
    }

    /// Forgets a lease without stopping its keeper, who is asking.
    fn drop_lease(&self, number: u64) -> Option<Lease> {
        self.leases().held.remove(&number)
    }
}

/// Keeps one lease until it is concluded, over or lost, or the queue is dropped.
async fn keep(inner: Weak<Inner>, number: u64) {
    loop {
        let Some(queue) = inner.upgrade() else { return };
        let Some((step, acker)) = queue.step(number) else { return };
        match step {
            Step::Wait(until) => {
                drop(queue);
                sleep_until(until).await;
            }
            Step::Report => {
                let sent = Instant::now();
                let said = acker.double_ack_with(AckKind::Progress);
                if matches!(timeout(queue.limits.ack_wait / 6, said).await, Ok(Ok(()))) {
                    queue.confirm(number, sent);
                }
            }
            Step::GiveBack => {
                let _stops_us_when_dropped = queue.drop_lease(number);
                // unheard, it is given to another after the acknowledgement time
                let _ = timeout(DEADLINE, acker.double_ack_with(AckKind::Nak(None))).await;
                return;
            }
            Step::Lost => {
                tracing::warn!("a job was not heard of in time; another worker may have it now");
                queue.drop_lease(number);
                return;
            }
        }
    }
}

/// Whether the server refused a job because it has one of this id.
fn is_already_there(error: &async_nats::jetstream::context::PublishError) -> bool {
    let reason = std::error::Error::source(error).and_then(|e| e.downcast_ref::<async_nats::jetstream::Error>());
    reason.is_some_and(|reason| {
        reason.error_code() == ServerCode::STREAM_STORE_FAILED && reason.to_string().contains("per subject")
    })
}

impl JobQueue for JetStreamQueue {
    fn push(&self, queue: &str, id: &str, payload: Bytes) -> BoxFuture<'_, Result<bool>> {
        let (queue, id): (Arc<str>, String) = (queue.into(), id.to_owned());
        async move { self.inner.nats.call(self.inner.push(&queue, &id, payload)).await }.boxed()
    }

    fn pull(&self, queue: &str, lease: Duration) -> BoxFuture<'_, Result<Option<Job>>> {
        let queue: Arc<str> = queue.into();
        async move { self.inner.nats.call(self.inner.pull(&queue, lease)).await }.boxed()
    }

    fn in_progress(&self, job: &Job, lease: Duration) -> BoxFuture<'_, Result<bool>> {
        let job = job.clone();
        async move { self.inner.extend(&job, lease).await }.boxed()
    }

    fn ack(&self, job: &Job) -> BoxFuture<'_, Result<bool>> {
        let job = job.clone();
        async move { self.inner.conclude(&job, AckKind::Ack).await }.boxed()
    }

    fn release(&self, job: &Job) -> BoxFuture<'_, Result<bool>> {
        let job = job.clone();
        async move { self.inner.conclude(&job, AckKind::Nak(None)).await }.boxed()
    }

    fn pending(&self, queue: &str) -> BoxFuture<'_, Result<usize>> {
        let queue = queue.to_owned();
        async move { self.inner.nats.call(self.inner.pending(&queue)).await }.boxed()
    }
}
