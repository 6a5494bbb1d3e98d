//! Choosing a replica for a request, now or when one has room.
use super::ReplicaTable;
use crate::metrics;
use crate::news::News;
use crate::prefixes::Prefixes;
use crate::table::Decision;
use actix::{Context, Handler, Message};
use moesaic_types::boundary::{PlaceRequest, Placed};
use moesaic_types::{Error, Result};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::oneshot;

/// Takes the answer to a request that stands in line.
pub(super) type Reply = oneshot::Sender<Result<Placed>>;

/// What a request is told at once.
pub enum Chosen {
    /// Where it goes.
    Now(Placed),
    /// It stands in line; where it goes comes when a replica has room. Where nothing comes, the actor failed.
    Later(oneshot::Receiver<Result<Placed>>),
}

/// Chooses a replica for a request and remembers it there. Dropping what comes later gives the place in line up.
#[derive(Message)]
#[rtype(result = "Result<Chosen>")]
pub struct Choose {
    /// The request.
    pub request: Arc<PlaceRequest>,
    /// It was not asked for before.
    pub is_first: bool,
    /// Who is believed to have its blocks.
    pub prefixes: Prefixes,
}

impl Handler<Choose> for ReplicaTable {
    type Result = Result<Chosen>;

    fn handle(&mut self, Choose { request, is_first, prefixes }: Choose, _: &mut Context<Self>) -> Self::Result {
        self.read_registrations();
        let now = Instant::now();
        if is_first {
            self.table.count_latest(&request, now);
        }
        match self.table.decide(&request, &prefixes, now) {
            Decision::Placed(placed) => {
                self.placed(&request, &placed);
                Ok(Chosen::Now(placed))
            }
            Decision::Refused(error) => {
                metrics::refused();
                Err(error)
            }
            Decision::Wait => {
                let (reply, later) = oneshot::channel();
                let waits = self.table.wait(request, reply, now);
                metrics::line(self.table.waiting());
                if let Some((reply, error)) = waits.inspect_err(metrics::turned_away)? {
                    turn_away(reply, error);
                }
                Ok(Chosen::Later(later))
            }
        }
    }
}

impl ReplicaTable {
    fn placed(&self, request: &PlaceRequest, placed: &Placed) {
        metrics::placed(placed);
        let blocks = crate::table::blocks_of(request).saturating_sub(placed.overlap_blocks);
        self.tell(News::Placed { replica: placed.replica.clone(), blocks });
    }

    /// Places those in line for whom replicas have room, by what is known of their prefixes now.
    pub(super) fn advance(&mut self) {
        let mut is_changed = false;
        while let Some(waiting) = self.table.next(Instant::now()) {
            let (now, since) = (Instant::now(), waiting.since);
            let request = Arc::clone(&waiting.request.request);
            is_changed = true;
            if waiting.request.reply.is_closed() {
                continue;
            }
            let (prefixes, in_line) = (self.parts.index.prefixes(&request), self.table.waiting());
            let told = |reply: Reply, placed| reply.send(Ok(placed)).is_ok();
            if let Some(placed) = self.table.bind(waiting, &prefixes, now, told) {
                metrics::waited(now.saturating_duration_since(since));
                self.placed(&request, &placed);
            } else if self.table.waiting() > in_line {
                // it was put back: its replica is no longer there
                break;
            }
        }
        if is_changed {
            metrics::line(self.table.waiting());
        }
    }

    /// Answers those whose time in line is over.
    pub(super) fn dismiss(&mut self) {
        if self.table.waiting() == 0 {
            return;
        }
        for (reply, error) in self.table.overdue(Instant::now(), Reply::is_closed) {
            if let Some(error) = error {
                turn_away(reply, error);
            }
        }
        metrics::line(self.table.waiting());
    }
}

fn turn_away(reply: Reply, error: Error) {
    metrics::turned_away(&error);
    // whoever waits no longer needs no answer
    let _: Result<(), Result<Placed, Error>> = reply.send(Err(error));
}
