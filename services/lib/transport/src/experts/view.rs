//! The placement that is followed and the streams to its shards.
use super::link::Link;
use crate::channel::bulk_channel;
use crate::membership::{Directory, Peers, View as Members};
use moesaic_types::cluster::{Placement, Role};
use moesaic_types::{Digest, Error, Result};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::watch;

/// What a layer is dispatched by.
#[derive(Debug, Default)]
pub(super) struct View {
    /// The placement; `None` before the first.
    pub placement: Option<Arc<Placement>>,
    /// By group, then by rank.
    groups: BTreeMap<usize, Group>,
}

/// The shards of a group.
#[derive(Debug)]
struct Group {
    /// Slices in it.
    ranks: usize,
    links: BTreeMap<usize, Arc<Link>>,
}

impl View {
    /// The streams to a group's shards by rank, if all are open.
    ///
    /// # Errors
    /// `Unavailable` naming what is missing.
    pub fn group(&self, group: usize) -> Result<Vec<&Arc<Link>>> {
        let missing = |what: String| Error::unavailable(format!("expert group {group} {what}"));
        let Some(found) = self.groups.get(&group) else { return Err(missing("has no shard".into())) };
        (0..found.ranks)
            .map(|rank| {
                let link = found.links.get(&rank).ok_or_else(|| missing(format!("has no shard of rank {rank}")))?;
                link.is_up().map_err(|error| missing(format!("is not reached: {error}")))?;
                Ok(link)
            })
            .collect()
    }

    fn of(placement: Option<Arc<Placement>>, members: &Members, peers: &Peers<Arc<Link>>, model: Digest) -> Self {
        let mut groups: BTreeMap<usize, Group> = BTreeMap::new();
        for record in members.members.values() {
            let Role::Shard(shard) = &record.member.role else { continue };
            let Some(link) = peers.get(&record.member.id).filter(|_| shard.model == model) else { continue };
            let group =
                groups.entry(shard.group).or_insert_with(|| Group { ranks: shard.ranks, links: BTreeMap::new() });
            // a shard that takes the place of another is the later one
            group.links.insert(shard.rank, Arc::clone(link));
        }
        Self { placement, groups }
    }
}

/// Keeps the view; ends when who reads it is gone.
pub(super) async fn follow(
    directory: Directory,
    mut placement: watch::Receiver<Option<Arc<Placement>>>,
    model: Digest,
    changes: watch::Sender<u64>,
    told: watch::Sender<Arc<View>>,
) {
    let mut members = directory.watch();
    let mut peers = Peers::default();
    while !told.is_closed() {
        let (now, placed) = (members.borrow_and_update().clone(), placement.borrow_and_update().clone());
        let shards = now
            .members
            .values()
            .filter(|record| matches!(&record.member.role, Role::Shard(shard) if shard.model == model));
        peers.follow(shards, |member| {
            let peer = format!("{} {}", member.service, member.id).into();
            Ok(Arc::new(Link::open(peer, bulk_channel(member)?, changes.clone())))
        });
        told.send_replace(Arc::new(View::of(placed, &now, &peers, model)));
        changes.send_modify(|count| *count += 1);
        tokio::select! {
            Ok(()) = members.changed() => {}
            Ok(()) = placement.changed() => {}
            () = told.closed() => {}
            else => return,
        }
    }
}
