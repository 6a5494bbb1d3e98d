//! When a shard that is told to stop may go: when others have its experts, or there is nobody to take them.
use moesaic_service::Cluster;
use moesaic_transport::membership::View;
use moesaic_transport::placement::follow;
use moesaic_types::cluster::{MemberState, Placement, Role, Service, ShardInfo};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// Longest wait for the metadata: without them nothing is moved.
const FIRST_LOOK: Duration = Duration::from_secs(2);

/// Waits until no expert is in this shard's group alone, or no other group stays. Cancel-safe.
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
    loop {
        let is_needed = placement.borrow_and_update().as_ref().is_some_and(|placement| has_alone(placement, own.group));
        let others_stay = others_stay(&members.borrow_and_update(), own);
        if !is_needed || !others_stay {
            return;
        }
        tokio::select! {
            changed = placement.changed() => if changed.is_err() { return },
            changed = members.changed() => if changed.is_err() { return },
        }
    }
}

/// Whether a group has experts that no other has.
fn has_alone(placement: &Placement, group: usize) -> bool {
    placement.layers.values().flatten().any(|groups| **groups == [group])
}

/// Whether shards of other groups of the same model are there to stay.
fn others_stay(view: &View, own: &ShardInfo) -> bool {
    view.members.values().any(|record| {
        let stays = record.member.state != MemberState::Draining;
        matches!(&record.member.role, Role::Shard(info) if stays && info.model == own.model && info.group != own.group)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use moesaic_transport::membership::Record;
    use moesaic_types::Digest;
    use moesaic_types::cluster::Member;
    use std::collections::BTreeMap;

    #[test]
    fn a_shard_is_needed_while_it_alone_has_an_expert_and_somebody_could_take_it() {
        let placement = |experts: Vec<Vec<usize>>| Placement {
            epoch: 1,
            model: Digest::default(),
            groups: 2,
            layers: BTreeMap::from([(3, experts)]),
        };
        assert!(has_alone(&placement(vec![vec![0, 1], vec![1]]), 1));
        assert!(!has_alone(&placement(vec![vec![0, 1], vec![1]]), 0));
        let own = ShardInfo { model: Digest::default(), group: 0, rank: 0, ranks: 2 };
        let view = |state, info: ShardInfo| {
            let member = Member {
                service: Service::ExpertShard,
                id: "e".into(),
                generation: 1,
                address: "http://e:1".into(),
                socket: None,
                state,
                role: Role::Shard(info),
            };
            View { members: BTreeMap::from([("e".into(), Record { member, load: None })]), ..View::default() }
        };
        let other = ShardInfo { group: 1, ..own.clone() };
        assert!(others_stay(&view(MemberState::Ready, other.clone()), &own));
        assert!(!others_stay(&view(MemberState::Draining, other.clone()), &own));
        assert!(!others_stay(&view(MemberState::Ready, ShardInfo { rank: 1, ..own.clone() }), &own));
        let strange = ShardInfo { model: Digest([1; 32]), ..other };
        assert!(!others_stay(&view(MemberState::Ready, strange), &own));
    }
}
