//! Supervision of real actix actors: panics, bounds, ends.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)] // A test fails by panicking, in its helpers too.
use actix::{Actor, AsyncContext, Context, Handler, Message, ResponseFuture};
use moesaic_actors::{AskError, Backoff, Handle, Supervised};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(10);

#[derive(Default)]
struct Counter {
    count: u64,
}

impl Actor for Counter {
    type Context = Context<Self>;
}

#[derive(Debug, Message)]
#[rtype(result = "u64")]
struct Add(u64);

impl Handler<Add> for Counter {
    type Result = u64;
    fn handle(&mut self, add: Add, _: &mut Context<Self>) -> u64 {
        self.count += add.0;
        self.count
    }
}

#[derive(Message)]
#[rtype(result = "()")]
struct Fail;

impl Handler<Fail> for Counter {
    type Result = ();
    fn handle(&mut self, _: Fail, _: &mut Context<Self>) {
        self.count = 1_000_000;
        panic!("asked to fail");
    }
}

/// Blocks the actor's thread until the other end of the channel speaks or is dropped.
#[derive(Message)]
#[rtype(result = "()")]
struct Block {
    entered: tokio::sync::oneshot::Sender<()>,
    leave: mpsc::Receiver<()>,
    then_panic: bool,
}

impl Handler<Block> for Counter {
    type Result = ();
    fn handle(&mut self, block: Block, _: &mut Context<Self>) {
        let _ = block.entered.send(());
        let _ = block.leave.recv();
        assert!(!block.then_panic, "asked to fail after the block");
    }
}

/// Never answered.
#[derive(Message)]
#[rtype(result = "()")]
struct Forever;

impl Handler<Forever> for Counter {
    type Result = ResponseFuture<()>;
    fn handle(&mut self, _: Forever, _: &mut Context<Self>) -> Self::Result {
        Box::pin(std::future::pending())
    }
}

#[derive(Message)]
#[rtype(result = "()")]
struct StopYourself;

impl Handler<StopYourself> for Counter {
    type Result = ();
    fn handle(&mut self, _: StopYourself, context: &mut Context<Self>) {
        actix::ActorContext::stop(context);
    }
}

async fn block(counter: &Handle<Counter>, then_panic: bool) -> mpsc::Sender<()> {
    let (entered, is_in) = tokio::sync::oneshot::channel();
    let (leave_tx, leave) = mpsc::channel();
    counter.try_tell(Block { entered, leave, then_panic }).map_err(|(_, error)| error).unwrap();
    is_in.await.unwrap();
    leave_tx
}

#[tokio::test]
async fn a_panic_gives_fresh_state_and_the_next_asks_work() {
    let built = Arc::new(AtomicUsize::new(0));
    let counter = Supervised::spawn("counter", 8, {
        let built = Arc::clone(&built);
        move || {
            built.fetch_add(1, Ordering::SeqCst);
            Counter::default()
        }
    });
    assert_eq!(counter.ask(Add(5), DEADLINE).await, Ok(5));
    assert_eq!(counter.restarts(), 0);
    assert_eq!(counter.ask(Fail, DEADLINE).await, Err(AskError::Restarting("counter")));
    assert_eq!(counter.restarts(), 1);
    assert_eq!(counter.ask(Add(1), DEADLINE).await, Ok(1), "state must be fresh");
    assert_eq!(built.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn asks_in_flight_fail_when_the_actor_does() {
    let counter = Supervised::spawn("counter", 8, Counter::default);
    let leave = block(&counter, true).await;
    // Queued behind the message that will panic.
    let queued: Vec<_> = (0..3)
        .map(|_| {
            let counter = counter.clone();
            tokio::spawn(async move { counter.ask(Add(1), DEADLINE).await })
        })
        .collect();
    // Each yield lets the tasks above run first, so all asks are sent once the mailbox is full.
    while counter.try_tell(Add(1)).is_ok() {
        tokio::task::yield_now().await;
    }
    leave.send(()).unwrap();
    for ask in queued {
        assert_eq!(ask.await.unwrap(), Err(AskError::Restarting("counter")));
    }
    assert_eq!(counter.ask(Add(1), DEADLINE).await, Ok(1));
}

#[tokio::test]
async fn an_ask_whose_handler_awaits_fails_when_another_message_panics() {
    let counter = Supervised::spawn("counter", 8, Counter::default);
    let waiting = tokio::spawn({
        let counter = counter.clone();
        async move { counter.ask(Forever, DEADLINE).await }
    });
    // The actor handles in order: once this is answered and the task has run, `Forever` may still come later, so
    // fail until the waiting ask has failed.
    while !waiting.is_finished() {
        let _ = counter.ask(Fail, DEADLINE).await;
    }
    assert_eq!(waiting.await.unwrap(), Err(AskError::Restarting("counter")));
}

#[tokio::test]
async fn the_mailbox_is_bounded_and_hands_the_message_back() {
    let counter = Supervised::spawn("counter", 3, Counter::default);
    let leave = block(&counter, false).await;
    // Clones share the bound.
    for _ in 0..3 {
        counter.clone().try_tell(Add(1)).unwrap();
    }
    let (message, error) = counter.clone().try_tell(Add(42)).unwrap_err();
    assert_eq!((message.0, error), (42, AskError::Full("counter")));
    assert_eq!(counter.ask(Add(1), DEADLINE).await, Err(AskError::Full("counter")));
    leave.send(()).unwrap();
    // The queue drains; asks are refused until then, never lost.
    let count = loop {
        match counter.ask(Add(0), DEADLINE).await {
            Ok(count) => break count,
            Err(AskError::Full(_)) => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(count, 3);
}

#[tokio::test]
async fn a_deadline_passes_without_harm() {
    let counter = Supervised::spawn("counter", 3, Counter::default);
    assert_eq!(counter.ask(Forever, Duration::from_millis(20)).await, Err(AskError::Timeout("counter")));
    assert_eq!(counter.ask(Add(1), DEADLINE).await, Ok(1));
}

#[tokio::test]
async fn an_actor_that_stops_itself_comes_back() {
    let counter = Supervised::spawn("counter", 3, Counter::default);
    assert_eq!(counter.ask(Add(7), DEADLINE).await, Ok(7));
    assert_eq!(counter.ask(StopYourself, DEADLINE).await, Ok(()));
    let count = loop {
        match counter.ask(Add(1), DEADLINE).await {
            Ok(count) => break count,
            Err(AskError::Restarting(_)) => {}
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(count, 1);
    assert_eq!(counter.restarts(), 1);
}

#[tokio::test]
async fn a_factory_that_panics_is_tried_again() {
    let attempts = Arc::new(AtomicUsize::new(0));
    let counter = Supervised::spawn("counter", 3, {
        let attempts = Arc::clone(&attempts);
        move || {
            assert!(attempts.fetch_add(1, Ordering::SeqCst) >= 2, "not yet");
            Counter::default()
        }
    });
    let count = loop {
        match counter.ask(Add(1), DEADLINE).await {
            Ok(count) => break count,
            Err(AskError::Restarting(_)) => {}
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(count, 1);
    assert_eq!(counter.restarts(), 2);
}

#[tokio::test]
async fn stop_is_for_good() {
    let counter = Supervised::spawn("counter", 3, Counter::default);
    assert_eq!(counter.ask(Add(1), DEADLINE).await, Ok(1));
    counter.stop();
    tokio::time::timeout(DEADLINE, counter.stopped()).await.unwrap();
    assert!(counter.is_stopped());
    assert_eq!(counter.ask(Add(1), DEADLINE).await, Err(AskError::Closed("counter")));
    assert_eq!(counter.try_tell(Add(3)).unwrap_err().0.0, 3);
    assert_eq!(counter.restarts(), 0);
}

#[tokio::test]
async fn stop_ends_a_pause_between_lives() {
    let forever = Duration::from_secs(3600);
    let backoff = Backoff { first: forever, max: forever, healthy_after: forever };
    let counter = Supervised::spawn_with("counter", 3, backoff, Counter::default);
    assert_eq!(counter.ask(Fail, DEADLINE).await, Err(AskError::Restarting("counter")));
    counter.stop();
    tokio::time::timeout(DEADLINE, counter.stopped()).await.unwrap();
    assert_eq!(counter.ask(Add(1), DEADLINE).await, Err(AskError::Closed("counter")));
}

/// Ticks for ever, so that it never ends by itself, and tells when its thread ends.
struct Ticker;

impl Actor for Ticker {
    type Context = Context<Self>;
    fn started(&mut self, context: &mut Self::Context) {
        context.run_interval(Duration::from_millis(1), |_, _| {});
    }
}

struct TellsOnDrop(Mutex<mpsc::Sender<()>>);

impl Drop for TellsOnDrop {
    fn drop(&mut self) {
        let _ = self.0.lock().unwrap().send(());
    }
}

thread_local!(static THREAD_END: std::cell::RefCell<Option<TellsOnDrop>> = const { std::cell::RefCell::new(None) });

#[test]
fn dropping_all_handles_ends_the_thread() {
    let (tx, ended) = mpsc::channel();
    let tx = Mutex::new(tx);
    let ticker = Supervised::spawn("ticker", 3, move || {
        let tells = TellsOnDrop(Mutex::new(tx.lock().unwrap().clone()));
        THREAD_END.with(|end| *end.borrow_mut() = Some(tells));
        Ticker
    });
    let (other, weak) = (ticker.clone(), ticker.downgrade());
    drop(ticker);
    assert_eq!(ended.recv_timeout(Duration::from_millis(50)), Err(mpsc::RecvTimeoutError::Timeout));
    assert!(weak.upgrade().is_some());
    drop(other);
    ended.recv_timeout(DEADLINE).expect("the thread must end");
    assert!(weak.upgrade().is_none());
}
