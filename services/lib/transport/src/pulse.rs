//! The pulse of a thread that computes for others: it tells one that hangs from one that has much to do.
//!
//! gRPC answers from threads of its own, so that a process whose computing thread hangs looks well from outside. Such a
//! thread takes its work from an [`Inbox`], where it beats between two jobs and while it has none; what its device does
//! meanwhile counts as well. Whoever waits for answers gets a pulse in the stream as long as that grows, and takes a
//! peer of which nothing came for a while for one that hangs ([`heard`]).
use futures::stream::{self, Stream, StreamExt};
use moesaic_types::{Error, Result};
use std::future::ready;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tonic::{Status, Streaming};

/// How often a thread beats while it waits, and pulses are sent. Who waits for them must wait for some times longer.
pub const PULSE_EVERY: Duration = Duration::from_millis(200);

/// The first pulse of a stream opens it, and should come soon.
const FIRST_PULSE: Duration = Duration::from_millis(5);

/// A process whose thread has stood still for so long is not ready.
pub const STALLED_AFTER: Duration = Duration::from_secs(2);

/// A process whose thread has stood still for so long must be restarted.
pub const DEAD_AFTER: Duration = Duration::from_secs(60);

/// Time for what has come already to be read: if our own process stood still, the peer did not.
const GRACE: Duration = Duration::from_millis(100);

/// Grows while a computation gets on; read on any thread.
pub type Advanced = Box<dyn Fn() -> u64 + Send + Sync>;

/// How far a thread is.
#[derive(Default)]
struct Heart {
    beats: AtomicU64,
    thread: OnceLock<Thread>,
    computed: OnceLock<Advanced>,
    /// How far it was when it was last looked at, and since when.
    looked: Mutex<Option<(u64, Instant)>>,
}

impl Heart {
    fn beat(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
    }

    fn count(&self) -> u64 {
        let computed = self.computed.get().map_or(0, |computed| computed());
        self.beats.load(Ordering::Relaxed).wrapping_add(computed)
    }

    fn stands_for(&self, now: Instant) -> Duration {
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        let count = self.count();
        let since = looked.filter(|(known, _)| *known == count).map_or(now, |(_, since)| since);
        *looked = Some((count, since));
        now.saturating_duration_since(since)
    }

    fn wake(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }
}

/// The way to a thread's jobs.
pub struct Outbox<T> {
    jobs: mpsc::Sender<T>,
    heart: Arc<Heart>,
}

impl<T> Clone for Outbox<T> {
    fn clone(&self) -> Self {
        Self { jobs: self.jobs.clone(), heart: Arc::clone(&self.heart) }
    }
}

/// A thread's jobs.
pub struct Inbox<T> {
    jobs: mpsc::Receiver<T>,
    heart: Arc<Heart>,
}

/// A queue of `capacity` jobs at most for one thread.
pub fn queue<T>(capacity: usize) -> (Outbox<T>, Inbox<T>) {
    let (sender, jobs) = mpsc::channel(capacity);
    let heart = Arc::new(Heart::default());
    (Outbox { jobs: sender, heart: Arc::clone(&heart) }, Inbox { jobs, heart })
}

impl<T> Outbox<T> {
    /// Hands a job over; waits while the queue is full.
    ///
    /// # Errors
    /// The job, when the thread is gone.
    pub async fn send(&self, job: T) -> Result<(), T> {
        self.jobs.send(job).await.map_err(|refused| refused.0)?;
        self.heart.wake();
        Ok(())
    }

    /// Whether the thread is gone.
    pub fn is_closed(&self) -> bool {
        self.jobs.is_closed()
    }

    /// Waits until the thread is gone. Cancel-safe.
    pub async fn closed(&self) {
        self.jobs.closed().await;
    }

    /// Checks that the thread gets on, by what it was like when this was last asked: ask at least once a second.
    ///
    /// # Errors
    /// `Unavailable` when it has stood still for `patience`.
    pub fn check(&self, patience: Duration) -> Result<()> {
        let stands_for = self.heart.stands_for(Instant::now());
        if stands_for < patience {
            return Ok(());
        }
        let seconds = stands_for.as_secs_f64();
        Err(Error::unavailable(format!("the computing thread hangs: it has not got on for {seconds:.1} s")))
    }

    /// One soon, then one every [`PULSE_EVERY`], but only while the thread gets on.
    fn pulses(&self) -> impl Stream<Item = ()> + Send + 'static {
        let seen = self.heart.count();
        // one that waits beats now
        self.heart.wake();
        stream::unfold((Arc::clone(&self.heart), seen, FIRST_PULSE), async |(heart, seen, mut pause)| {
            loop {
                sleep(pause).await;
                let now = heart.count();
                if now != seen {
                    return Some(((), (heart, now, PULSE_EVERY)));
                }
                pause = (pause * 2).min(PULSE_EVERY);
            }
        })
    }

    /// A stream of answers with the thread's pulses between them; it ends with the answers.
    pub fn with_pulses<A: Send + 'static>(
        &self,
        answers: impl Stream<Item = A> + Send + 'static,
        pulse: impl Fn() -> A + Send + 'static,
    ) -> impl Stream<Item = A> + Send + 'static {
        let answers = answers.map(Some).chain(stream::once(ready(None)));
        let pulses = self.pulses().map(move |()| Some(pulse()));
        stream::select(answers, pulses).take_while(|item| ready(item.is_some())).filter_map(ready)
    }
}

impl<T> Inbox<T> {
    /// What the thread's device does from now on counts as its pulse.
    pub fn count_too(&self, computed: Advanced) {
        // a second one would be a second device
        let _ = self.heart.computed.set(computed);
    }

    /// The thread gets on.
    pub fn beat(&self) {
        self.heart.beat();
    }

    /// A job that waits.
    pub fn try_take(&mut self) -> Option<T> {
        self.jobs.try_recv().ok()
    }

    /// The next job; `None` when nobody can send any longer, noticed within [`PULSE_EVERY`]. Always on one thread.
    pub fn take(&mut self) -> Option<T> {
        self.heart.thread.get_or_init(std::thread::current);
        loop {
            self.beat();
            match self.jobs.try_recv() {
                Ok(job) => return Some(job),
                Err(mpsc::error::TryRecvError::Disconnected) => return None,
                Err(mpsc::error::TryRecvError::Empty) => std::thread::park_timeout(PULSE_EVERY),
            }
        }
    }
}

/// The next message of a peer that sends pulses; `None` at the stream's end. `peer` names it in errors. Cancel-safe.
///
/// # Errors
/// `Unavailable` when nothing came for `silence`; the stream's own, explained by `explain`.
pub async fn heard<T>(
    messages: &mut Streaming<T>,
    peer: &str,
    silence: Duration,
    explain: impl FnOnce(&Status) -> Error,
) -> Result<Option<T>> {
    let message = match timeout(silence, messages.message()).await {
        Ok(message) => message,
        Err(_) => timeout(GRACE, messages.message()).await.map_err(|_| {
            let seconds = silence.as_secs_f64();
            let what = "hangs or is cut off: it has neither computed nor answered for";
            Error::unavailable(format!("{peer} {what} {seconds} s"))
        })?,
    };
    message.map_err(|status| explain(&status))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc as blocking;

    /// A thread that runs what it gets.
    fn thread() -> Outbox<Box<dyn FnOnce() + Send>> {
        let (outbox, mut inbox) = queue::<Box<dyn FnOnce() + Send>>(4);
        std::thread::spawn(move || {
            while let Some(job) = inbox.take() {
                job();
            }
        });
        outbox
    }

    #[tokio::test]
    async fn a_thread_that_waits_has_a_pulse_and_one_that_hangs_has_none() {
        let outbox = thread();
        let mut pulses = Box::pin(outbox.pulses());
        for _ in 0..3 {
            timeout(10 * PULSE_EVERY, pulses.next()).await.expect("it waits for work").expect("it does not end");
        }
        let (release, held) = blocking::channel::<()>();
        let (began, begun) = tokio::sync::oneshot::channel();
        let job = move || {
            began.send(()).expect("the test waits");
            let _ = held.recv();
        };
        assert!(outbox.send(Box::new(job)).await.is_ok());
        begun.await.expect("it begins");
        // one may have been under way
        let _ = timeout(2 * PULSE_EVERY, pulses.next()).await;
        outbox.check(PULSE_EVERY).expect("nobody looked before");
        assert!(timeout(3 * PULSE_EVERY, pulses.next()).await.is_err(), "it hangs");
        outbox.check(DEAD_AFTER).expect("not for so long");
        let error = outbox.check(PULSE_EVERY).expect_err("it has stood still since");
        assert!(error.message.contains("hangs"), "{error}");
        let mut late = Box::pin(outbox.pulses());
        assert!(timeout(2 * PULSE_EVERY, late.next()).await.is_err(), "it hangs for new streams too");
        drop(release);
        timeout(10 * PULSE_EVERY, pulses.next()).await.expect("it goes on").expect("it does not end");
        outbox.check(PULSE_EVERY).expect("it got on since");
    }

    #[tokio::test]
    async fn a_device_that_gets_on_is_a_pulse() {
        let (outbox, inbox) = queue::<()>(1);
        let computed = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&computed);
        inbox.count_too(Box::new(move || count.load(Ordering::Relaxed)));
        let mut pulses = Box::pin(outbox.pulses());
        assert!(timeout(2 * PULSE_EVERY, pulses.next()).await.is_err(), "nobody takes jobs");
        computed.fetch_add(1, Ordering::Relaxed);
        timeout(10 * PULSE_EVERY, pulses.next()).await.expect("it gets on").expect("it does not end");
    }

    #[tokio::test]
    async fn a_job_wakes_a_thread_that_waits_and_its_end_is_seen() {
        let outbox = thread();
        let begun = Instant::now();
        for _ in 0..100 {
            let (done, told) = tokio::sync::oneshot::channel();
            let job = move || done.send(()).expect("the test waits");
            assert!(outbox.send(Box::new(job)).await.is_ok());
            told.await.expect("it runs");
        }
        assert!(begun.elapsed() < 20 * PULSE_EVERY, "jobs are taken when they come, not when a beat is due");
        assert!(outbox.send(Box::new(|| panic!("a job breaks the thread"))).await.is_ok());
        timeout(10 * PULSE_EVERY, outbox.closed()).await.expect("its end is seen");
        assert!(outbox.is_closed() && outbox.send(Box::new(|| {})).await.is_err());
    }

    #[tokio::test]
    async fn answers_end_the_stream_whether_or_not_the_thread_lives() {
        let outbox = thread();
        let answers = stream::iter([1, 2]);
        let all: Vec<i32> = outbox.with_pulses(answers, || 0).filter(|item| ready(*item != 0)).collect().await;
        assert_eq!(all, [1, 2]);
    }
}
