//! Asking the replicas: for their load, and whether they work.
//!
//! They are asked outside the actor, whose context would poll every future that it holds at each wake; what comes at
//! the same time comes back in one piece.
use super::ReplicaTable;
use crate::canary;
use crate::metrics;
use crate::news::News;
use crate::replica::{State, TRANSIT};
use actix::{AsyncContext, Context, Handler, Message, StreamHandler};
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use moesaic_types::boundary::{Replica, ReplicaLoad};
use moesaic_types::{Error, ReplicaId, Result};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Replicas that are asked for their load at the same time; others have their turn later in the interval, so that the
/// answers do not all come at once.
const AT_ONCE: usize = 64;

/// A replica that is asked.
type Asked = (ReplicaId, Arc<dyn Replica>);

/// What a replica answered.
pub(super) enum Answer {
    /// When it was asked at this time.
    Load(Asked, Result<ReplicaLoad>, Instant),
    Canary(Asked, canary::Outcome),
}

impl ReplicaTable {
    /// Asks every replica that is not being asked and may be, in turn over the interval, and looks after who waits.
    pub(super) fn poll(&mut self, context: &mut Context<Self>) {
        self.ask_new();
        let all: Vec<ReplicaId> = self.reached.keys().cloned().collect();
        let (interval, slices) = (self.parts.config.poll_interval.get(), all.len().div_ceil(AT_ONCE) as u32);
        for (at, slice) in all.chunks(AT_ONCE).enumerate() {
            if at == 0 {
                self.ask(slice);
            } else {
                let slice = slice.to_vec();
                context.run_later(interval * at as u32 / slices, move |table, _| table.ask(&slice));
            }
        }
        self.send_canaries();
        self.dismiss();
        self.advance();
        self.count_ready();
    }

    /// Asks those at once of which nothing is known.
    pub(super) fn ask_new(&mut self) {
        self.read_registrations();
        let new = self.table.replicas().iter().filter(|(_, entry)| entry.state == State::Unknown);
        let new: Vec<ReplicaId> = new.map(|(id, _)| id.clone()).collect();
        self.ask(&new);
    }

    /// Asks those of these replicas for their load that are not being asked and may be.
    fn ask(&mut self, ids: &[ReplicaId]) {
        let now = Instant::now();
        let may_be_asked =
            |id: &&ReplicaId| self.table.replicas().get(*id).is_some_and(|entry| entry.may_be_asked(now));
        let mut asked: Vec<Asked> = Vec::new();
        for id in ids.iter().filter(may_be_asked) {
            if let Some(reached) = self.reached.get_mut(id).filter(|reached| !reached.is_polled) {
                reached.is_polled = true;
                asked.push((id.clone(), Arc::clone(&reached.replica)));
            }
        }
        if asked.is_empty() {
            return;
        }
        let (answers, timeout) = (self.answers.clone(), self.parts.config.poll_timeout.get());
        self.parts.runtime.spawn(async move {
            let asking = asked.into_iter().map(|asked| ask_load(asked, timeout)).collect::<FuturesUnordered<_>>();
            let mut answered = asking.ready_chunks(AT_ONCE);
            while let Some(answered) = answered.next().await {
                if answers.send(answered).await.is_err() {
                    // closed with the actor, which asks anew in its next life
                    return;
                }
            }
        });
    }

    fn reached_as(&mut self, (id, replica): &Asked) -> Option<&mut super::Reached> {
        self.reached.get_mut(id).filter(|reached| Arc::ptr_eq(&reached.replica, replica))
    }

    fn answered(&mut self, answer: Answer, context: &mut Context<Self>) {
        match answer {
            // It may have been replaced meanwhile.
            Answer::Load(asked, load, at) => {
                if let Some(reached) = self.reached_as(&asked) {
                    reached.is_polled = false;
                    self.heard(&asked.0, load, at, context);
                }
            }
            Answer::Canary(asked, outcome) => {
                if self.reached_as(&asked).is_some() {
                    self.canary_returned(&asked.0, &outcome);
                }
            }
        }
    }

    /// A replica told its load, or failed to. Whoever calls this [advances](Self::advance) the line, once for all that
    /// was heard.
    fn heard(&mut self, id: &ReplicaId, load: Result<ReplicaLoad>, told: Instant, context: &mut Context<Self>) {
        let failure = load.as_ref().err().cloned();
        if self.table.heard(id, load, told, Instant::now()) {
            match failure {
                Some(error) => tracing::warn!(replica = %id, %error, "replica is not ready"),
                None => tracing::info!(replica = %id, "replica is back"),
            }
        }
        self.send_canary_if_due(id);
        self.recheck_if_due(id, context);
    }

    /// What is on its way to a replica is counted there soon, and may leave room for who waits: it is asked then. Once,
    /// however many loads it tells meanwhile.
    fn recheck_if_due(&mut self, id: &ReplicaId, context: &mut Context<Self>) {
        let is_uncertain = self.table.replicas().get(id).is_some_and(|entry| entry.recent.fresh().requests > 0);
        if self.table.waiting() == 0 || !is_uncertain {
            return;
        }
        let Some(reached) = self.reached.get_mut(id).filter(|reached| !reached.is_recheck_due) else { return };
        reached.is_recheck_due = true;
        let id = id.clone();
        context.run_later(TRANSIT, move |table, _| {
            if let Some(reached) = table.reached.get_mut(&id) {
                reached.is_recheck_due = false;
            }
            table.ask(&[id]);
        });
    }

    /// Advances the line once all is taken in that was told meanwhile.
    fn advance_soon(&mut self, context: &mut Context<Self>) {
        if !self.is_advance_due && self.table.waiting() > 0 {
            self.is_advance_due = true;
            context.notify(Advance);
        }
    }

    fn send_canaries(&mut self) {
        for id in self.reached.keys().cloned().collect::<Vec<_>>() {
            self.send_canary_if_due(&id);
        }
    }

    fn send_canary_if_due(&mut self, id: &ReplicaId) {
        let Some(interval) = self.parts.canary_interval else { return };
        let now = Instant::now();
        if self.table.replicas().get(id).is_some_and(|entry| canary::is_due(entry, interval, now)) {
            self.send_canary(id);
        }
    }

    fn send_canary(&mut self, id: &ReplicaId) {
        let Some(replica) = self.reached.get(id).map(|reached| Arc::clone(&reached.replica)) else { return };
        if let Some(entry) = self.table.replica_mut(id) {
            entry.check.is_running = true;
        }
        let (id, answers, timeout) = (id.clone(), self.answers.clone(), self.parts.config.canary_timeout.get());
        self.parts.runtime.spawn(async move {
            let sent = AssertUnwindSafe(canary::send(&id, &*replica, timeout)).catch_unwind().await;
            let outcome = sent.unwrap_or_else(|_| canary::Outcome::Failed(panicked()));
            // closed with the actor, which sends another in its next life
            let _ = answers.send(vec![Answer::Canary((id, replica), outcome)]).await;
        });
    }

    fn canary_returned(&mut self, id: &ReplicaId, outcome: &canary::Outcome) {
        let now = Instant::now();
        let Some(entry) = self.table.replica_mut(id) else { return };
        let was_ready = entry.is_ready(now);
        canary::returned(entry, outcome, now);
        let is_ready = entry.is_ready(now);
        metrics::canary(outcome);
        match outcome {
            canary::Outcome::Works(token) => {
                self.tell(News::Works { replica: id.clone() });
                if let Some(majority) = canary::disagrees_with(self.table.replicas(), id) {
                    metrics::canary_disagrees();
                    tracing::warn!(replica = %id, token, majority, "a canary's answer is not that of the other replicas");
                }
            }
            canary::Outcome::Failed(error) => {
                tracing::warn!(replica = %id, %error, was_ready, "a canary did not return")
            }
            canary::Outcome::Unclear(error) => tracing::debug!(replica = %id, %error, "a canary was refused"),
        }
        if is_ready && !was_ready {
            tracing::info!(replica = %id, "replica works again");
        }
    }
}

async fn ask_load((id, replica): Asked, timeout: Duration) -> Answer {
    let asked = Instant::now();
    let load = tokio::time::timeout(timeout, AssertUnwindSafe(async { replica.load().await }).catch_unwind()).await;
    let load = match load {
        Ok(Ok(load)) => load,
        Ok(Err(_)) => Err(panicked()),
        Err(_) => Err(Error::unavailable("the replica does not say its load")),
    };
    Answer::Load((id, replica), load, asked)
}

fn panicked() -> Error {
    Error::internal("this replica's client panicked")
}

impl StreamHandler<Vec<Answer>> for ReplicaTable {
    fn handle(&mut self, answers: Vec<Answer>, context: &mut Context<Self>) {
        answers.into_iter().for_each(|answer| self.answered(answer, context));
        self.advance();
    }
}

/// The line is to be looked at, for what was told.
#[derive(Message)]
#[rtype(result = "()")]
struct Advance;

impl Handler<Advance> for ReplicaTable {
    type Result = ();

    fn handle(&mut self, _: Advance, _: &mut Context<Self>) {
        self.is_advance_due = false;
        self.advance();
    }
}

/// Something was told on the bus.
#[derive(Message)]
#[rtype(result = "()")]
pub enum Heard {
    /// A replica told its load, at this time.
    Load(ReplicaId, ReplicaLoad, Instant),
    /// Another router told this.
    News(News),
}

impl Handler<Heard> for ReplicaTable {
    type Result = ();

    fn handle(&mut self, heard: Heard, context: &mut Context<Self>) {
        let now = Instant::now();
        match heard {
            Heard::Load(id, load, told) => {
                // one that fails when it is asked is not believed because it talks
                let believed = self.table.replicas().get(&id).is_some_and(|entry| entry.is_heard(now));
                if believed {
                    self.heard(&id, Ok(load), told, context);
                    self.advance_soon(context);
                }
            }
            Heard::News(News::Placed { replica, blocks }) => {
                if let Some(entry) = self.table.replica_mut(&replica) {
                    entry.recent.add(now, blocks);
                }
            }
            Heard::News(News::Works { replica }) => {
                if let Some(entry) = self.table.replica_mut(&replica) {
                    entry.works_elsewhere(now);
                }
            }
        }
    }
}
