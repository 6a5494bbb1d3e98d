//! Owns the engine's life: starts it, notices its end, starts it again with growing pauses.
//!
//! Requests reach the engine through [`Slot`], not through the actor: it only decides which engine is there.
use crate::engine::{Command, End, Engine, Info, Parts};
use actix::{Actor, AsyncContext, Context, Handler, Message};
use moesaic_telemetry::metrics::ENGINE_RESTARTS_TOTAL;
use moesaic_types::{Error, Result};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// The longest pause before a restart.
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// The same while a part of the model is away.
const MAX_WAITING_PAUSE: Duration = Duration::from_secs(1);
/// An engine that lived this long starts the pauses anew.
const HEALTHY: Duration = Duration::from_secs(60);
/// Commands beyond one per waiting and two per running request.
const SPARE_COMMANDS: usize = 64;

/// How the engine is.
#[derive(Clone, Debug, PartialEq)]
pub enum Status {
    /// Being built.
    Starting,
    /// Takes requests.
    Ready(Info),
    /// A part of the model in another process is away; the next engine waits for it.
    Waiting(Error),
    /// Ended; started again after a pause.
    Failed(Error),
}

/// One engine: where its commands go, and the flag that ends it.
struct Current {
    sender: SyncSender<Command>,
    stop: Arc<AtomicBool>,
}

/// The engine that is there now, for everyone who sends it requests.
pub struct Slot {
    current: RwLock<Option<Current>>,
    status: watch::Sender<Status>,
    /// Held by an engine's thread for its life: the next one's memory is taken only when the last one's is free.
    life: Mutex<()>,
}

impl Default for Slot {
    fn default() -> Self {
        Self { current: RwLock::default(), status: watch::Sender::new(Status::Starting), life: Mutex::default() }
    }
}

impl Slot {
    /// How the engine is.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// Where to send commands.
    pub fn sender(&self) -> Option<SyncSender<Command>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).as_ref().map(|current| current.sender.clone())
    }

    fn replace(&self, sender: SyncSender<Command>, stop: Arc<AtomicBool>) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(Current { sender, stop });
    }

    /// Says how the engine with this flag is, unless another has taken its place meanwhile.
    fn tell(&self, stop: &Arc<AtomicBool>, status: Status) {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_some_and(|current| Arc::ptr_eq(&current.stop, stop)) {
            self.status.send_replace(status);
        }
    }

    /// Ends the engine with this flag after its step. If it is the current one there is none from now on, until the
    /// next one takes requests.
    fn stop(&self, stop: &Arc<AtomicBool>) {
        stop.store(true, Ordering::Release);
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(Current { sender, .. }) = current.take_if(|current| Arc::ptr_eq(&current.stop, stop)) {
            self.status.send_replace(Status::Starting);
            // A full queue means that it is awake anyway.
            let _ = sender.try_send(Command::Wake);
        }
    }
}

/// An engine's thread ended.
#[derive(Message)]
#[rtype(result = "()")]
struct Ended {
    life: u64,
    reason: String,
    is_passing: bool,
    lived: Duration,
}

/// Makes the actor panic, to test that it comes back.
#[cfg(any(test, feature = "fault-injection"))]
#[derive(Message)]
#[rtype(result = "()")]
pub struct Fail;

/// The actor.
pub struct EngineControl {
    parts: Arc<Parts>,
    slot: Arc<Slot>,
    life: u64,
    pause: Duration,
    stop: Arc<AtomicBool>,
}

impl EngineControl {
    /// For what outlives the actor.
    pub fn new(parts: Arc<Parts>, slot: Arc<Slot>) -> Self {
        let pause = Duration::from_millis(parts.config.restart_backoff_ms);
        Self { parts, slot, life: 0, pause, stop: Arc::default() }
    }

    fn launch(&mut self, context: &mut Context<Self>) {
        self.life += 1;
        let life = self.life;
        let config = &self.parts.config;
        let (sender, commands) = sync_channel(config.max_waiting + 2 * config.max_running + SPARE_COMMANDS);
        let stop = Arc::new(AtomicBool::new(false));
        self.stop = Arc::clone(&stop);
        self.slot.replace(sender.clone(), Arc::clone(&stop));
        let (parts, slot, address) = (Arc::clone(&self.parts), Arc::clone(&self.slot), context.address());
        let runtime = parts.runtime.clone();
        let thread = std::thread::Builder::new().name(format!("engine-{}", config.replica)).spawn(move || {
            let one = slot.life.lock().unwrap_or_else(PoisonError::into_inner);
            let born = Instant::now();
            // The engine is dropped in here, so every request in flight sees its end.
            let end = catch_unwind(AssertUnwindSafe(|| live(&parts, &slot, commands, sender, &stop)));
            parts.pulse.stop();
            let (reason, is_passing) = match end {
                Ok(Ok(())) => return,
                Ok(Err(End { error, is_passing })) => (error.message, is_passing),
                Err(panic) => (format!("the engine panicked: {}", panic_message(&*panic)), false),
            };
            parts.snapshot.send_modify(|snapshot| snapshot.ready = false);
            drop(one);
            let error = Error::unavailable(reason.clone());
            slot.tell(&stop, if is_passing { Status::Waiting(error) } else { Status::Failed(error) });
            let ended = Ended { life, reason, is_passing, lived: born.elapsed() };
            runtime.spawn(async move {
                // A closed mailbox means that the actor is gone; its successor starts an engine of its own.
                let _ = address.send(ended).await;
            });
        });
        if let Err(error) = thread {
            panic!("cannot start the engine's thread: {error}");
        }
    }
}

fn live(
    parts: &Arc<Parts>,
    slot: &Slot,
    commands: std::sync::mpsc::Receiver<Command>,
    replies: SyncSender<Command>,
    stop: &Arc<AtomicBool>,
) -> Result<(), End> {
    if stop.load(Ordering::Acquire) {
        return Ok(());
    }
    let mut engine = Engine::new(Arc::clone(parts), commands, replies, Arc::clone(stop))?;
    slot.tell(stop, Status::Ready(engine.info()));
    engine.run()
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

impl Actor for EngineControl {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        self.launch(context);
    }
}

impl Drop for EngineControl {
    fn drop(&mut self) {
        self.slot.stop(&self.stop);
    }
}

impl Handler<Ended> for EngineControl {
    type Result = ();

    fn handle(&mut self, ended: Ended, context: &mut Self::Context) {
        if ended.life != self.life {
            return;
        }
        let first = Duration::from_millis(self.parts.config.restart_backoff_ms);
        if ended.lived >= HEALTHY {
            self.pause = first;
        }
        // one that waits for a stage costs little, and should be there soon after it
        let most = if ended.is_passing { MAX_WAITING_PAUSE } else { MAX_PAUSE };
        let (pause, reason) = (self.pause.min(most), ended.reason);
        self.pause = (pause * 2).min(most).max(first);
        if ended.is_passing {
            tracing::warn!(reason, pause_ms = pause.as_millis(), "the engine waits for a part of its model");
        } else {
            tracing::error!(reason, pause_ms = pause.as_millis(), "the engine ended; starting it again");
        }
        context.run_later(pause, |control, context| {
            let replica = control.parts.config.replica.clone();
            metrics::counter!(ENGINE_RESTARTS_TOTAL, "replica" => replica).increment(1);
            control.parts.snapshot.send_modify(|snapshot| snapshot.restarts += 1);
            control.launch(context);
        });
    }
}

#[cfg(any(test, feature = "fault-injection"))]
impl Handler<Fail> for EngineControl {
    type Result = ();

    fn handle(&mut self, _: Fail, _: &mut Self::Context) {
        panic!("the engine's control was told to panic");
    }
}
