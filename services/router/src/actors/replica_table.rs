//! Owns what is known of the replicas: load, readiness, failures. Polls their load.
//!
//! Which replicas there are is [`Registrations`], outside the actor: a restart reads it and asks each for its load.
use crate::breaker::Breaker;
use crate::config::Config;
use crate::metrics;
use crate::policy::{self, Candidate};
use actix::{Actor, ActorFutureExt, AsyncContext, Context, Handler, Message, MessageResult};
use moesaic_types::boundary::{Placed, Replica, ReplicaLoad};
use moesaic_types::{BLOCK_TOKENS, Digest, Error, ReplicaId, Result};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// A replica as it was registered.
#[derive(Clone)]
pub struct Registered {
    /// The replica.
    pub replica: Arc<dyn Replica>,
    /// The model that it serves, as it serves it; `None`: whatever is asked for.
    pub model: Option<Digest>,
}

/// The replicas that there are, whatever becomes of the actor.
#[derive(Clone, Default)]
pub struct Registrations(Arc<Mutex<BTreeMap<ReplicaId, Registered>>>);

impl Registrations {
    /// Adds a replica, or replaces it.
    pub fn insert(&self, id: ReplicaId, registered: Registered) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(id, registered);
    }

    /// Takes a replica out; whether it was there.
    pub fn remove(&self, id: &ReplicaId) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(id).is_some()
    }

    /// A replica.
    pub fn get(&self, id: &ReplicaId) -> Option<Arc<dyn Replica>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(id).map(|found| found.replica.clone())
    }

    fn all(&self) -> BTreeMap<ReplicaId, Registered> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The actor's state.
pub struct ReplicaTable {
    config: Arc<Config>,
    registrations: Registrations,
    replicas: BTreeMap<ReplicaId, Entry>,
    turn: usize,
}

struct Entry {
    replica: Arc<dyn Replica>,
    model: Option<Digest>,
    state: State,
    breaker: Breaker,
    polling: bool,
    placed_requests: usize,
    placed_blocks: usize,
}

enum State {
    /// Not heard of yet: taken for ready, since a request that it refuses goes elsewhere.
    Unknown,
    Ready(ReplicaLoad),
    Failed(Error),
}

/// What is known of a replica.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// The replica.
    pub id: ReplicaId,
    /// Whether requests go there.
    pub ready: bool,
    /// Its load when it was last asked; the error if it failed; `None` before its first answer.
    pub load: Option<Result<ReplicaLoad>>,
}

impl ReplicaTable {
    /// Fresh state: the registered replicas, of which nothing is known.
    pub fn new(config: Arc<Config>, registrations: Registrations) -> Self {
        let mut table = Self { config, registrations, replicas: BTreeMap::new(), turn: 0 };
        table.read_registrations();
        table
    }

    fn read_registrations(&mut self) {
        let registered = self.registrations.all();
        self.replicas
            .retain(|id, entry| registered.get(id).is_some_and(|now| Arc::ptr_eq(&now.replica, &entry.replica)));
        for (id, Registered { replica, model }) in registered {
            self.replicas.entry(id).or_insert_with(|| Entry {
                replica,
                model,
                state: State::Unknown,
                breaker: Breaker::new(self.config.breaker_failures, self.config.breaker_pause.get()),
                polling: false,
                placed_requests: 0,
                placed_blocks: 0,
            });
        }
    }

    /// Asks every replica that is not being asked and may be.
    fn poll(&mut self, context: &mut Context<Self>) {
        self.read_registrations();
        let (now, timeout) = (Instant::now(), self.config.poll_timeout.get());
        for (id, entry) in self.replicas.iter_mut().filter(|(_, entry)| !entry.polling && entry.breaker.allows(now)) {
            entry.polling = true;
            let (id, replica) = (id.clone(), Arc::clone(&entry.replica));
            let asked = async move {
                let load = tokio::time::timeout(timeout, replica.load()).await;
                let load = load.unwrap_or_else(|_| Err(Error::unavailable("the replica does not say its load")));
                (id, replica, load)
            };
            context.spawn(
                actix::fut::wrap_future::<_, Self>(asked)
                    .map(|(id, replica, load), table, _| table.heard(&id, &replica, load)),
            );
        }
        self.count_ready();
    }

    fn heard(&mut self, id: &ReplicaId, replica: &Arc<dyn Replica>, load: Result<ReplicaLoad>) {
        // It may have been replaced meanwhile.
        let Some(entry) = self.replicas.get_mut(id).filter(|entry| Arc::ptr_eq(&entry.replica, replica)) else {
            return;
        };
        entry.polling = false;
        match load {
            Ok(load) => {
                if let State::Failed(_) = entry.state {
                    tracing::info!(replica = %id, "replica is back");
                }
                entry.breaker.succeeded(Instant::now());
                entry.state = State::Ready(load);
                (entry.placed_requests, entry.placed_blocks) = (0, 0);
            }
            Err(error) => {
                if !matches!(entry.state, State::Failed(_)) {
                    tracing::warn!(replica = %id, %error, "replica is not ready");
                }
                entry.breaker.failed(Instant::now());
                entry.state = State::Failed(error);
            }
        }
        self.count_ready();
    }

    fn count_ready(&self) {
        let now = Instant::now();
        metrics::replicas_ready(self.replicas.values().filter(|entry| entry.is_ready(now)).count());
    }
}

impl Entry {
    fn is_ready(&self, now: Instant) -> bool {
        !matches!(self.state, State::Failed(_)) && self.breaker.allows(now)
    }

    fn serves(&self, model: Option<Digest>) -> bool {
        self.model.zip(model).is_none_or(|(own, asked)| own == asked)
    }

    fn load(&self) -> ReplicaLoad {
        match &self.state {
            State::Ready(load) => load.clone(),
            State::Unknown | State::Failed(_) => ReplicaLoad::default(),
        }
    }
}

impl Actor for ReplicaTable {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Context<Self>) {
        self.poll(context);
        context.run_interval(self.config.poll_interval.get(), Self::poll);
    }
}

/// The registrations changed.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Refresh;

impl Handler<Refresh> for ReplicaTable {
    type Result = ();

    fn handle(&mut self, _: Refresh, context: &mut Context<Self>) {
        self.poll(context);
    }
}

/// Chooses a replica for a request and remembers it there.
#[derive(Message)]
#[rtype(result = "Result<Placed>")]
pub struct Choose {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// Replicas that did not take this request, or failed it, the latest last.
    pub exclude: Vec<ReplicaId>,
    /// The latest of them had no room, which is no failure.
    pub latest_was_full: bool,
    /// The model as it is served; `None`: any.
    pub model: Option<Digest>,
    /// Blocks of the prompt that replicas are believed to have.
    pub overlap: HashMap<ReplicaId, usize>,
}

impl Handler<Choose> for ReplicaTable {
    type Result = Result<Placed>;

    fn handle(&mut self, choose: Choose, _: &mut Context<Self>) -> Self::Result {
        self.read_registrations();
        let now = Instant::now();
        // The others of the list were counted when they were the latest.
        let latest = choose.exclude.last().filter(|_| !choose.latest_was_full);
        if let Some(entry) = latest.and_then(|id| self.replicas.get_mut(id)) {
            entry.breaker.failed(now);
        }
        let may_take = |(id, entry): &(&ReplicaId, &Entry)| {
            entry.is_ready(now) && entry.serves(choose.model) && !choose.exclude.contains(id)
        };
        let ready: Vec<(&ReplicaId, &Entry)> = self.replicas.iter().filter(may_take).collect();
        // A prompt that fits nowhere goes anywhere: the replica's refusal names the limit.
        let fits = |entry: &Entry| {
            let limit = entry.load().max_context;
            limit == 0 || choose.prompt_tokens < limit
        };
        let some_fit = ready.iter().any(|(_, entry)| fits(entry));
        let (ids, candidates): (Vec<ReplicaId>, Vec<Candidate>) = ready
            .into_iter()
            .filter(|(_, entry)| !some_fit || fits(entry))
            .map(|(id, entry)| {
                let candidate = Candidate {
                    load: entry.load(),
                    placed_requests: entry.placed_requests,
                    placed_blocks: entry.placed_blocks,
                    overlap_blocks: choose.overlap.get(id).copied().unwrap_or(0),
                };
                (id.clone(), candidate)
            })
            .unzip();
        let weights = self.config.weights();
        let chosen = policy::choose(self.config.policy, &weights, choose.prompt_tokens, &candidates, self.turn);
        self.turn = self.turn.wrapping_add(1);
        let Some(chosen) = chosen else {
            metrics::refused();
            return Err(self.nobody(&choose.exclude, choose.model));
        };
        let placed = Placed { replica: ids[chosen].clone(), overlap_blocks: candidates[chosen].overlap_blocks };
        if let Some(entry) = self.replicas.get_mut(&placed.replica) {
            entry.placed_requests += 1;
            // Not all that may be generated will be; a block is what a short answer needs.
            let blocks = choose.prompt_tokens.div_ceil(BLOCK_TOKENS) + choose.max_tokens.div_ceil(BLOCK_TOKENS).min(1);
            entry.placed_blocks += blocks.saturating_sub(placed.overlap_blocks);
        }
        metrics::placed(&placed);
        Ok(placed)
    }
}

impl ReplicaTable {
    fn nobody(&self, exclude: &[ReplicaId], model: Option<Digest>) -> Error {
        let failure = self.replicas.iter().find_map(|(id, entry)| match &entry.state {
            State::Failed(error) => Some(format!("; {id}: {error}")),
            State::Unknown | State::Ready(_) => None,
        });
        let tried = exclude.iter().filter(|id| self.replicas.contains_key(id)).count();
        let others = match self.replicas.values().filter(|entry| !entry.serves(model)).count() {
            0 => String::new(),
            others => format!(", {others} with another model"),
        };
        let (count, failure) = (self.replicas.len(), failure.unwrap_or_default());
        Error::unavailable(format!("no replica is ready ({count} known, {tried} tried{others}){failure}"))
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
        let now = Instant::now();
        let ready = self.replicas.iter().filter(|(_, entry)| entry.is_ready(now)).map(|(id, _)| id.clone());
        Some(ready.collect::<Vec<_>>()).filter(|ready| !ready.is_empty()).ok_or_else(|| self.nobody(&[], None))
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
        let status = |(id, entry): (&ReplicaId, &Entry)| Status {
            id: id.clone(),
            ready: entry.is_ready(now),
            load: match &entry.state {
                State::Unknown => None,
                State::Ready(load) => Some(Ok(load.clone())),
                State::Failed(error) => Some(Err(error.clone())),
            },
        };
        MessageResult(self.replicas.iter().map(status).collect())
    }
}
