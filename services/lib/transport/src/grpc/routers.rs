//! All routers of a cluster as one: any of them can place a request.
use super::GrpcPlacer;
use crate::channel::channel;
use crate::membership::{Clients, Directory};
use futures::future::{BoxFuture, FutureExt};
use moesaic_types::boundary::{PlaceRequest, Placed, Placer};
use moesaic_types::{Error, ErrorCode, ReplicaId, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Routers that are asked for one request at most.
const TRIES: usize = 3;

/// The routers that a directory shows. They are asked in turn; one that is unavailable is passed over. A request waits in
/// line at one router: when that is lost, it stands at the end of another's line.
pub struct Routers {
    clients: Clients<GrpcPlacer>,
    turn: AtomicUsize,
}

impl Routers {
    /// Routers of a directory.
    pub fn new(directory: Directory) -> Self {
        let make = |member: &_| Ok(GrpcPlacer::new(&name(member), channel(member)?));
        Self { clients: Clients::new(directory, make), turn: AtomicUsize::new(0) }
    }

    /// Asks routers until one answers, or refuses for a reason that would be the same at another.
    async fn ask<T>(&self, ask: impl Fn(GrpcPlacer) -> BoxFuture<'static, Result<T>> + Send) -> Result<T> {
        let view = self.clients.directory().view();
        let ready: Vec<Arc<str>> = view.ready().map(|record| Arc::clone(&record.member.id)).collect();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let mut refusal = Error::unavailable(format!("no router is ready ({} known)", view.members.len()));
        for id in in_turn(&ready, turn).take(TRIES).cloned().collect::<Vec<_>>() {
            let Some(router) = self.clients.get(&id) else { continue };
            match ask(router).await {
                Err(error) if error.code == ErrorCode::Unavailable => refusal = error,
                answer => return answer,
            }
        }
        Err(refusal)
    }
}

fn name(member: &moesaic_types::cluster::Member) -> String {
    format!("{} {}", member.service, member.id)
}

/// All items, from that of the turn on.
fn in_turn<T>(items: &[T], turn: usize) -> impl Iterator<Item = &T> {
    let first = turn.checked_rem(items.len()).unwrap_or(0);
    items.iter().cycle().skip(first).take(items.len())
}

impl Placer for Routers {
    fn place(&self, request: PlaceRequest) -> BoxFuture<'_, Result<Placed>> {
        let place = move |router: GrpcPlacer| {
            let request = request.clone();
            async move { router.place(request).await }.boxed()
        };
        self.ask(place).boxed()
    }

    fn ready(&self) -> BoxFuture<'_, Result<Vec<ReplicaId>>> {
        self.ask(|router| async move { router.ready().await }.boxed()).boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_turn_starts_with_another_and_has_all() {
        let turn = |turn| in_turn(&["a", "b", "c"], turn).copied().collect::<String>();
        assert_eq!([turn(0), turn(1), turn(2), turn(3)], ["abc", "bca", "cab", "abc"]);
        assert_eq!(in_turn(&[0; 0], 5).count(), 0);
    }
}
