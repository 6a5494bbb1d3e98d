//! When a shard that is told to stop may go: when others have its experts, or there is nobody to take them.
use moesaic_service::Cluster;
use moesaic_transport::membership::View;
use moesaic_transport::placement::follow;
use moesaic_types::cluster::{Member, MemberState, Placement, Role, Service, ShardInfo};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// Longest wait for the metadata: without them nothing is moved.
const FIRST_LOOK: Duration = Duration::from_secs(2);

/// Waits until no expert is in this shard's group alone, another process has this one's place, or no other group stays.
/// Cancel-safe.
pub(crate) async fn handed_over(cluster: &Cluster, own: &ShardInfo) {
    let follower = follow(Arc::clone(&cluster.metadata), Arc::clone(&cluster.events), own.model);
    let directory = cluster.directory(Service::ExpertShard);
    let (mut placement, mut members) = (follower.watch(), directory.watch());
    let seen = async {
        let placed = placement.wait_for(Option::is_some).await.is_ok();
        placed && members.wait_for(|view| !view.is_stale).await.is_ok()
    };
    if timeout(FIRST_LOOK, seen).await != Ok(true) {
        return;
    }
    let own = Own { id: &cluster.id, address: &cluster.address, info: own };
    loop {
        let may_go = own.may_go(placement.borrow_and_update().as_deref(), &members.borrow_and_update());
        if may_go {
            return;
        }
        tokio::select! {
            changed = placement.changed() => if changed.is_err() { return },
            changed = members.changed() => if changed.is_err() { return },
        }
    }
}

/// This shard.
struct Own<'a> {
    id: &'a str,
    address: &'a str,
    info: &'a ShardInfo,
}

impl Own<'_> {
    fn may_go(&self, placement: Option<&Placement>, view: &View) -> bool {
        !placement.is_some_and(|placement| self.has_alone(placement, view))
            || self.is_replaced(view)
            || !self.others_stay(view)
    }

    /// The other shards of the model.
    fn others<'a>(&self, view: &'a View) -> impl Iterator<Item = (&'a Member, &'a ShardInfo)> {
        view.members.values().filter_map(|record| match &record.member.role {
            Role::Shard(info) if info.model == self.info.model && !self.is_own(&record.member) => {
                Some((&record.member, info))
            }
            _ => None,
        })
    }

    /// A process that took this one's name is at another address.
    fn is_own(&self, member: &Member) -> bool {
        *member.id == *self.id && member.address == self.address
    }

    /// Whether this shard's group has experts that no other group has which stays and can be asked.
    fn has_alone(&self, placement: &Placement, view: &View) -> bool {
        let own = self.info.group;
        let (ready, mut stay) = (MemberState::Ready, BTreeSet::new());
        for (_, info) in self.others(view).filter(|(member, info)| member.state == ready && info.group != own) {
            let has = |rank: usize| {
                self.others(view).any(|(member, other)| {
                    let is_it = (other.group, other.rank, other.ranks) == (info.group, rank, info.ranks);
                    member.state == ready && is_it
                })
            };
            if !stay.contains(&info.group) && (0..info.ranks).all(has) {
                stay.insert(info.group);
            }
        }
        let is_alone = |groups: &Vec<usize>| groups.contains(&own) && !groups.iter().any(|group| stay.contains(group));
        placement.layers.values().flatten().any(is_alone)
    }

    /// Whether another process serves in this one's place: it is ready, so it has experts. Then nothing is moved, and
    /// schedulers ask that one.
    fn is_replaced(&self, view: &View) -> bool {
        let place = (self.info.group, self.info.rank, self.info.ranks);
        self.others(view)
            .any(|(member, info)| member.state == MemberState::Ready && (info.group, info.rank, info.ranks) == place)
    }

    /// Whether shards of other groups are there to stay.
    fn others_stay(&self, view: &View) -> bool {
        self.others(view).any(|(member, info)| member.state != MemberState::Draining && info.group != self.info.group)
    }
}

#[cfg(test)]
mod tests {
    use super::MemberState::{Draining, Ready, Starting};
    use super::*;
    use moesaic_transport::membership::Record;
    use moesaic_types::Digest;
    use std::collections::BTreeMap;

    fn info(group: usize, rank: usize, ranks: usize) -> ShardInfo {
        ShardInfo { model: Digest::default(), group, rank, ranks }
    }

    fn record(id: &str, address: &str, state: MemberState, info: ShardInfo) -> Record {
        let member = Member {
            service: Service::ExpertShard,
            id: id.into(),
            generation: 1,
            address: address.into(),
            socket: None,
            state,
            role: Role::Shard(info),
        };
        Record { member, load: None }
    }

    /// Members with names and addresses of their own.
    fn view(members: impl IntoIterator<Item = (MemberState, ShardInfo)>) -> View {
        let record = |(at, (state, info)): (usize, (MemberState, ShardInfo))| {
            let name = format!("e{at}");
            (name.as_str().into(), record(&name, &name, state, info))
        };
        View { members: members.into_iter().enumerate().map(record).collect(), ..View::default() }
    }

    fn placed(experts: &[&[usize]]) -> Placement {
        let experts = experts.iter().map(|groups| groups.to_vec()).collect();
        Placement { epoch: 1, model: Digest::default(), groups: 4, layers: BTreeMap::from([(3, experts)]) }
    }

    /// Whether `e0` of group 0 may go.
    fn may_go(experts: &[&[usize]], others: &[(MemberState, ShardInfo)], ranks: usize) -> bool {
        let own = info(0, 0, ranks);
        let members = [(Draining, own.clone())].into_iter().chain(others.iter().cloned());
        Own { id: "e0", address: "e0", info: &own }.may_go(Some(&placed(experts)), &view(members))
    }

    #[test]
    fn a_shard_is_needed_while_it_alone_has_an_expert_and_somebody_could_take_it() {
        assert!(!may_go(&[&[0], &[1]], &[(Ready, info(1, 0, 1))], 1), "it alone has the first");
        assert!(may_go(&[&[0, 1], &[1]], &[(Ready, info(1, 0, 1))], 1));
        assert!(may_go(&[&[1], &[1]], &[(Ready, info(1, 0, 1))], 1), "its own were taken");
        assert!(may_go(&[&[0], &[1]], &[(Draining, info(1, 0, 1))], 1), "nobody stays");
        assert!(may_go(&[&[0], &[1]], &[], 1));
        assert!(may_go(&[&[0], &[0]], &[(Ready, info(0, 1, 2))], 2), "its own group cannot take them");
        let strange = ShardInfo { model: Digest([1; 32]), ..info(1, 0, 1) };
        assert!(may_go(&[&[0], &[1]], &[(Ready, strange)], 1));
        let own = info(0, 0, 1);
        let members = view([(Draining, own.clone()), (Ready, info(1, 0, 1))]);
        assert!(Own { id: "e0", address: "e0", info: &own }.may_go(None, &members), "nothing is placed");
    }

    #[test]
    fn a_copy_counts_only_where_it_stays_with_every_rank() {
        let copied: &[&[usize]] = &[&[0, 1], &[2]];
        let third = (Ready, info(2, 0, 1));
        // both holders leave at once: neither is a reason for the other to go
        assert!(!may_go(copied, &[(Draining, info(1, 0, 1)), third.clone()], 1));
        assert!(!may_go(copied, std::slice::from_ref(&third), 1), "the other holder was killed");
        assert!(!may_go(copied, &[(Starting, info(1, 0, 1)), third.clone()], 1), "it is not asked yet");
        assert!(may_go(copied, &[(Ready, info(1, 0, 1)), third.clone()], 1));
        let ranks = |states: [MemberState; 2]| {
            [(states[0], info(1, 0, 2)), (states[1], info(1, 1, 2)), (Ready, info(2, 0, 2)), (Ready, info(2, 1, 2))]
        };
        assert!(may_go(copied, &ranks([Ready, Ready]), 2));
        assert!(!may_go(copied, &ranks([Ready, Draining]), 2), "a slice of it leaves");
        assert!(!may_go(copied, &ranks([Draining, Ready]), 2));
        assert!(!may_go(copied, &ranks([Ready, Ready])[1..], 2), "a slice of it is away");
        // one shard of that rank leaves, another has its place
        let replaced: Vec<_> = ranks([Ready, Draining]).into_iter().chain([(Ready, info(1, 1, 2))]).collect();
        assert!(may_go(copied, &replaced, 2));
        // the router has taken both to the third
        assert!(may_go(&[&[2], &[2]], &[(Draining, info(1, 0, 1)), third], 1));
    }

    #[test]
    fn a_shard_goes_as_soon_as_its_place_is_served_by_another() {
        let alone: &[&[usize]] = &[&[0], &[1]];
        let other = (Ready, info(1, 0, 2));
        assert!(!may_go(alone, std::slice::from_ref(&other), 2));
        assert!(may_go(alone, &[(Ready, info(0, 0, 2)), other.clone()], 2));
        assert!(!may_go(alone, &[(Starting, info(0, 0, 2)), other.clone()], 2), "that one has no experts yet");
        assert!(!may_go(alone, &[(Ready, info(0, 0, 3)), other.clone()], 2), "that is another slice");
        assert!(!may_go(alone, &[(Draining, info(0, 0, 2)), other.clone()], 2), "that one leaves too");
        assert!(!may_go(alone, &[(Ready, info(0, 1, 2)), other], 2), "that is the slice beside it");

        // what the directory shows under its own name may be its own record from before the signal, or of a later life
        let own = info(0, 0, 1);
        let placement = placed(alone);
        let may_go = |address: &str| {
            let records = [record("e0", address, Ready, own.clone()), record("e1", "e1", Ready, info(1, 0, 1))];
            let members = records.into_iter().map(|record| (Arc::clone(&record.member.id), record)).collect();
            let view = View { members, ..View::default() };
            Own { id: "e0", address: "e0", info: &own }.may_go(Some(&placement), &view)
        };
        assert!(!may_go("e0"));
        assert!(may_go("elsewhere"), "another process has its name");
    }
}
