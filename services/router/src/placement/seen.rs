//! What the shards of one model say, put together: plain data.
use super::plan::{self, Layers, Load};
use super::shard::Report;
use moesaic_types::Result;
use moesaic_types::cluster::{Placement, ShardInfo};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// A shard that is a member now, and its answer.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Its name.
    pub id: Arc<str>,
    /// Its life.
    pub generation: u64,
    /// Its place in the grid.
    pub info: ShardInfo,
    /// It is about to stop: what only it holds goes to others.
    pub leaves: bool,
    /// What it says of itself.
    pub report: Result<Report>,
}

/// Those that answered.
pub(super) fn answers(shards: &[Seen]) -> impl Iterator<Item = (&Seen, &Report)> {
    shards.iter().filter_map(|seen| Some((seen, seen.report.as_ref().ok()?)))
}

/// By group, by rank: the answers of its shards. A rank that nobody has, or whose shards do not answer, is empty.
fn grid<'a>(shards: impl IntoIterator<Item = &'a Seen>) -> BTreeMap<usize, Vec<Vec<&'a Report>>> {
    let mut grid = BTreeMap::<usize, Vec<Vec<&Report>>>::new();
    for seen in shards {
        let ranks = grid.entry(seen.info.group).or_default();
        let count = ranks.len().max(seen.info.ranks).max(seen.info.rank + 1);
        ranks.resize(count, Vec::new());
        ranks[seen.info.rank].extend(seen.report.as_ref().ok());
    }
    grid
}

/// The groups of which every rank answered, and stays.
pub(super) fn whole(shards: &[Seen]) -> BTreeSet<usize> {
    complete(shards.iter().filter(|seen| !seen.leaves))
}

/// The groups of which every rank answered, be it one that leaves.
pub(super) fn serving(shards: &[Seen]) -> BTreeSet<usize> {
    complete(shards)
}

fn complete<'a>(shards: impl IntoIterator<Item = &'a Seen>) -> BTreeSet<usize> {
    let is_complete =
        |(group, ranks): (usize, Vec<Vec<&Report>>)| ranks.iter().all(|rank| !rank.is_empty()).then_some(group);
    grid(shards).into_iter().filter_map(is_complete).collect()
}

/// The groups that a shard leaves without another in its place.
pub(super) fn left(shards: &[Seen], whole: &BTreeSet<usize>) -> BTreeSet<usize> {
    let leaving = shards.iter().filter(|seen| seen.leaves).map(|seen| seen.info.group);
    leaving.filter(|group| !whole.contains(group)).collect()
}

/// The load of each expert over all groups. Shards of one group see the same tokens: they are counted once.
pub(super) fn load(shards: &[Seen]) -> Load {
    let mut load = Load::new();
    for ranks in grid(shards).into_values() {
        let mut of_group = Load::new();
        for report in ranks.into_iter().flatten() {
            merge(&mut of_group, &report.load, u64::max);
        }
        merge(&mut load, &of_group, u64::saturating_add);
    }
    load
}

fn merge(into: &mut Load, from: &Load, with: impl Fn(u64, u64) -> u64) {
    for (layer, counts) in from {
        let sums = into.entry(*layer).or_default();
        sums.resize(sums.len().max(counts.len()), 0);
        sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum = with(*sum, *count));
    }
}

/// What whole groups hold by their own word, with the shape of `load`.
pub(super) fn gathered(shards: &[Seen], whole: &BTreeSet<usize>, load: &Load) -> Layers {
    let mut layers: Layers = load.iter().map(|(layer, counts)| (*layer, vec![Vec::new(); counts.len()])).collect();
    for (group, ranks) in grid(shards).into_iter().filter(|(group, _)| whole.contains(group)) {
        for (layer, experts) in &mut layers {
            for (expert, groups) in experts.iter_mut().enumerate() {
                let has = |report: &&Report| {
                    let held = report.held.get(layer).filter(|_| report.epoch > 0);
                    held.is_some_and(|held| held.binary_search(&(expert as u32)).is_ok())
                };
                if ranks.iter().all(|rank| rank.iter().any(has)) {
                    groups.push(group);
                }
            }
        }
    }
    layers
}

/// Whether a shard says that it follows what stands, without all that this wants of it: only a new epoch helps.
pub(super) fn lacks(shards: &[Seen], stands: &Placement) -> bool {
    let mut following = answers(shards).filter(|(_, report)| report.epoch == stands.epoch);
    following.any(|(seen, report)| !plan::covers(&report.held, &stands.shares(seen.info.group)))
}
