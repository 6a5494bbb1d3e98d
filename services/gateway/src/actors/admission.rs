//! Decides who comes in: a bounded number of requests at a time.
use actix::{Actor, Context, Handler, Message};
use moesaic_actors::{Handle, Supervised};
use moesaic_types::{Error, ErrorCode, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Longest wait for the decision.
const DEADLINE: Duration = Duration::from_secs(2);

/// The actor's state. What is in flight is counted by the permits themselves, so it survives the actor.
struct Control {
    in_flight: Arc<AtomicUsize>,
    limit: usize,
}

impl Actor for Control {
    type Context = Context<Self>;
}

#[derive(Message)]
#[rtype(result = "Option<Permit>")]
struct Enter;

impl Handler<Enter> for Control {
    type Result = Option<Permit>;

    fn handle(&mut self, _: Enter, _: &mut Context<Self>) -> Option<Permit> {
        // this actor alone adds, so the count cannot pass the limit between look and addition
        (self.in_flight.load(Ordering::Acquire) < self.limit).then(|| Permit::new(self.in_flight.clone()))
    }
}

#[derive(Message)]
#[rtype(result = "()")]
struct Panic;

impl Handler<Panic> for Control {
    type Result = ();

    fn handle(&mut self, _: Panic, _: &mut Context<Self>) {
        panic!("a fault that a test asked for");
    }
}

/// One request's place; dropping it gives the place back.
#[derive(Debug)]
pub struct Permit {
    in_flight: Arc<AtomicUsize>,
    since: Instant,
}

impl Permit {
    fn new(in_flight: Arc<AtomicUsize>) -> Self {
        in_flight.fetch_add(1, Ordering::AcqRel);
        Self { in_flight, since: Instant::now() }
    }

    /// When the request was let in.
    pub(crate) fn since(&self) -> Instant {
        self.since
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The door's keeper; cheap to clone.
#[derive(Clone)]
pub struct Admission {
    control: Handle<Control>,
    in_flight: Arc<AtomicUsize>,
    limit: usize,
}

impl Admission {
    /// Lets `limit` requests in at a time.
    pub fn start(limit: usize) -> Self {
        let in_flight = Arc::new(AtomicUsize::new(0));
        let shared = in_flight.clone();
        let control = Supervised::spawn("admission", 4096, move || Control { in_flight: shared.clone(), limit });
        Self { control, in_flight, limit }
    }

    /// A place, or `ResourceExhausted` with a time to try again.
    ///
    /// # Errors
    /// `ResourceExhausted` when all places are taken, `Unavailable` while the actor restarts.
    pub async fn enter(&self) -> Result<Permit> {
        self.control.ask(Enter, DEADLINE).await?.ok_or_else(|| {
            let message = format!("{} requests are in flight, which is the limit (gateway.max_in_flight)", self.limit);
            Error::exhausted(message, Duration::from_secs(1))
        })
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }

    /// Makes the actor panic, for tests of its recovery.
    ///
    /// # Errors
    /// Always, with what an ask in flight gets.
    pub async fn inject_panic(&self) -> Result<()> {
        match self.control.ask(Panic, DEADLINE).await {
            Ok(()) => Err(Error::new(ErrorCode::Internal, "the actor did not panic")),
            Err(error) => Err(error.into()),
        }
    }

    /// How often the actor was built again.
    pub fn restarts(&self) -> u64 {
        self.control.restarts()
    }
}
