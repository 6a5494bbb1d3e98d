//! Asking the replicas: for their load, and whether they work.
use super::ReplicaTable;
use crate::canary;
use crate::metrics;
use crate::news::News;
use crate::replica::TRANSIT;
use actix::{ActorFutureExt, AsyncContext, Context, Handler, Message};
use moesaic_types::boundary::{Replica, ReplicaLoad};
use moesaic_types::{Error, ReplicaId, Result};
use std::sync::Arc;
use std::time::Instant;

impl ReplicaTable {
    /// Asks every replica that is not being asked and may be, and looks after who waits.
    pub(super) fn poll(&mut self, context: &mut Context<Self>) {
        self.read_registrations();
        let now = Instant::now();
        let may_be_asked =
            |id: &&ReplicaId| self.table.replicas().get(*id).is_some_and(|entry| entry.may_be_asked(now));
        for id in self.reached.keys().filter(may_be_asked).cloned().collect::<Vec<_>>() {
            self.ask_load(&id, context);
        }
        self.send_canaries(context);
        self.dismiss();
        self.advance(context);
        self.count_ready();
    }

    fn ask_load(&mut self, id: &ReplicaId, context: &mut Context<Self>) {
        let Some(reached) = self.reached.get_mut(id).filter(|reached| !reached.is_polled) else { return };
        reached.is_polled = true;
        let (id, replica, asked) = (id.clone(), Arc::clone(&reached.replica), Instant::now());
        let timeout = self.parts.config.poll_timeout.get();
        let asking = async move {
            let load = tokio::time::timeout(timeout, replica.load()).await;
            let load = load.unwrap_or_else(|_| Err(Error::unavailable("the replica does not say its load")));
            (id, replica, load)
        };
        let heard = actix::fut::wrap_future::<_, Self>(asking).map(move |(id, replica, load), table, context| {
            // It may have been replaced meanwhile.
            if let Some(reached) = table.reached_as(&id, &replica) {
                reached.is_polled = false;
                table.heard(&id, load, asked, context);
            }
        });
        context.spawn(heard);
    }

    fn reached_as(&mut self, id: &ReplicaId, replica: &Arc<dyn Replica>) -> Option<&mut super::Reached> {
        self.reached.get_mut(id).filter(|reached| Arc::ptr_eq(&reached.replica, replica))
    }

    fn heard(&mut self, id: &ReplicaId, load: Result<ReplicaLoad>, told: Instant, context: &mut Context<Self>) {
        let failure = load.as_ref().err().cloned();
        if self.table.heard(id, load, told, Instant::now()) {
            match failure {
                Some(error) => tracing::warn!(replica = %id, %error, "replica is not ready"),
                None => tracing::info!(replica = %id, "replica is back"),
            }
        }
        self.send_canary_if_due(id, context);
        self.advance(context);
        self.recheck_if_due(id, context);
        self.count_ready();
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
        context.run_later(TRANSIT, move |table, context| {
            if let Some(reached) = table.reached.get_mut(&id) {
                reached.is_recheck_due = false;
            }
            table.ask_load(&id, context);
        });
    }

    fn send_canaries(&mut self, context: &mut Context<Self>) {
        for id in self.reached.keys().cloned().collect::<Vec<_>>() {
            self.send_canary_if_due(&id, context);
        }
    }

    fn send_canary_if_due(&mut self, id: &ReplicaId, context: &mut Context<Self>) {
        let Some(interval) = self.parts.canary_interval else { return };
        let now = Instant::now();
        if self.table.replicas().get(id).is_some_and(|entry| canary::is_due(entry, interval, now)) {
            self.send_canary(id, context);
        }
    }

    fn send_canary(&mut self, id: &ReplicaId, context: &mut Context<Self>) {
        let Some(replica) = self.reached.get(id).map(|reached| Arc::clone(&reached.replica)) else { return };
        if let Some(entry) = self.table.replica_mut(id) {
            entry.check.is_running = true;
        }
        let (id, timeout) = (id.clone(), self.parts.config.canary_timeout.get());
        let asking = async move {
            let outcome = canary::send(&id, &*replica, timeout).await;
            (id, replica, outcome)
        };
        let answered = actix::fut::wrap_future::<_, Self>(asking).map(|(id, replica, outcome), table, context| {
            if table.reached_as(&id, &replica).is_some() {
                table.canary_returned(&id, outcome, context);
            }
        });
        context.spawn(answered);
    }

    fn canary_returned(&mut self, id: &ReplicaId, outcome: canary::Outcome, context: &mut Context<Self>) {
        let now = Instant::now();
        let Some(entry) = self.table.replica_mut(id) else { return };
        let was_ready = entry.is_ready(now);
        canary::returned(entry, &outcome, now);
        let is_ready = entry.is_ready(now);
        metrics::canary(&outcome);
        match &outcome {
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
        self.advance(context);
        self.count_ready();
    }
}

/// Something was told on the bus.
#[derive(Message)]
#[rtype(result = "()")]
pub enum Heard {
    /// A replica told its load.
    Load(ReplicaId, ReplicaLoad),
    /// Another router told this.
    News(News),
}

impl Handler<Heard> for ReplicaTable {
    type Result = ();

    fn handle(&mut self, heard: Heard, context: &mut Context<Self>) {
        let now = Instant::now();
        match heard {
            Heard::Load(id, load) => {
                // one that fails when it is asked is not believed because it talks
                let believed = self.table.replicas().get(&id).is_some_and(|entry| entry.is_heard(now));
                if believed {
                    self.heard(&id, Ok(load), now, context);
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
