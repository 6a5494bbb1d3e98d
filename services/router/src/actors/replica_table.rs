//! Owns what is known of the replicas: load, readiness, failures, and the line of requests that wait for one. Polls
//! loads, hears them told, and sends canaries.
//!
//! Which replicas there are is [`Registrations`], outside the actor: a restart reads it and asks each for its load. Those
//! who waited in line ask again.
mod asking;
mod line;
mod registrations;

pub use asking::Heard;
pub use line::{Choose, Chosen};
pub use registrations::{Registered, Registrations};

use crate::actors::prefix_index::Index;
use crate::config::Config;
use crate::metrics;
use crate::news::News;
use crate::policy::Fresh;
use crate::replica::State;
use crate::table::Table;
use actix::{Actor, AsyncContext, Context, Handler, Message, MessageResult};
use asking::Answer;
use futures::stream;
use line::Reply;
use moesaic_types::boundary::{Replica, ReplicaLoad};
use moesaic_types::{ReplicaId, Result};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime;
use tokio::sync::mpsc;

/// Pieces of answers that wait for the actor at most; further ones wait where the replicas are asked.
const ANSWERS: usize = 64;

/// What the actor works with.
#[derive(Clone)]
pub struct Parts {
    /// Settings.
    pub config: Arc<Config>,
    /// The replicas.
    pub registrations: Registrations,
    /// Knows who has which blocks.
    pub index: Index,
    /// To the other routers.
    pub news: mpsc::Sender<News>,
    /// Where replicas are asked.
    pub runtime: runtime::Handle,
    /// How often this router sends a canary to a replica without work.
    pub canary_interval: Option<Duration>,
}

/// The actor's state.
pub struct ReplicaTable {
    parts: Parts,
    table: Table<Reply>,
    /// To ask the replicas of the table.
    reached: HashMap<ReplicaId, Reached>,
    /// The version of the registrations that were read.
    read: u64,
    /// The line is looked at once all is taken in that was told.
    is_advance_due: bool,
    /// From the tasks that ask replicas.
    answers: mpsc::Sender<Vec<Answer>>,
    /// The other end, until the actor starts.
    answered: Option<mpsc::Receiver<Vec<Answer>>>,
}

struct Reached {
    replica: Arc<dyn Replica>,
    /// It is being asked for its load.
    is_polled: bool,
    /// It is asked again soon, for those who wait.
    is_recheck_due: bool,
}

/// What is known of a replica.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// The replica.
    pub id: ReplicaId,
    /// Whether requests go there.
    pub ready: bool,
    /// Its load when it was last told; the error if it failed; `None` before its first answer.
    pub load: Option<Result<ReplicaLoad>>,
    /// What was placed there and may not be in its load yet.
    pub fresh: Fresh,
}

impl ReplicaTable {
    /// Fresh state: the registered replicas, of which nothing is known.
    pub fn new(parts: Parts) -> Self {
        let table = Table::new(parts.config.rules());
        let (answers, answered) = mpsc::channel(ANSWERS);
        let mut this = Self {
            parts,
            table,
            reached: HashMap::new(),
            read: 0,
            is_advance_due: false,
            answers,
            answered: Some(answered),
        };
        this.read_registrations();
        this
    }

    fn read_registrations(&mut self) {
        let Some((version, registered)) = self.parts.registrations.since(self.read) else { return };
        self.read = version;
        self.reached.retain(|id, reached| {
            let stays = registered.get(id).is_some_and(|now| Arc::ptr_eq(&now.replica, &reached.replica));
            if !stays {
                self.table.remove(id);
            }
            stays
        });
        for (id, Registered { replica, model }) in registered {
            if !self.reached.contains_key(&id) {
                self.table.add(id.clone(), model);
                self.reached.insert(id, Reached { replica, is_polled: false, is_recheck_due: false });
            }
        }
    }

    fn count_ready(&self) {
        let now = Instant::now();
        metrics::replicas_ready(self.table.replicas().values().filter(|entry| entry.is_ready(now)).count());
    }

    /// Tells the other routers; what they miss they learn from the replicas, a little later.
    fn tell(&self, news: News) {
        let _ = self.parts.news.try_send(news);
    }
}

impl Actor for ReplicaTable {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Context<Self>) {
        metrics::line(self.table.waiting());
        if let Some(mut answered) = self.answered.take() {
            context.add_stream(stream::poll_fn(move |task| answered.poll_recv(task)));
        }
        self.poll(context);
        context.run_interval(self.parts.config.poll_interval.get(), Self::poll);
    }
}

/// The registrations changed.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Refresh;

impl Handler<Refresh> for ReplicaTable {
    type Result = ();

    fn handle(&mut self, _: Refresh, _: &mut Context<Self>) {
        self.ask_new();
        self.advance();
    }
}

/// The replicas that requests may go to.
#[derive(Message)]
#[rtype(result = "Result<Vec<ReplicaId>>")]
pub struct Ready;

impl Handler<Ready> for ReplicaTable {
    type Result = Result<Vec<ReplicaId>>;

    fn handle(&mut self, _: Ready, _: &mut Context<Self>) -> Self::Result {
        self.read_registrations();
        self.table.ready(Instant::now())
    }
}

/// What is known of each replica.
#[derive(Message)]
#[rtype(result = "Vec<Status>")]
pub struct Statuses;

impl Handler<Statuses> for ReplicaTable {
    type Result = MessageResult<Statuses>;

    fn handle(&mut self, _: Statuses, _: &mut Context<Self>) -> Self::Result {
        let now = Instant::now();
        let statuses = self.table.replicas().iter().map(|(id, entry)| Status {
            id: id.clone(),
            ready: entry.is_ready(now),
            load: match &entry.state {
                State::Unknown => None,
                State::Ready(load) => Some(Ok(load.clone())),
                State::Failed(error) => Some(Err(error.clone())),
            },
            fresh: entry.recent.fresh(),
        });
        MessageResult(statuses.collect())
    }
}

/// How many requests stand in line.
#[derive(Message)]
#[rtype(result = "usize")]
pub struct InLine;

impl Handler<InLine> for ReplicaTable {
    type Result = usize;

    fn handle(&mut self, _: InLine, _: &mut Context<Self>) -> usize {
        self.table.waiting()
    }
}
