//! The placement that is followed and the streams to its shards.
use super::ExpertsOptions;
use super::link::Link;
use crate::channel::bulk_channel;
use crate::membership::{Directory, Peers, View as Members};
use moesaic_types::cluster::{Member, MemberState, Placement, Role};
use moesaic_types::{Digest, Error, Result};
use std::cmp::Reverse;
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

/// The shards of a group, by rank: all that have the place, the best choice first.
#[derive(Debug, Default)]
struct Group {
    shards: BTreeMap<usize, Vec<Shard>>,
}

/// One shard, and how good a choice it is for its place.
#[derive(Debug)]
struct Shard {
    /// Slices of its group, as it says.
    ranks: usize,
    standing: Standing,
    link: Arc<Link>,
}

/// Whether a shard has experts, else whether it stays, and when it came: a process that takes another's place is the later
/// one, and has it as soon as it can serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Standing {
    is_ready: bool,
    stays: bool,
    generation: u64,
}

impl Standing {
    fn of(member: &Member) -> Self {
        let (is_ready, stays) = (member.state == MemberState::Ready, member.state != MemberState::Draining);
        Self { is_ready, stays, generation: member.generation }
    }
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
        let mut best = self.shards.values().filter_map(|shards| shards.first());
        let ranks = best.next().map_or(0, |shard| shard.ranks);
        if best.any(|shard| shard.ranks != ranks) {
            return Err(missing("has shards that do not agree on expert_shard.ranks".into()));
        }
        let link = |rank| {
            let mut reason = None;
            for shard in self.shards.get(&rank).into_iter().flatten().filter(|shard| shard.ranks == ranks) {
                match shard.link.is_up(epoch) {
                    Ok(()) => return Ok(Arc::clone(&shard.link)),
                    Err(error) => reason = reason.or(Some(error)),
                }
            }
            Err(reason.map_or_else(
                || missing(format!("has no shard of rank {rank}")),
                |error| missing(format!("is not reached: {error}")),
            ))
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
            let standing = Standing::of(&record.member);
            let place = groups.entry(shard.group).or_default().shards.entry(shard.rank).or_default();
            place.push(Shard { ranks: shard.ranks, standing, link: Arc::clone(link) });
        }
        let places = groups.values_mut().flat_map(|group| group.shards.values_mut());
        places.for_each(|place| place.sort_by_key(|shard| Reverse(shard.standing)));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::Record;
    use MemberState::{Draining, Ready, Starting};
    use moesaic_types::cluster::{Service, ShardInfo};

    const EPOCH: u64 = 3;
    const MODEL: Digest = Digest([1; 32]);

    /// A shard of group 0 and rank 0: its name, how it is, since when, and whether its stream is open.
    type Known = (&'static str, MemberState, u64, bool);

    fn view(shards: &[Known]) -> (View, Peers<Arc<Link>>) {
        let record = |&(id, state, generation, _): &Known| {
            let role = Role::Shard(ShardInfo { model: MODEL, group: 0, rank: 0, ranks: 1 });
            let (service, id, address) = (Service::ExpertShard, Arc::from(id), format!("http://{id}"));
            let member = Member { service, id, generation, address, socket: None, state, role };
            (Arc::clone(&member.id), Record { member, load: None })
        };
        let members = Members { members: shards.iter().map(record).collect(), is_stale: false };
        let mut peers = Peers::default();
        peers.follow(members.members.values(), |member| {
            let is_open = shards.iter().any(|(id, .., is_open)| *id == &*member.id && *is_open);
            Ok(Arc::new(Link::unread(&member.id, is_open)))
        });
        let placement =
            Placement { epoch: EPOCH, model: MODEL, groups: 1, layers: BTreeMap::from([(0, vec![vec![0]])]) };
        (View::of(Some(Arc::new(placement)), &members, &peers, MODEL), peers)
    }

    /// Whether just this one of them is asked.
    fn asks(view: &View, peers: &Peers<Arc<Link>>, id: &str) -> bool {
        let links = view.reach().group(0).map(<[_]>::to_vec).unwrap_or_default();
        links.len() == 1 && peers.get(id).is_some_and(|link| Arc::ptr_eq(link, &links[0]))
    }

    #[tokio::test]
    async fn the_best_shard_of_a_place_that_can_be_asked_is() {
        let cases: &[(&[Known], &str)] = &[
            (&[("old", Ready, 1, true), ("new", Starting, 2, true)], "old"),
            (&[("old", Ready, 1, true), ("new", Ready, 2, true)], "new"),
            (&[("old", Ready, 1, true), ("new", Ready, 2, false)], "old"),
            (&[("old", Draining, 1, true), ("new", Ready, 2, true)], "new"),
            (&[("old", Draining, 1, true), ("new", Starting, 2, true)], "new"),
            (&[("old", Draining, 1, true), ("new", Starting, 2, false)], "old"),
        ];
        for (shards, expected) in cases {
            let (view, peers) = view(shards);
            assert!(asks(&view, &peers, expected), "{shards:?}");
        }
        let (view, _peers) = view(&[("old", Ready, 1, false), ("new", Starting, 2, false)]);
        let error = view.reach().group(0).expect_err("no stream is open");
        assert!(error.message.contains("old is not connected"), "{error}");
    }

    #[tokio::test]
    async fn a_shard_that_does_not_follow_the_placement_leaves_its_place_to_the_next() {
        let (view, peers) = view(&[("old", Draining, 1, true), ("new", Starting, 2, true)]);
        assert!(asks(&view, &peers, "new"));
        peers.get("new").expect("it is a member").set_behind(EPOCH);
        assert!(asks(&view, &peers, "old"), "its experts come yet");
    }
}
