//! The placement that is followed and the streams to its shards.
use super::ExpertsOptions;
use super::link::Link;
use crate::channel::bulk_channel;
use crate::membership::{Directory, Peers, View as Members};
use moesaic_types::cluster::{MemberState, Placement, Role};
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

/// The shards of a group, by rank.
#[derive(Debug, Default)]
struct Group {
    shards: BTreeMap<usize, Shard>,
}

/// One shard, and how good a choice it is for its place.
#[derive(Debug)]
struct Shard {
    /// Slices of its group, as it says.
    ranks: usize,
    /// Whether it stays, and when it came: a process that takes another's place is the later one.
    standing: (bool, u64),
    link: Arc<Link>,
}

/// Who could be asked at one moment: the groups' streams by rank, or what is missing.
#[derive(Debug)]
pub(super) struct Reach(BTreeMap<usize, Result<Vec<Arc<Link>>>>);

impl Reach {
    /// The streams to a group's shards by rank.
    ///
    /// # Errors
    /// `Unavailable` naming what is missing.
    pub fn group(&self, group: usize) -> Result<&[Arc<Link>]> {
        match self.0.get(&group) {
            Some(Ok(links)) => Ok(links),
            Some(Err(error)) => Err(error.clone()),
            None => Err(Error::unavailable(format!("expert group {group} has no shard"))),
        }
    }

    /// Whether a group can be asked.
    pub fn has(&self, group: usize) -> bool {
        matches!(self.0.get(&group), Some(Ok(_)))
    }
}

impl Group {
    fn links(&self, group: usize, epoch: u64) -> Result<Vec<Arc<Link>>> {
        let missing = |what: String| Error::unavailable(format!("expert group {group} {what}"));
        let ranks = self.shards.values().next().map_or(0, |shard| shard.ranks);
        if self.shards.values().any(|shard| shard.ranks != ranks) {
            return Err(missing("has shards that do not agree on expert_shard.ranks".into()));
        }
        let link = |rank| {
            let shard = self.shards.get(&rank).ok_or_else(|| missing(format!("has no shard of rank {rank}")))?;
            shard.link.is_up(epoch).map_err(|error| missing(format!("is not reached: {error}")))?;
            Ok(Arc::clone(&shard.link))
        };
        (0..ranks).map(link).collect()
    }
}

impl View {
    /// Who can be asked under the placement now.
    pub fn reach(&self) -> Reach {
        let epoch = self.placement.as_ref().map_or(0, |placement| placement.epoch);
        Reach(self.groups.iter().map(|(group, shards)| (*group, shards.links(*group, epoch))).collect())
    }

    fn of(placement: Option<Arc<Placement>>, members: &Members, peers: &Peers<Arc<Link>>, model: Digest) -> Self {
        let mut groups: BTreeMap<usize, Group> = BTreeMap::new();
        for record in members.members.values() {
            let Role::Shard(shard) = &record.member.role else { continue };
            let Some(link) = peers.get(&record.member.id).filter(|_| shard.model == model) else { continue };
            let standing = (record.member.state != MemberState::Draining, record.member.generation);
            let places = &mut groups.entry(shard.group).or_default().shards;
            if places.get(&shard.rank).is_none_or(|other| other.standing < standing) {
                places.insert(shard.rank, Shard { ranks: shard.ranks, standing, link: Arc::clone(link) });
            }
        }
        Self { placement, groups }
    }
}

/// Keeps the view; ends when who reads it is gone.
pub(super) async fn follow(
    directory: Directory,
    mut placement: watch::Receiver<Option<Arc<Placement>>>,
    model: Digest,
    options: ExpertsOptions,
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
            Ok(Arc::new(Link::open(peer, bulk_channel(member)?, &options, changes.clone())))
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
