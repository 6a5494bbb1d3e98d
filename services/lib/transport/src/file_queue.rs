//! `JobQueue` in a file of its own: the embedded mode's durable queue.
//!
//! Jobs stand in a redb database, in the order they came; every change is on disk when it returns. Leases are in
//! memory: the file belongs to one process, so at its start all jobs are free.
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use moesaic_types::boundary::{Job, JobQueue};
use moesaic_types::{Error, Result};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// (queue, number) -> (id, deliveries, payload)
const JOBS: TableDefinition<'_, (&str, u64), (&str, u32, &[u8])> = TableDefinition::new("jobs");
/// (queue, id) -> number
const IDS: TableDefinition<'_, (&str, &str), u64> = TableDefinition::new("ids");

/// A queue in a file; cheap to clone.
#[derive(Clone)]
pub struct FileQueue {
    inner: Arc<Inner>,
}

struct Inner {
    database: Database,
    leases: Mutex<Leases>,
}

#[derive(Default)]
struct Leases {
    next: u64,
    held: HashMap<(Arc<str>, u64), (u64, Instant)>,
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::internal(format!("job queue file: {error}"))
}

impl FileQueue {
    /// Opens the file, or makes it.
    ///
    /// # Errors
    /// `Internal` when the file cannot be used, another process has it, or it is damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let refused = |error: &dyn std::fmt::Display| failed(format!("{}: {error}", path.display()));
        let database = Database::create(path).map_err(|error| refused(&error))?;
        let write = database.begin_write().map_err(|error| refused(&error))?;
        // a table is there from its first opening on
        write.open_table(JOBS).map_err(|error| refused(&error))?;
        write.open_table(IDS).map_err(|error| refused(&error))?;
        write.commit().map_err(|error| refused(&error))?;
        Ok(Self { inner: Arc::new(Inner { database, leases: Mutex::default() }) })
    }

    /// Runs file work off the async threads.
    fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T> + Send + 'static,
    ) -> BoxFuture<'_, Result<T>> {
        let inner = self.inner.clone();
        async move { tokio::task::spawn_blocking(move || work(&inner)).await.map_err(failed)? }.boxed()
    }
}

impl Inner {
    fn leases(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, queue: &str, id: &str, payload: &[u8]) -> Result<bool> {
        let write = self.database.begin_write().map_err(failed)?;
        {
            let mut ids = write.open_table(IDS).map_err(failed)?;
            if ids.get((queue, id)).map_err(failed)?.is_some() {
                return Ok(false);
            }
            let mut jobs = write.open_table(JOBS).map_err(failed)?;
            let last = jobs.range((queue, 0)..=(queue, u64::MAX)).map_err(failed)?.next_back();
            let number = last.transpose().map_err(failed)?.map_or(0, |(key, _)| key.value().1 + 1);
            jobs.insert((queue, number), (id, 0, payload)).map_err(failed)?;
            ids.insert((queue, id), number).map_err(failed)?;
        }
        write.commit().map_err(failed)?;
        Ok(true)
    }

    fn pull(&self, queue: &Arc<str>, lease: Duration) -> Result<Option<Job>> {
        let now = Instant::now();
        let mut leases = self.leases();
        leases.held.retain(|_, (_, until)| *until > now);
        let write = self.database.begin_write().map_err(failed)?;
        let (number, id, deliveries, payload) = {
            let mut jobs = write.open_table(JOBS).map_err(failed)?;
            let mut free = None;
            for job in jobs.range((&**queue, 0)..=(&**queue, u64::MAX)).map_err(failed)? {
                let (key, value) = job.map_err(failed)?;
                let number = key.value().1;
                if !leases.held.contains_key(&(queue.clone(), number)) {
                    let (id, deliveries, payload) = value.value();
                    free = Some((number, id.to_owned(), deliveries.saturating_add(1), Bytes::copy_from_slice(payload)));
                    break;
                }
            }
            let Some((number, id, deliveries, payload)) = free else { return Ok(None) };
            jobs.insert((&**queue, number), (id.as_str(), deliveries, payload.as_ref())).map_err(failed)?;
            (number, id, deliveries, payload)
        };
        write.commit().map_err(failed)?;
        leases.next += 1;
        let token = leases.next;
        leases.held.insert((queue.clone(), number), (token, now + lease));
        Ok(Some(Job { queue: queue.clone(), id: id.into(), payload, deliveries, lease: token }))
    }

    /// The number of a job whose lease still holds.
    fn held(&self, leases: &Leases, job: &Job) -> Result<Option<u64>> {
        let read = self.database.begin_read().map_err(failed)?;
        let ids = read.open_table(IDS).map_err(failed)?;
        let number = ids.get((&*job.queue, &*job.id)).map_err(failed)?.map(|number| number.value());
        let holds = |number: &u64| {
            let lease = leases.held.get(&(job.queue.clone(), *number));
            lease.is_some_and(|(token, until)| *token == job.lease && *until > Instant::now())
        };
        Ok(number.filter(holds))
    }

    fn in_progress(&self, job: &Job, lease: Duration) -> Result<bool> {
        let mut leases = self.leases();
        let Some(number) = self.held(&leases, job)? else { return Ok(false) };
        leases.held.insert((job.queue.clone(), number), (job.lease, Instant::now() + lease));
        Ok(true)
    }

    fn ack(&self, job: &Job) -> Result<bool> {
        let mut leases = self.leases();
        let Some(number) = self.held(&leases, job)? else { return Ok(false) };
        let write = self.database.begin_write().map_err(failed)?;
        {
            write.open_table(JOBS).map_err(failed)?.remove((&*job.queue, number)).map_err(failed)?;
            write.open_table(IDS).map_err(failed)?.remove((&*job.queue, &*job.id)).map_err(failed)?;
        }
        write.commit().map_err(failed)?;
        leases.held.remove(&(job.queue.clone(), number));
        Ok(true)
    }

    fn release(&self, job: &Job) -> Result<bool> {
        let mut leases = self.leases();
        let Some(number) = self.held(&leases, job)? else { return Ok(false) };
        leases.held.remove(&(job.queue.clone(), number));
        Ok(true)
    }

    fn pending(&self, queue: &str) -> Result<usize> {
        let read = self.database.begin_read().map_err(failed)?;
        let jobs = read.open_table(JOBS).map_err(failed)?;
        Ok(jobs.range((queue, 0)..=(queue, u64::MAX)).map_err(failed)?.count())
    }
}

impl JobQueue for FileQueue {
    fn push(&self, queue: &str, id: &str, payload: Bytes) -> BoxFuture<'_, Result<bool>> {
        let (queue, id) = (queue.to_owned(), id.to_owned());
        self.run(move |inner| inner.push(&queue, &id, &payload))
    }

    fn pull(&self, queue: &str, lease: Duration) -> BoxFuture<'_, Result<Option<Job>>> {
        let queue: Arc<str> = queue.into();
        self.run(move |inner| inner.pull(&queue, lease))
    }

    fn in_progress(&self, job: &Job, lease: Duration) -> BoxFuture<'_, Result<bool>> {
        let job = job.clone();
        self.run(move |inner| inner.in_progress(&job, lease))
    }

    fn ack(&self, job: &Job) -> BoxFuture<'_, Result<bool>> {
        let job = job.clone();
        self.run(move |inner| inner.ack(&job))
    }

    fn release(&self, job: &Job) -> BoxFuture<'_, Result<bool>> {
        let job = job.clone();
        self.run(move |inner| inner.release(&job))
    }

    fn pending(&self, queue: &str) -> BoxFuture<'_, Result<usize>> {
        let queue = queue.to_owned();
        self.run(move |inner| inner.pending(&queue))
    }
}
