//! What the router that leads knows of one model's shards, and what it does next: plain data, and the caller's clock.
use super::config::Config;
use super::plan::{self, Layers, Load};
use super::seen::{Seen, answers, gathered, lacks, left, load, serving, whole};
use moesaic_transport::placement::Standing;
use moesaic_types::cluster::{Placement, Shares};
use moesaic_types::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The longest pause after a failure.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What a look at a model's shards found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// All that are members.
    pub shards: Vec<Seen>,
    /// The record; read after the shards were asked, so that it is not older than what they follow.
    pub standing: Option<Standing>,
}

/// A new placement to be made.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// The groups that are there.
    pub groups: BTreeSet<usize>,
    /// The load that was measured.
    pub load: Load,
    /// What stands.
    pub present: Option<Layers>,
    /// Whether it is to be planned; else what stands gets a new epoch.
    pub is_planned: bool,
    /// Whether what stands must get a new epoch even where nothing better is planned.
    pub is_renumbered: bool,
    /// The highest epoch that anyone has seen.
    pub floor: u64,
    /// The record's version.
    pub version: Option<u64>,
    /// Shards that must be prepared, with their groups.
    pub shards: Vec<(Arc<str>, usize)>,
}

/// A shard to be taken to the placement that stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mend {
    /// Its name.
    pub id: Arc<str>,
    /// Its life.
    pub generation: u64,
    /// The placement's epoch.
    pub epoch: u64,
    /// What it has to hold.
    pub shares: Shares,
}

/// Which groups are how.
struct Groups {
    /// Every rank answers, and stays.
    whole: BTreeSet<usize>,
    /// A shard leaves, and none takes its place.
    left: BTreeSet<usize>,
    /// Every rank answers, be it one that leaves.
    serving: BTreeSet<usize>,
    /// Those that are whole and can be given experts.
    usable: BTreeSet<usize>,
}

/// What to do next.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Steps {
    /// A new placement.
    pub change: Option<Change>,
    /// Shards to mend.
    pub mends: Vec<Mend>,
}

/// When something that failed is tried again.
#[derive(Clone, Copy, Debug, Default)]
struct Retry {
    after: Option<Instant>,
    pause: Duration,
}

impl Retry {
    fn allows(&self, now: Instant) -> bool {
        self.after.is_none_or(|after| now >= after)
    }

    fn failed(&mut self, now: Instant, first: Duration) {
        self.pause = (self.pause * 2).clamp(first, LONGEST_PAUSE);
        self.after = Some(now + self.pause);
    }
}

#[derive(Debug)]
struct Mending {
    generation: u64,
    group: usize,
    is_running: bool,
    retry: Retry,
    failing_since: Option<Instant>,
}

/// Why a change came to nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// The group that could not be prepared, where that was it.
    pub group: Option<usize>,
    /// What went wrong.
    pub error: Error,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { group: None, error }
    }
}

/// A model's state.
#[derive(Debug)]
pub struct Model {
    /// The placement that was written last.
    known: Option<Placement>,
    /// When each group was last seen whole, or first missed.
    whole_at: BTreeMap<usize, Instant>,
    /// The groups that are whole, and since when there are just these.
    settled: Option<(BTreeSet<usize>, Instant)>,
    /// Experts are to be placed by the load.
    is_due: bool,
    /// While a change is under way: the shards that it has prepare something, with their lives.
    changing: Option<BTreeMap<Arc<str>, u64>>,
    retry: Retry,
    mending: BTreeMap<Arc<str>, Mending>,
    /// Groups that could not load what they should; those that hold nothing are left out for a while.
    refused: BTreeMap<usize, Retry>,
    /// Of what stands, when it was last looked at.
    imbalance: Option<f64>,
}

impl Model {
    /// A model of which a placement may be known from an earlier term.
    pub fn new(known: Option<Placement>) -> Self {
        Self {
            known,
            whole_at: BTreeMap::new(),
            settled: None,
            is_due: false,
            changing: None,
            retry: Retry::default(),
            mending: BTreeMap::new(),
            refused: BTreeMap::new(),
            imbalance: None,
        }
    }

    /// The placement that was written last.
    pub fn known(&self) -> Option<&Placement> {
        self.known.as_ref()
    }

    /// How much busier the busiest groups are than the average one.
    pub fn imbalance(&self) -> Option<f64> {
        self.imbalance
    }

    /// The groups of which all shards answered.
    pub fn whole(&self) -> impl Iterator<Item = usize> {
        self.settled.iter().flat_map(|(groups, _)| groups.iter().copied())
    }

    /// Experts are to be placed by the load, as soon as all shards are there.
    pub fn rebalance(&mut self) {
        self.is_due = true;
    }

    /// Takes in what was found, and says what to do. Who does it tells [`Self::changed`] and [`Self::mended`].
    pub fn next(&mut self, now: Instant, config: &Config, found: Found) -> Steps {
        let Found { shards, standing } = found;
        let load = load(&shards);
        if load.is_empty() {
            return Steps::default();
        }
        let version = standing.as_ref().map(|standing| standing.version);
        let record = standing.and_then(|standing| standing.placement);
        let highest = answers(&shards).map(|(_, report)| report.epoch).max().unwrap_or(0);
        let epoch = |placement: &Option<Placement>| placement.as_ref().map_or(0, |placement| placement.epoch);
        let floor = highest.max(epoch(&record)).max(epoch(&self.known));
        // a record that the shards are ahead of is of metadata that lost the last writes
        let stands = record.as_ref().filter(|record| record.epoch >= highest).cloned();
        self.keep_mending(&shards, stands.as_ref());
        let whole = self.look(now, config, &shards);
        let present = match &stands {
            Some(stands) => Some(stands.layers.clone()),
            None => self.layers(record, highest, gathered(&shards, &whole, &load)),
        };
        if stands.is_some() {
            self.known.clone_from(&stands);
        }
        self.imbalance = stands.as_ref().map(|stands| {
            let holders = holders(&stands.layers).len();
            plan::imbalance(&load, &stands.layers, holders, config.min_load)
        });
        let must_renumber = match &stands {
            Some(stands) => self.is_due && lacks(&shards, stands),
            None => true,
        };
        let holders = present.as_ref().map(holders).unwrap_or_default();
        let refuses = |group: &usize| self.refused.get(group).is_some_and(|retry| !retry.allows(now));
        let usable = whole.iter().copied().filter(|group| holders.contains(group) || !refuses(group)).collect();
        let groups = Groups { left: left(&shards, &whole), serving: serving(&shards), usable, whole };
        // what stands is served before it is bettered
        let is_behind = stands.as_ref().is_some_and(|stands| {
            let mut behind = behind(&shards, stands);
            behind.any(|seen| holders.contains(&seen.info.group))
        });
        let (is_planned, is_renumbered) = self.wants(now, config, &groups, present.as_ref(), &load, is_behind);
        let is_renumbered = is_renumbered && must_renumber;
        let usable = groups.usable;
        let is_asked = |group: usize| usable.contains(&group) || holders.contains(&group);
        // one that leaves serves those who do not follow the next placement yet
        let asked = answers(&shards).filter(|(seen, _)| !seen.leaves && is_asked(seen.info.group));
        let asked: Vec<_> = asked.map(|(seen, _)| seen).collect();
        let change = (is_planned || is_renumbered).then_some(Change {
            groups: usable,
            load,
            present,
            is_planned,
            is_renumbered,
            floor,
            version,
            shards: asked.iter().map(|seen| (Arc::clone(&seen.id), seen.info.group)).collect(),
        });
        if change.is_some() {
            self.changing = Some(asked.iter().map(|seen| (Arc::clone(&seen.id), seen.generation)).collect());
        }
        let mends = stands.map(|stands| self.mends(now, &shards, &stands)).unwrap_or_default();
        Steps { change, mends }
    }

    /// A change ended: with a placement, with none because nothing is better, or not.
    pub fn changed(&mut self, now: Instant, config: &Config, outcome: Result<Option<Placement>, Failure>) {
        self.changing = None;
        match outcome {
            Ok(placement) => {
                let used = placement.as_ref().map(|placement| holders(&placement.layers)).unwrap_or_default();
                self.refused.retain(|group, _| !used.contains(group));
                self.known = placement.or(self.known.take());
                (self.is_due, self.retry) = (false, Retry::default());
            }
            Err(failure) => {
                let first = config.retry_pause.get();
                failure.group.into_iter().for_each(|group| self.refused.entry(group).or_default().failed(now, first));
                self.retry.failed(now, first);
            }
        }
    }

    /// A shard was mended, or not.
    pub fn mended(&mut self, now: Instant, config: &Config, id: &str, generation: u64, is_done: bool) {
        let Some(mending) = self.mending.get_mut(id).filter(|mending| mending.generation == generation) else { return };
        mending.is_running = false;
        if is_done {
            (mending.retry, mending.failing_since) = (Retry::default(), None);
        } else {
            let first = config.retry_pause.get();
            mending.retry.failed(now, first);
            mending.failing_since.get_or_insert(now);
            self.refused.entry(mending.group).or_default().failed(now, first);
        }
    }

    /// Notes which groups are whole. A shard that cannot be mended for long counts as one that does not answer.
    fn look(&mut self, now: Instant, config: &Config, shards: &[Seen]) -> BTreeSet<usize> {
        let is_broken = |seen: &&Seen| {
            let since = self.mending.get(&seen.id).and_then(|mending| mending.failing_since);
            since.is_some_and(|since| now.saturating_duration_since(since) >= config.lost_after.get())
        };
        let broken: BTreeSet<usize> = shards.iter().filter(is_broken).map(|seen| seen.info.group).collect();
        let whole: BTreeSet<usize> = whole(shards).difference(&broken).copied().collect();
        for group in &whole {
            self.whole_at.insert(*group, now);
        }
        if self.settled.as_ref().is_none_or(|(groups, _)| *groups != whole) {
            tracing::info!(groups = ?whole, "groups of which all shards answer");
            self.settled = Some((whole.clone(), now));
        }
        whole
    }

    /// Forgets failures of shards that are gone, started anew, or follow what stands by now.
    fn keep_mending(&mut self, shards: &[Seen], stands: Option<&Placement>) {
        let lives: BTreeMap<&Arc<str>, &Seen> = shards.iter().map(|seen| (&seen.id, seen)).collect();
        let follows = |seen: &Seen| {
            let epochs = seen.report.as_ref().ok().zip(stands);
            epochs.is_some_and(|(report, stands)| report.epoch >= stands.epoch)
        };
        self.mending.retain(|id, mending| {
            let same_life = lives.get(id).filter(|seen| seen.generation == mending.generation);
            same_life.is_some_and(|seen| mending.is_running || !follows(seen))
        });
    }

    /// Who holds what where the record does not say so, by the best word that there is: our own, or the shards' where
    /// they have gone on since.
    fn layers(&self, record: Option<Placement>, highest: u64, gathered: Layers) -> Option<Layers> {
        if let Some(known) = self.known.as_ref().filter(|known| known.epoch >= highest) {
            return Some(known.layers.clone());
        }
        if is_complete(&gathered) {
            return Some(gathered);
        }
        let older = record.map(|record| record.layers);
        older.or_else(|| Some(gathered).filter(|gathered| !holders(gathered).is_empty()))
    }

    /// Whether experts are to be placed, and whether what is present can be given another epoch.
    fn wants(
        &mut self,
        now: Instant,
        config: &Config,
        Groups { whole, left, serving, usable }: &Groups,
        present: Option<&Layers>,
        load: &Load,
        is_behind: bool,
    ) -> (bool, bool) {
        let has_shape =
            |layers: &Layers| load.iter().all(|(index, counts)| layers.get(index).map(Vec::len) == Some(counts.len()));
        let is_whole = present.is_some_and(|layers| is_complete(layers) && has_shape(layers));
        let holders = present.map(holders).unwrap_or_default();
        let has_room = fits(load, usable.len(), config.max_experts);
        let (mut awaited, mut is_lost, mut is_handed_over) = (Vec::new(), false, false);
        for group in holders.difference(whole) {
            let is_needed = present.is_some_and(|present| is_needed(present, *group, whole));
            let takes_along = is_needed && left.contains(group);
            if takes_along && !has_room && serving.contains(group) {
                // it serves until it goes, and may be about to start again: its time begins then
                self.whole_at.insert(*group, now);
            }
            let missed = now.saturating_duration_since(*self.whole_at.entry(*group).or_insert(now));
            // nobody waits for one that leaves with what nobody else has
            is_handed_over |= takes_along && has_room;
            if takes_along && has_room || missed >= config.lost_after.get() {
                is_lost = true;
            } else {
                awaited.push(is_needed);
            }
        }
        if self.changing.is_some() || !self.retry.allows(now) || whole.is_empty() {
            return (false, false);
        }
        let is_loading = self.mending.values().any(|mending| mending.is_running);
        let is_wanted = if is_whole {
            is_lost || (self.is_due && !is_behind)
        } else {
            // those who hold something of a placement that is lost may not all be there yet
            let patience = if holders.is_empty() { config.settle } else { config.lost_after };
            let settled = self.settled.as_ref().map(|(_, since)| now.saturating_duration_since(*since));
            whole.len() >= config.min_groups && settled.is_some_and(|settled| settled >= patience.get())
        };
        // one that leaves may not have the time to wait for copies that are away
        let is_waiting = awaited.iter().any(|is_needed| *is_needed || !(is_whole && is_handed_over));
        (is_wanted && !is_waiting && !is_loading, is_whole)
    }

    /// Shards that are behind, and that no change has prepare something: a life that began since would wait for the end of
    /// the change, which is as long as the slowest shard loads.
    fn mends(&mut self, now: Instant, shards: &[Seen], stands: &Placement) -> Vec<Mend> {
        let mut mends = Vec::new();
        for seen in behind(shards, stands) {
            let (generation, group) = (seen.generation, seen.info.group);
            if self.changing.as_ref().is_some_and(|asked| asked.get(&seen.id) == Some(&generation)) {
                continue;
            }
            let fresh = Mending { generation, group, is_running: false, retry: Retry::default(), failing_since: None };
            let mending = self.mending.entry(Arc::clone(&seen.id)).or_insert(fresh);
            if mending.is_running || !mending.retry.allows(now) {
                continue;
            }
            mending.is_running = true;
            let id = Arc::clone(&seen.id);
            mends.push(Mend { id, generation, epoch: stands.epoch, shares: stands.shares(group) });
        }
        mends
    }
}

/// Shards that stay, and do not follow what stands yet.
fn behind<'a>(shards: &'a [Seen], stands: &Placement) -> impl Iterator<Item = &'a Seen> {
    let epoch = stands.epoch;
    answers(shards).filter(move |(seen, report)| !seen.leaves && report.epoch < epoch).map(|(seen, _)| seen)
}

/// Whether so many groups can hold all experts, without one that holds more than `max_experts` of a layer (0: any).
fn fits(load: &Load, groups: usize, max_experts: usize) -> bool {
    max_experts == 0 || load.values().all(|counts| counts.len() <= max_experts.saturating_mul(groups))
}

/// The groups that hold something.
fn holders(layers: &Layers) -> BTreeSet<usize> {
    layers.values().flatten().flatten().copied().collect()
}

/// Whether a group has experts that none of `others` has.
fn is_needed(layers: &Layers, group: usize, others: &BTreeSet<usize>) -> bool {
    let only_it = |groups: &Vec<usize>| groups.contains(&group) && !groups.iter().any(|group| others.contains(group));
    layers.values().flatten().any(only_it)
}

fn is_complete(layers: &Layers) -> bool {
    !layers.is_empty() && layers.values().flatten().all(|groups| !groups.is_empty())
}

#[cfg(test)]
mod tests;
