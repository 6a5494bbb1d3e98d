//! The placement of experts, with shards behind real gRPC, over memory and over real Redis.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails there")]
mod shards;

use moesaic_router::placement::Config;
use moesaic_testkit::{servers, until};
use moesaic_transport::placement;
use moesaic_types::cluster::Placement;
use shards::{Cluster, Running, Witness, config, load, model};
use std::collections::BTreeSet;

/// The groups that hold experts.
fn holders(placement: &Placement) -> BTreeSet<usize> {
    placement.layers.values().flatten().flatten().copied().collect()
}

fn is_even(placement: &Placement) -> bool {
    placement.layers.values().all(|experts| *experts == [[0], [0], [0], [1], [1], [1]])
}

fn measure(shards: &[Running], counts: [u64; 6]) {
    shards.iter().for_each(|shard| shard.state(|state| state.load = load(counts)));
}

async fn suite(cluster: &Cluster) {
    let mut grid = the_first_placement_waits_for_all_groups(cluster).await;
    hot_experts_get_copies(cluster, &mut grid).await;
    a_shard_without_room_leaves_the_placement_standing(cluster, &grid).await;
    a_shard_that_restarts_gets_its_experts_again(cluster, &mut grid).await;
    another_router_takes_over(cluster, &grid).await;
    a_deposed_router_s_placement_comes_to_nothing(cluster, &grid).await;
    let all = grid.into_iter().map(Running::leave);
    futures::future::join_all(all).await;
}

async fn the_first_placement_waits_for_all_groups(cluster: &Cluster) -> Vec<Running> {
    let mut grid = cluster.grid(1, 2).await;
    grid.push(cluster.start(1, 0, 2).await);
    let leader = cluster.lead(&config(2));
    until("half a group is no group", || async {
        leader.status().await.is_ok_and(|all| all.iter().any(|model| model.groups == [0]))
    })
    .await;
    assert_eq!(cluster.record().await, None);
    grid.push(cluster.start(1, 1, 2).await);
    let first = cluster.stands("the first placement", &grid, is_even).await;
    assert_eq!((first.model, first.groups), (model(), 2));
    leader.stop().await;
    grid
}

async fn hot_experts_get_copies(cluster: &Cluster, grid: &mut [Running]) {
    let before = cluster.record().await.unwrap();
    let witness = Witness::start(cluster, grid);
    let leader = cluster.lead(&config(2));
    measure(grid, [10, 10, 500, 400, 10, 10]);
    until("windows end", || async { grid.iter().all(|shard| shard.state(|state| state.windows) > 2) }).await;
    assert_eq!(cluster.record().await, Some(before.clone()), "the hottest two are apart: nothing is to be gained");
    measure(grid, [10, 500, 400, 10, 10, 10]);
    let apart = |placement: &Placement| placement.layers[&1][1] != placement.layers[&1][2];
    let after = cluster.stands("the hottest two are apart", grid, apart).await;
    assert!(after.epoch > before.epoch);
    leader.stop().await;

    let config = Config { redundant_experts: 2, ..config(2) };
    let leader = cluster.lead(&config);
    let copied = |placement: &Placement| placement.layers.values().all(|layer| layer[1].len() + layer[2].len() == 4);
    cluster.stands("the hottest two are everywhere", grid, copied).await;
    until("it is measured", || async {
        let status = leader.status().await.unwrap_or_default();
        status.iter().any(|model| model.imbalance.is_some_and(|imbalance| imbalance < 1.05))
    })
    .await;
    leader.stop().await;
    let leader = cluster.lead(&shards::config(2));
    let single = |placement: &Placement| placement.layers.values().flatten().all(|groups| groups.len() == 1);
    cluster.stands("no copies any longer", grid, single).await;
    leader.stop().await;
    let seen = witness.end().await;
    assert!(seen.windows(2).all(|pair| pair[0] < pair[1]), "{seen:?}");
}

async fn a_shard_without_room_leaves_the_placement_standing(cluster: &Cluster, grid: &[Running]) {
    let before = cluster.record().await.unwrap();
    let full = &grid[1];
    let prepares = full.state(|state| {
        state.is_full = true;
        state.prepares
    });
    let leader = cluster.lead(&Config { min_copies: 2, ..config(2) });
    until("it is asked again and again", || async { full.state(|state| state.prepares) >= prepares + 3 }).await;
    assert_eq!(cluster.record().await, Some(before.clone()));
    assert!(grid.iter().all(|shard| shard.state(|state| state.epoch) == before.epoch), "nobody switched");
    full.state(|state| state.is_full = false);
    let everywhere = |placement: &Placement| placement.layers.values().flatten().all(|groups| groups.len() == 2);
    cluster.stands("all experts are everywhere", grid, everywhere).await;
    leader.stop().await;
}

async fn a_shard_that_restarts_gets_its_experts_again(cluster: &Cluster, grid: &mut Vec<Running>) {
    let leader = cluster.lead(&Config { min_copies: 2, ..config(2) });
    let before = cluster.record().await.unwrap();
    // its control begins anew
    grid[0].state(|state| *state = shards::State { load: state.load.clone(), ..shards::State::default() });
    let same = |placement: &Placement| *placement == before;
    cluster.stands("the same placement", grid, same).await;
    // its process begins anew
    grid.remove(3).leave().await;
    grid.push(cluster.start(1, 1, 2).await);
    measure(grid, [10, 500, 400, 10, 10, 10]);
    cluster.stands("still the same placement", grid, same).await;
    // it says that it follows, and holds less: it is given another epoch
    grid[0].state(|state| state.held.clear());
    let later = |placement: &Placement| placement.epoch > before.epoch && placement.layers == before.layers;
    cluster.stands("the same with another epoch", grid, later).await;
    leader.stop().await;
}

async fn another_router_takes_over(cluster: &Cluster, grid: &[Running]) {
    let (one, two) = (cluster.lead(&config(2)), cluster.lead(&config(2)));
    until("one leads", || async { one.leads() != two.leads() }).await;
    let (leads, waits) = if one.leads() { (one, two) } else { (two, one) };
    assert_eq!(waits.status().await.unwrap(), []);
    let single = |placement: &Placement| placement.layers.values().flatten().all(|groups| groups.len() == 1);
    let before = cluster.stands("what this one wants", grid, single).await;
    leads.stop().await;
    until("the other leads", || async { waits.leads() }).await;
    let together = |a: usize, b: usize| {
        let groups = &before.layers[&1];
        groups[a] == groups[b]
    };
    let partner = (1..6).find(|expert| together(0, *expert)).unwrap();
    let mut counts = [10; 6];
    (counts[0], counts[partner]) = (500, 500);
    measure(grid, counts);
    let apart = |placement: &Placement| placement.layers[&1][0] != placement.layers[&1][partner];
    let after = cluster.stands("the other's placement", grid, apart).await;
    assert!(after.epoch > before.epoch);
    waits.stop().await;
}

async fn a_deposed_router_s_placement_comes_to_nothing(cluster: &Cluster, grid: &[Running]) {
    let before = cluster.record().await.unwrap();
    let slow = &grid[0];
    slow.shard.gate.send_replace(false);
    let prepares = slow.state(|state| state.prepares);
    let leader = cluster.lead(&Config { min_copies: 2, ..config(2) });
    until("it waits for a shard", || async { slow.state(|state| state.prepares) > prepares }).await;
    let coming = grid[1].state(|state| state.prepared.as_ref().map(|(epoch, _)| *epoch));
    until("the lease is another's", || async {
        let Ok(Some((_, version))) = cluster.metadata.get("placement/leader").await else { return false };
        let (lease, minute) = ("placement/leader", Some(std::time::Duration::from_secs(60)));
        cluster
            .metadata
            .compare_and_set(lease, Some(version), "another".into(), minute)
            .await
            .is_ok_and(|v| v.is_some())
    })
    .await;
    until("it is deposed", || async { !leader.leads() && leader.status().await == Ok(vec![]) }).await;
    slow.shard.gate.send_replace(true);
    let standing = placement::read(&*cluster.metadata, &model()).await.unwrap().unwrap();
    assert_eq!(standing.placement.as_ref(), Some(&before), "nothing was written");
    // what the other does: all experts are everywhere, by its own epoch
    let layers = before.layers.iter().map(|(layer, experts)| (*layer, vec![vec![0, 1]; experts.len()])).collect();
    let epoch = coming.unwrap_or(before.epoch) + 10;
    let theirs = Placement { epoch, layers, ..before };
    let (metadata, events) = (&*cluster.metadata, &*cluster.events);
    placement::publish(metadata, events, "another", &theirs, Some(standing.version)).await.unwrap().unwrap();
    let (_, version) = cluster.metadata.get("placement/leader").await.unwrap().unwrap();
    assert!(cluster.metadata.remove("placement/leader", version).await.unwrap());
    until("it leads again", || async { leader.leads() }).await;
    cluster.stands("it goes on from there", grid, |placement| *placement == theirs).await;
    leader.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_memory() {
    suite(&Cluster::memory()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_redis() {
    suite(&Cluster::real(&servers::redis())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_group_s_experts_go_to_the_others_until_it_is_back() {
    let cluster = Cluster::memory();
    let mut grid = cluster.grid(3, 1).await;
    let leader = cluster.lead(&config(3));
    let all = |placement: &Placement| holders(placement).len() == 3;
    let first = cluster.stands("all groups hold some", &grid, all).await;
    grid.remove(1).leave().await;
    let rest = |placement: &Placement| holders(placement) == BTreeSet::from([0, 2]);
    let without = cluster.stands("the others hold all", &grid, rest).await;
    assert!(without.is_complete() && without.groups == 3 && without.epoch > first.epoch);
    // what the others hold of before is where it was
    for (layer, experts) in &without.layers {
        for (expert, groups) in experts.iter().enumerate().filter(|(e, _)| first.layers[layer][*e] != [1]) {
            assert_eq!(groups, &first.layers[layer][expert]);
        }
    }
    grid.push(cluster.start(1, 0, 1).await);
    cluster.stands("it is used again", &grid, all).await;
    leader.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_redis_gets_the_placement_again_with_a_later_epoch() {
    let mut redis = servers::redis();
    let cluster = Cluster::real(&redis);
    let grid = cluster.grid(2, 1).await;
    let leader = cluster.lead(&config(2));
    let follower = cluster.follow();
    let first = cluster.stands("the first placement", &grid, is_even).await;
    redis.restart_empty();
    let later = |than: &Placement| {
        let than = than.clone();
        move |placement: &Placement| placement.epoch > than.epoch && placement.layers == than.layers
    };
    let second = cluster.stands("it is written again", &grid, later(&first)).await;
    until("it is followed", || async { follower.placement().as_deref() == Some(&second) }).await;
    // a router that knows of nothing asks the shards
    leader.stop().await;
    redis.restart_empty();
    let leader = cluster.lead(&config(2));
    let third = cluster.stands("it is written from what the shards hold", &grid, later(&second)).await;
    until("it is followed", || async { follower.placement().as_deref() == Some(&third) }).await;
    leader.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_nobody_understands_is_written_anew() {
    let cluster = Cluster::memory();
    let grid = cluster.grid(2, 1).await;
    let key = placement::key(&model());
    cluster.metadata.compare_and_set(&key, None, "{\"new\":1}".into(), None).await.unwrap().unwrap();
    let leader = cluster.lead(&config(2));
    cluster.stands("a placement", &grid, is_even).await;
    leader.stop().await;
}
