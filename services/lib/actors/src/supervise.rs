//! Runs an actor life after life until it is stopped.
use crate::handle::Shared;
use crate::{Backoff, Handle, arbiter};
use actix::dev::ContextFut;
use actix::dev::channel::{AddressReceiver, channel};
use actix::{Actor, ActorContext, Context};
use moesaic_telemetry::metrics::ACTOR_RESTARTS_TOTAL;
use std::any::Any;
use std::future::{Future, poll_fn};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Starts actors of type `A` under supervision.
pub struct Supervised<A>(PhantomData<A>);

impl<A: Actor<Context = Context<A>>> Supervised<A> {
    /// Starts an actor on a thread of its own, with at most `capacity` (at least 1) queued messages. `factory` builds
    /// its state, now and after every failure; what must outlive a failure belongs outside, where `factory` reads it.
    /// Blocks for the moment that the thread takes to start.
    pub fn spawn(name: &'static str, capacity: usize, factory: impl Fn() -> A + Send + Sync + 'static) -> Handle<A> {
        Self::spawn_with(name, capacity, Backoff::default(), factory)
    }

    /// As [`Supervised::spawn`], with other pauses between restarts.
    pub fn spawn_with(
        name: &'static str,
        capacity: usize,
        backoff: Backoff,
        factory: impl Fn() -> A + Send + Sync + 'static,
    ) -> Handle<A> {
        // To actix 0 means without bound.
        let capacity = capacity.max(1);
        let (sender, mailbox) = channel(capacity);
        let (stop_tx, stop) = watch::channel(false);
        let (ended_tx, ended) = watch::channel(());
        let shared = Arc::new(Shared::new(name, sender, stop_tx, ended));
        let supervisor = Supervisor { name, capacity, backoff, factory, stop, shared: Arc::downgrade(&shared) };
        let thread = arbiter::start();
        let end_thread = thread.clone();
        thread.spawn_fn(move || {
            actix_rt::spawn(async move {
                supervisor.run(mailbox).await;
                drop(ended_tx);
                end_thread.stop();
            });
        });
        Handle { shared }
    }
}

/// How a life ended.
enum End {
    /// It was told to, or no handle is left.
    Stopped,
    /// The actor stopped itself.
    Finished,
    /// A handler, a hook or the factory panicked.
    Panicked(String),
}

struct Supervisor<A: Actor, F> {
    name: &'static str,
    capacity: usize,
    backoff: Backoff,
    factory: F,
    stop: watch::Receiver<bool>,
    shared: Weak<Shared<A>>,
}

impl<A: Actor<Context = Context<A>>, F: Fn() -> A> Supervisor<A, F> {
    async fn run(mut self, mut mailbox: AddressReceiver<A>) {
        let mut pause = None;
        loop {
            let born = Instant::now();
            let built = catch_unwind(AssertUnwindSafe(&self.factory));
            let (end, remains) = match built {
                Ok(actor) => {
                    let mut life = Context::with_receiver(mailbox).into_future(actor);
                    (live(&mut life, &mut self.stop).await, Remains::Life(Box::new(life)))
                }
                Err(panic) => (End::Panicked(panic_message(&*panic)), Remains::Mailbox(mailbox)),
            };
            let Some(shared) = self.shared.upgrade() else {
                remains.bury();
                return;
            };
            if matches!(end, End::Stopped) {
                shared.mark_stopped();
                remains.bury();
                return;
            }
            let (sender, next_mailbox) = channel(self.capacity);
            mailbox = next_mailbox;
            let wait = self.backoff.next(pause, born.elapsed());
            pause = Some(wait);
            // Before the old mailbox is dropped: whoever sees an ask fail finds the new one.
            let restarts = shared.renew(sender);
            metrics::counter!(ACTOR_RESTARTS_TOTAL, "actor" => self.name).increment(1);
            drop(shared);
            remains.bury();
            let wait_ms = wait.as_millis();
            match end {
                End::Panicked(panic) => tracing::error!(actor = self.name, panic, restarts, wait_ms, "actor failed"),
                _ => tracing::warn!(actor = self.name, restarts, wait_ms, "actor stopped itself"),
            }
            if self.pause_or_stop(wait).await {
                if let Some(shared) = self.shared.upgrade() {
                    shared.mark_stopped();
                }
                return;
            }
        }
    }

    /// Waits; true if it was told to stop meanwhile.
    async fn pause_or_stop(&mut self, wait: Duration) -> bool {
        tokio::select! {
            () = stop_requested(&mut self.stop) => true,
            () = tokio::time::sleep(wait) => false,
        }
    }
}

/// Returns when a stop is asked for or the last handle is dropped. Cancel-safe.
async fn stop_requested(stop: &mut watch::Receiver<bool>) {
    // The error means that the sender went with the last handle.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Drives one life to its end.
async fn live<A: Actor<Context = Context<A>>>(
    life: &mut ContextFut<A, Context<A>>,
    stop: &mut watch::Receiver<bool>,
) -> End {
    let end = tokio::select! {
        biased;
        () = stop_requested(stop) => End::Stopped,
        end = drive(life) => end,
    };
    if matches!(end, End::Stopped) {
        // Lets the actor's `stopping` and `stopped` run; an actor that refuses to stop is stopped all the same.
        life.ctx().stop();
        poll_fn(|cx| {
            let _ = catch_unwind(AssertUnwindSafe(|| Pin::new(&mut *life).poll(cx)));
            Poll::Ready(())
        })
        .await;
    }
    end
}

/// Polls a life until it finishes or panics.
async fn drive<A: Actor<Context = Context<A>>>(life: &mut ContextFut<A, Context<A>>) -> End {
    poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| Pin::new(&mut *life).poll(cx))) {
        Ok(Poll::Pending) => Poll::Pending,
        Ok(Poll::Ready(())) => Poll::Ready(End::Finished),
        Err(panic) => Poll::Ready(End::Panicked(panic_message(&*panic))),
    })
    .await
}

/// What is left of a life, mailbox included.
enum Remains<A: Actor<Context = Context<A>>> {
    Life(Box<ContextFut<A, Context<A>>>),
    Mailbox(AddressReceiver<A>),
}

impl<A: Actor<Context = Context<A>>> Remains<A> {
    /// Drops it; every ask that it holds fails.
    fn bury(self) {
        let buried = catch_unwind(AssertUnwindSafe(|| match self {
            Self::Life(mut life) => {
                // Otherwise actix polls an unfinished actor once more on drop, though its state may be broken.
                life.ctx().terminate();
                drop(life);
            }
            Self::Mailbox(mailbox) => drop(mailbox),
        }));
        if let Err(panic) = buried {
            tracing::error!(panic = panic_message(&*panic), "dropping an actor failed");
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "panic without a message".to_owned())
}
