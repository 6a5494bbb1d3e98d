//! Does what the pool wants done on disk, one thing at a time, on blocking threads.
use super::{Files, Found, each};
use crate::actors::block_pool::{BlockPool, Ended, Retry, Scanned, Stalled, TakeWork};
use crate::config::Config;
use crate::pool::Work;
use bytes::Bytes;
use moesaic_actors::{AskError, WeakHandle};
use moesaic_types::{BlockHash, Link};
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// Longest wait for the pool's answer.
const DEADLINE: Duration = Duration::from_secs(2);

/// Before the pool is asked again.
const PAUSE: Duration = Duration::from_millis(5);

/// Files of a scan that are told of together.
const BATCH: usize = 256;

/// How long a disk may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For one thing.
    pub timeout: Duration,
    /// One that failed is left alone for so long.
    pub retry: Duration,
}

impl Patience {
    /// As configured.
    pub fn of(config: &Config) -> Self {
        Self { timeout: config.disk_timeout.get(), retry: config.disk_retry.get() }
    }
}

/// Works until the pool is gone. `wake` says that there is work.
pub async fn keep(pool: WeakHandle<BlockPool>, files: Arc<dyn Files>, wake: Arc<Notify>, patience: Patience) {
    let mut keeper = Keeper { pool, files, patience, retry_at: None, is_failing: false, looks_again: false };
    loop {
        if keeper.retry_where_due().await.is_err() {
            return;
        }
        let Ok(work) = keeper.ask(|| TakeWork).await else { return };
        let done = match work {
            Some(Work::Scan) => keeper.scan().await,
            Some(Work::Remove(hashes)) => keeper.remove(hashes).await,
            Some(Work::Write { link, bytes, remove }) => keeper.write(link, bytes, remove).await,
            Some(Work::Wait) => {
                keeper.leave_alone();
                Ok(())
            }
            None => keeper.rest(&wake).await,
        };
        if done.is_err() {
            return;
        }
    }
}

/// The pool is gone for good.
struct Gone;

struct Keeper {
    pool: WeakHandle<BlockPool>,
    files: Arc<dyn Files>,
    patience: Patience,
    /// When the disk may be used in full again.
    retry_at: Option<Instant>,
    /// The disk failed, and has not shown since that it works.
    is_failing: bool,
    /// There may be files that the pool does not know.
    looks_again: bool,
}

impl Keeper {
    /// Asks until there is an answer. After a failure of the pool its fresh life wants a scan first.
    async fn ask<M>(&self, message: impl Fn() -> M) -> Result<M::Result, Gone>
    where
        BlockPool: actix::Handler<M>,
        M: actix::Message + Send + 'static,
        M::Result: Send,
    {
        loop {
            let pool = self.pool.upgrade().ok_or(Gone)?;
            match pool.ask(message(), DEADLINE).await {
                Ok(answer) => return Ok(answer),
                Err(AskError::Closed(_)) => return Err(Gone),
                Err(_) => {}
            }
            drop(pool);
            sleep(PAUSE).await;
        }
    }

    fn life(&self) -> Result<u64, Gone> {
        self.pool.upgrade().map(|pool| pool.restarts()).ok_or(Gone)
    }

    async fn rest(&mut self, wake: &Notify) -> Result<(), Gone> {
        let Some(at) = self.retry_at else {
            wake.notified().await;
            return Ok(());
        };
        tokio::select! {
            () = wake.notified() => {}
            () = sleep_until(at) => {}
        }
        Ok(())
    }

    /// The disk is used in full again after a while, however much there is to do.
    async fn retry_where_due(&mut self) -> Result<(), Gone> {
        if self.retry_at.is_some_and(|at| Instant::now() >= at) {
            self.retry_at = None;
            let looks_again = std::mem::take(&mut self.looks_again);
            self.ask(|| Retry { looks_again }).await?;
        }
        Ok(())
    }

    async fn scan(&mut self) -> Result<(), Gone> {
        let life = self.life()?;
        let (sender, mut batches) = mpsc::channel::<Vec<Found>>(2);
        let files = Arc::clone(&self.files);
        let often = self.patience.timeout / 4;
        let scan = spawn_blocking(move || {
            let (mut batch, mut last) = (Vec::new(), Instant::now());
            let told = files.scan(&mut |found| {
                batch.push(found);
                // a slow disk is not one that does not answer
                if batch.len() == BATCH || last.elapsed() >= often {
                    last = Instant::now();
                    // nobody listens: the scan is for nothing, and ends soon enough
                    let _ = sender.blocking_send(std::mem::take(&mut batch));
                }
            });
            let _ = sender.blocking_send(batch);
            told
        });
        let told = loop {
            match timeout(self.patience.timeout, batches.recv()).await {
                Ok(Some(batch)) => self.ask(|| Scanned { batch: batch.clone(), is_last: false }).await?,
                Ok(None) => break self.done(scan).await?,
                Err(_) => {
                    // it is waited for, and what it says meanwhile is said again by the next
                    batches.close();
                    break self.late(scan).await?;
                }
            }
        };
        if let Err(error) = told {
            self.notice(&error, "read the disk tier's folder");
            self.looks_again = true;
        }
        if self.life()? != life {
            // a fresh pool has missed a part, and wants a scan
            return Ok(());
        }
        self.ask(|| Scanned { batch: Vec::new(), is_last: true }).await
    }

    async fn remove(&mut self, hashes: Vec<BlockHash>) -> Result<(), Gone> {
        let files = Arc::clone(&self.files);
        let removed = spawn_blocking(move || each(&hashes, |hash| files.remove(hash)));
        if let Err(error) = self.done(removed).await? {
            self.notice(&error, "remove a block from disk");
            self.looks_again = true;
        }
        Ok(())
    }

    async fn write(&mut self, link: Link, bytes: Bytes, remove: Vec<BlockHash>) -> Result<(), Gone> {
        let files = Arc::clone(&self.files);
        let written = spawn_blocking(move || {
            let removed = each(&remove, |hash| files.remove(hash));
            let all_removed = removed.is_ok();
            // without the room that was to be made nothing is written
            Ok((removed.and_then(|()| files.write(&link, &bytes)), all_removed))
        });
        let (written, all_removed) = self.done(written).await?.unwrap_or_else(|error| (Err(error), false));
        self.looks_again |= !all_removed;
        let is_full = written.as_ref().is_err_and(|error| {
            matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge)
        });
        match &written {
            Ok(()) if self.is_failing && self.retry_at.is_none() => {
                self.is_failing = false;
                tracing::info!("blocks are written to disk again");
            }
            Ok(()) => {}
            Err(error) => self.notice(error, "write a block to disk; going on with what RAM and the disk have"),
        }
        let outcome = written.map_err(|_| is_full);
        self.ask(|| Ended { hash: link.hash, outcome }).await
    }

    fn notice(&mut self, error: &io::Error, what: &str) {
        if !self.is_failing {
            tracing::warn!(%error, "{what}");
        }
        self.is_failing = true;
        self.retry_at.get_or_insert_with(|| Instant::now() + self.patience.retry);
    }

    /// Waits for what a blocking thread does on the disk.
    async fn done<T>(&mut self, mut work: JoinHandle<io::Result<T>>) -> Result<io::Result<T>, Gone> {
        match timeout(self.patience.timeout, &mut work).await {
            Ok(done) => Ok(done.unwrap_or_else(|error| Err(io::Error::other(error)))),
            Err(_) => self.late(work).await,
        }
    }

    /// The disk does not answer: the pool goes on without it. One thread waits until it does.
    async fn late<T>(&mut self, work: JoinHandle<io::Result<T>>) -> Result<io::Result<T>, Gone> {
        if !self.is_failing {
            tracing::warn!(timeout = ?self.patience.timeout, "the disk does not answer; going on with what RAM has");
        }
        self.is_failing = true;
        self.ask(|| Stalled).await?;
        let done = work.await.unwrap_or_else(|error| Err(io::Error::other(error)));
        self.leave_alone();
        Ok(done)
    }

    /// The disk is looked at again later, whatever is known of it.
    fn leave_alone(&mut self) {
        (self.is_failing, self.looks_again) = (true, true);
        self.retry_at = Some(Instant::now() + self.patience.retry);
    }
}
