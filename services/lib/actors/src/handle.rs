//! What callers hold of an actor.
use crate::AskError;
use actix::dev::channel::AddressSender;
use actix::dev::{SendError, ToEnvelope};
use actix::{Actor, Context, Handler, Message};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::watch;

/// Longest wait for the supervisor to see a failure. It runs on the actor's thread, so it is next; only a handler that
/// drops its reply without failing is waited for in vain.
const SUPERVISION: Duration = Duration::from_secs(1);

/// State that all handles of one actor and its supervisor share.
pub(crate) struct Shared<A: Actor> {
    pub(crate) name: &'static str,
    /// The mailbox of the current life. The supervisor replaces it before it drops the old mailbox, so a closed
    /// mailbox seen under this lock means that the actor is stopped for good. One sender for all handles, because
    /// actix allows each sender one message beyond the bound.
    sender: Mutex<AddressSender<A>>,
    /// How often the actor was built again; changes together with the sender.
    restarts: watch::Sender<u64>,
    /// True once the supervisor is about to end.
    stopped: AtomicBool,
    /// True asks the supervisor to stop; so does the drop of this sender with the last handle.
    stop: watch::Sender<bool>,
    /// Closed when the supervisor has ended.
    ended: watch::Receiver<()>,
}

impl<A: Actor> Shared<A> {
    pub(crate) fn new(
        name: &'static str,
        sender: AddressSender<A>,
        stop: watch::Sender<bool>,
        ended: watch::Receiver<()>,
    ) -> Self {
        Self {
            name,
            sender: Mutex::new(sender),
            restarts: watch::Sender::new(0),
            stopped: AtomicBool::new(false),
            stop,
            ended,
        }
    }

    fn sender(&self) -> MutexGuard<'_, AddressSender<A>> {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a new life with this mailbox, and counts the restart.
    pub(crate) fn renew(&self, sender: AddressSender<A>) -> u64 {
        let mut current = self.sender();
        *current = sender;
        self.restarts.send_modify(|restarts| *restarts += 1);
        *self.restarts.borrow()
    }

    pub(crate) fn mark_stopped(&self) {
        self.stopped.store(true, Ordering::Release);
        // Wakes who waits for this life's end.
        self.restarts.send_modify(|_| {});
    }

    /// Waits until the life after `life` has begun, or none will.
    async fn life_ended(&self, life: u64) {
        let mut restarts = self.restarts.subscribe();
        // The sender is in `self`: it cannot be gone.
        let _ = restarts.wait_for(|now| *now != life || self.stopped.load(Ordering::Acquire)).await;
    }
}

/// A cheap-clone reference to a supervised actor. The actor stops when the last handle is dropped.
pub struct Handle<A: Actor> {
    pub(crate) shared: Arc<Shared<A>>,
}

impl<A: Actor> Clone for Handle<A> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<A: Actor> fmt::Debug for Handle<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("actor", &self.shared.name).field("restarts", &self.restarts()).finish()
    }
}

impl<A: Actor<Context = Context<A>>> Handle<A> {
    /// Sends a message and awaits its result, from any tokio runtime with a timer. A full mailbox is an error at once.
    /// Dropping the future gives up the answer; a message that no handler has taken yet is then skipped.
    pub async fn ask<M>(&self, message: M, deadline: Duration) -> Result<M::Result, AskError>
    where
        A: Handler<M>,
        Context<A>: ToEnvelope<A, M>,
        M: Message + Send + 'static,
        M::Result: Send,
    {
        let name = self.shared.name;
        let (life, reply) = {
            let sender = self.shared.sender();
            let reply = sender.send(message).map_err(|error| match error {
                SendError::Full(_) => AskError::Full(name),
                SendError::Closed(_) => AskError::Closed(name),
            })?;
            (*self.shared.restarts.borrow(), reply)
        };
        match tokio::time::timeout(deadline, reply).await {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(_)) => {
                // The reply went with the panic, a moment before the supervisor sees it. Whoever is told of the
                // failure can count on it that the next message goes to fresh state.
                let _ = tokio::time::timeout(SUPERVISION, self.shared.life_ended(life)).await;
                Err(if self.is_stopped() { AskError::Closed(name) } else { AskError::Restarting(name) })
            }
            Err(_) => Err(AskError::Timeout(name)),
        }
    }

    /// Sends a message without awaiting a result; hands it back when it cannot be queued. Never blocks.
    pub fn try_tell<M>(&self, message: M) -> Result<(), (M, AskError)>
    where
        A: Handler<M>,
        Context<A>: ToEnvelope<A, M>,
        M: Message + Send + 'static,
        M::Result: Send,
    {
        self.shared.sender().try_send(message, true).map_err(|error| match error {
            SendError::Full(message) => (message, AskError::Full(self.shared.name)),
            SendError::Closed(message) => (message, AskError::Closed(self.shared.name)),
        })
    }
}

impl<A: Actor> Handle<A> {
    /// The actor's name.
    pub fn name(&self) -> &'static str {
        self.shared.name
    }

    /// How often the actor was built again.
    pub fn restarts(&self) -> u64 {
        *self.shared.restarts.borrow()
    }

    /// Stops the actor for good; messages still queued are dropped. Await [`Handle::stopped`] for the end.
    pub fn stop(&self) {
        self.shared.stop.send_replace(true);
    }

    /// Whether the actor was stopped for good.
    pub fn is_stopped(&self) -> bool {
        self.shared.stopped.load(Ordering::Acquire)
    }

    /// Waits until the actor has stopped for good and its state is dropped. Cancel-safe.
    pub async fn stopped(&self) {
        let mut ended = self.shared.ended.clone();
        // Nothing is ever sent; the error is the end.
        while ended.changed().await.is_ok() {}
    }

    /// A reference that does not keep the actor alive, for tasks that feed it.
    pub fn downgrade(&self) -> WeakHandle<A> {
        WeakHandle { shared: Arc::downgrade(&self.shared) }
    }
}

/// A reference that does not keep the actor alive.
pub struct WeakHandle<A: Actor> {
    shared: Weak<Shared<A>>,
}

impl<A: Actor> Clone for WeakHandle<A> {
    fn clone(&self) -> Self {
        Self { shared: Weak::clone(&self.shared) }
    }
}

impl<A: Actor> fmt::Debug for WeakHandle<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WeakHandle").field("alive", &(self.shared.strong_count() > 0)).finish()
    }
}

impl<A: Actor> WeakHandle<A> {
    /// The handle, if any other is left.
    pub fn upgrade(&self) -> Option<Handle<A>> {
        self.shared.upgrade().map(|shared| Handle { shared })
    }
}
