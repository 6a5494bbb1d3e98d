//! A lease in the metadata: who holds it leads.
use bytes::Bytes;
use moesaic_types::Result;
use moesaic_types::boundary::Metadata;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout_at};

/// The time that a lease is held without a break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Term {
    /// Higher than that of any term before.
    pub number: u64,
    /// It ends then, unless it is renewed.
    pub until: Instant,
}

/// Seeks a lease, and renews it at every third of its time. Dropping it gives the lease back in the background.
#[derive(Debug)]
pub struct Lease {
    term: watch::Receiver<Option<Term>>,
    /// Dropped to end the task.
    stay: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Lease {
    /// Starts to seek the lease that `key` names. `holder` names this process in this life of it, and no other.
    pub fn start(metadata: Arc<dyn Metadata>, key: String, holder: String, time: Duration) -> Self {
        let (told, term) = watch::channel(None);
        let (stay, leave) = oneshot::channel();
        let seeker = Seeker { metadata, key, holder: holder.into(), time, version: None, told };
        Self { term, stay, task: tokio::spawn(seeker.keep(leave)) }
    }

    /// The term that this process leads in, to wait for changes.
    pub fn watch(&self) -> watch::Receiver<Option<Term>> {
        self.term.clone()
    }

    /// Gives the lease back, and returns when that is done, or cannot be: then it runs out.
    pub async fn give_back(self) {
        drop(self.stay);
        if let Err(error) = self.task.await {
            tracing::error!(%error, "give the lease back");
        }
    }
}

/// The term that runs now, by the clock: one that was told may have ended while the process stood still.
pub fn current(told: &watch::Receiver<Option<Term>>) -> Option<Term> {
    (*told.borrow()).filter(|term| Instant::now() < term.until)
}

struct Seeker {
    metadata: Arc<dyn Metadata>,
    key: String,
    holder: Bytes,
    time: Duration,
    /// Of the record, where it is ours and we know it.
    version: Option<u64>,
    told: watch::Sender<Option<Term>>,
}

impl Seeker {
    async fn keep(mut self, mut leave: oneshot::Receiver<()>) {
        let mut was_refused = false;
        loop {
            let begun = Instant::now();
            let until = self.told.borrow().map(|term| term.until);
            // a term ends at its time, also while the metadata keep us waiting
            let renewed = timeout_at(until.unwrap_or(begun + self.time), self.renew()).await;
            let pause = match renewed {
                Ok(Ok(held)) => {
                    was_refused = false;
                    self.tell(held.then_some(begun));
                    self.time / 3
                }
                Ok(Err(error)) => {
                    if !was_refused {
                        tracing::warn!(%error, key = self.key, "renew the lease");
                    }
                    was_refused = true;
                    self.end_in_time();
                    self.time / 10
                }
                Err(_) => {
                    self.end_in_time();
                    Duration::ZERO
                }
            };
            let until = self.told.borrow().map(|term| term.until);
            let pause = until.map_or(pause, |until| pause.min(until.saturating_duration_since(Instant::now())));
            tokio::select! {
                _ = &mut leave => break,
                () = sleep(pause) => {}
            }
        }
        self.told.send_replace(None);
        if let Some(version) = self.version
            && let Err(error) = self.metadata.remove(&self.key, version).await
        {
            tracing::debug!(%error, key = self.key, "give the lease back");
        }
    }

    /// Takes the lease or renews it; whether it is ours.
    async fn renew(&mut self) -> Result<bool> {
        if let Some(version) = self.version.take() {
            self.version = self.write(Some(version)).await?;
            if self.version.is_some() {
                return Ok(true);
            }
        }
        let expected = match self.metadata.get(&self.key).await? {
            // a write of ours of which we did not hear
            Some((holder, version)) if holder == self.holder => Some(version),
            Some(_) => return Ok(false),
            None => None,
        };
        self.version = self.write(expected).await?;
        Ok(self.version.is_some())
    }

    async fn write(&self, expected: Option<u64>) -> Result<Option<u64>> {
        self.metadata.compare_and_set(&self.key, expected, self.holder.clone(), Some(self.time)).await
    }

    /// The lease is ours since `begun`, or another's.
    fn tell(&self, begun: Option<Instant>) {
        let before = *self.told.borrow();
        let term = begun.zip(self.version).map(|(begun, version)| Term {
            number: before.map_or(version, |term| term.number),
            until: begun + self.time,
        });
        if term.is_none() && before.is_some() {
            tracing::warn!(key = self.key, "the lease was lost");
        }
        self.told.send_replace(term);
    }

    fn end_in_time(&self) {
        if self.told.borrow().is_some_and(|term| Instant::now() >= term.until) {
            self.tell(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moesaic_testkit::soon;
    use moesaic_transport::MemoryMetadata;

    const TIME: Duration = Duration::from_secs(3);

    fn seek(metadata: &Arc<MemoryMetadata>, holder: &str) -> Lease {
        Lease::start(metadata.clone(), "leader".into(), holder.into(), TIME)
    }

    async fn holds(lease: &Lease, held: bool) -> Option<Term> {
        let mut watch = lease.watch();
        *soon("the lease", watch.wait_for(|term| term.is_some() == held)).await.unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn one_holds_it_until_it_is_given_back() {
        let metadata = Arc::new(MemoryMetadata::new());
        let one = seek(&metadata, "one");
        let first = holds(&one, true).await.unwrap();
        let two = seek(&metadata, "two");
        tokio::time::sleep(10 * TIME).await;
        assert_eq!(*two.watch().borrow(), None);
        let now = current(&one.watch()).unwrap();
        assert_eq!(now.number, first.number, "it is one term");
        assert!(now.until > first.until);
        one.give_back().await;
        assert!(holds(&two, true).await.unwrap().number > first.number);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_overtaken_hears_of_it() {
        let metadata = Arc::new(MemoryMetadata::new());
        let one = seek(&metadata, "one");
        holds(&one, true).await;
        let (_, version) = metadata.get("leader").await.unwrap().unwrap();
        assert!(metadata.remove("leader", version).await.unwrap());
        let other = metadata.compare_and_set("leader", None, "two".into(), Some(TIME)).await.unwrap();
        holds(&one, false).await;
        assert!(metadata.remove("leader", other.unwrap()).await.unwrap());
        assert!(holds(&one, true).await.unwrap().number > version);
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_that_was_not_heard_of_is_found_again() {
        let metadata = Arc::new(MemoryMetadata::new());
        metadata.compare_and_set("leader", None, "one".into(), Some(1000 * TIME)).await.unwrap();
        let one = seek(&metadata, "one");
        holds(&one, true).await;
    }
}
