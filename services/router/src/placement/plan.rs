//! Which groups hold which experts: pure functions over plain data.
//!
//! A layer's step takes as long as its busiest group, so each layer is balanced by itself: hot experts get copies, which
//! share their load evenly, and copies are swapped until the busiest group can lose nothing to another (as DeepSeek's
//! EPLB balances, but from what stands, so that little moves). All groups hold the same number of experts to within
//! one, in each layer and over all layers.
use moesaic_types::cluster::Shares;
use std::collections::{BTreeMap, BTreeSet};

/// By the decoder's index of a layer, then by expert: the groups that hold it, ascending.
pub type Layers = BTreeMap<usize, Vec<Vec<usize>>>;

/// By the decoder's index of a layer, then by expert: the tokens that it got. Its shape is the model's.
pub type Load = BTreeMap<usize, Vec<u64>>;

/// What a placement may look like, and when a new one is worth it.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Copies of hot experts, over all groups, in each layer.
    pub redundant_experts: usize,
    /// Groups that hold each expert at least, where there are as many.
    pub min_copies: usize,
    /// Experts of a layer that a group holds at most; gives way where the experts would not fit at all. 0: no limit.
    pub max_experts: usize,
    /// By how much the busiest groups must get less busy for a new placement, as a share.
    pub min_gain: f64,
    /// Tokens of all experts of a layer, below which its load says nothing: what stands there stays, and what is placed
    /// is placed as if it were even.
    pub min_load: u64,
}

/// A new placement.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Who holds what.
    pub layers: Layers,
    /// Experts that a group must load, over all layers and groups.
    pub moves: usize,
    /// The imbalance that is expected.
    pub imbalance: f64,
}

/// A placement of all experts on `groups`, from the one that stands; `None` where that is as good, or nothing can be
/// placed. What is wrong in it (an expert that no group holds, one that is on another group, too few copies, groups
/// that hold too much) is put right whatever the gain.
pub fn plan(load: &Load, groups: &BTreeSet<usize>, limits: &Limits, present: Option<&Layers>) -> Option<Plan> {
    if groups.is_empty() || load.is_empty() {
        return None;
    }
    let mut placed = Layers::new();
    let (mut is_wrong, mut spare) = (present.is_none_or(|present| !present.keys().eq(load.keys())), 0);
    let (mut before, mut after) = (0.0, 0.0);
    for (&index, counts) in load {
        let stands = present.and_then(|present| present.get(&index)).filter(|stands| stands.len() == counts.len());
        let weights = weights(counts, limits.min_load);
        let mut layer = Layer::new(&weights, groups, stands, spare, limits);
        spare = (spare + layer.total) % groups.len();
        layer.mend();
        layer.balance(limits.min_gain / 2.0);
        is_wrong |= layer.is_wrong;
        let found = layer.placed();
        let (was, is) = (stands.map_or(0.0, |stands| busiest(&weights, stands)), busiest(&weights, &found));
        // what is right stays until enough load says otherwise
        let is_better = is_known(counts, limits.min_load) && is_gain(was, is, limits.min_gain);
        let kept = stands.filter(|_| !layer.is_wrong && !is_better);
        before += was;
        after += if kept.is_some() { was } else { is };
        placed.insert(index, kept.cloned().unwrap_or(found));
    }
    let is_worth_it = present != Some(&placed) && (is_wrong || is_gain(before, after, limits.min_gain));
    let imbalance = after * groups.len() as f64 / load.len() as f64;
    is_worth_it.then(|| Plan { moves: moves(present, &placed), layers: placed, imbalance })
}

/// Whether the busiest groups get so much less busy.
fn is_gain(before: f64, after: f64, min_gain: f64) -> bool {
    after < before * (1.0 - EPSILON) && before - after >= before * min_gain
}

/// How much busier the busiest groups are than the average one, over all layers: 1 is even.
pub fn imbalance(load: &Load, placed: &Layers, groups: usize, min_load: u64) -> f64 {
    let of_layer = |(index, counts): (&usize, &Vec<u64>)| {
        placed.get(index).map_or(0.0, |experts| busiest(&weights(counts, min_load), experts))
    };
    load.iter().map(of_layer).sum::<f64>() * groups as f64 / load.len().max(1) as f64
}

/// Experts that groups hold in `after` and not in `before`.
pub fn moves(before: Option<&Layers>, after: &Layers) -> usize {
    let of_layer = |(index, experts): (&usize, &Vec<Vec<usize>>)| {
        let before = before.and_then(|before| before.get(index));
        let of_expert = |(expert, groups): (usize, &Vec<usize>)| {
            let held = before.and_then(|before| before.get(expert));
            groups.iter().filter(|group| held.is_none_or(|held| !held.contains(group))).count()
        };
        experts.iter().enumerate().map(of_expert).sum::<usize>()
    };
    after.iter().map(of_layer).sum()
}

/// Whether shares hold all of others.
pub fn covers(held: &Shares, wanted: &Shares) -> bool {
    wanted.iter().all(|(layer, experts)| {
        experts.iter().all(|expert| held.get(layer).is_some_and(|held| held.binary_search(expert).is_ok()))
    })
}

/// What each expert counts: its share of the layer's load, or all the same where too little is known.
fn weights(counts: &[u64], min_load: u64) -> Vec<f64> {
    if !is_known(counts, min_load) {
        return vec![1.0 / counts.len() as f64; counts.len()];
    }
    let total: u64 = counts.iter().sum();
    counts.iter().map(|count| *count as f64 / total as f64).collect()
}

fn is_known(counts: &[u64], min_load: u64) -> bool {
    counts.iter().sum::<u64>() >= min_load.max(1)
}

/// The load of a layer's busiest group, as a share of the layer's.
fn busiest(weights: &[f64], experts: &[Vec<usize>]) -> f64 {
    let mut by_group = BTreeMap::<usize, f64>::new();
    for (groups, weight) in experts.iter().zip(weights) {
        for group in groups {
            *by_group.entry(*group).or_default() += weight / groups.len() as f64;
        }
    }
    by_group.into_values().fold(0.0, f64::max)
}

/// Differences below are those of rounding.
const EPSILON: f64 = 1e-9;

/// One layer while it is placed. Groups are numbered from 0 here, in the order of `groups`.
struct Layer<'a> {
    weights: &'a [f64],
    groups: Vec<usize>,
    /// By group, by expert: whether it holds it; now and before.
    held: Vec<Vec<bool>>,
    stood: Vec<Vec<bool>>,
    /// By expert: groups that hold it, and that should at least.
    copies: Vec<usize>,
    min_copies: usize,
    /// Of all experts together.
    total: usize,
    /// By group: the experts that it has to hold.
    quota: Vec<usize>,
    /// The first group of those that hold one more than the others.
    spare: usize,
    /// Nothing stands.
    is_new: bool,
    is_wrong: bool,
}

/// Of so many experts, those of one group among `n`; the remainder goes to the groups from `spare` on.
fn share(experts: usize, n: usize, group: usize, spare: usize) -> usize {
    experts / n + usize::from((group + n - spare % n) % n < experts % n)
}

impl<'a> Layer<'a> {
    fn new(
        weights: &'a [f64],
        groups: &BTreeSet<usize>,
        stands: Option<&Vec<Vec<usize>>>,
        spare: usize,
        limits: &Limits,
    ) -> Self {
        let groups: Vec<usize> = groups.iter().copied().collect();
        let (experts, n) = (weights.len(), groups.len());
        let room = if limits.max_experts == 0 { experts * n } else { (limits.max_experts * n).max(experts) };
        let min_copies = limits.min_copies.clamp(1, n);
        let total = (experts * min_copies + limits.redundant_experts).min(experts * n).min(room);
        let quota = (0..n).map(|group| share(total, n, group, spare)).collect();
        let stood: Vec<Vec<bool>> = groups
            .iter()
            .map(|group| match stands {
                Some(stands) => stands.iter().map(|held| held.contains(group)).collect(),
                None => vec![false; experts],
            })
            .collect();
        let copies = (0..experts).map(|expert| stood.iter().filter(|held| held[expert]).count()).collect();
        let on_another = stands.is_some_and(|stands| stands.iter().flatten().any(|group| !groups.contains(group)));
        let (held, is_new) = (stood.clone(), stands.is_none());
        let is_wrong = on_another || is_new;
        Self { weights, groups, held, stood, copies, min_copies, total, quota, spare, is_new, is_wrong }
    }

    fn count(&self, group: usize) -> usize {
        self.held[group].iter().filter(|held| **held).count()
    }

    /// What a group bears of an expert that it holds.
    fn weight(&self, expert: usize) -> f64 {
        self.weights[expert] / self.copies[expert].max(1) as f64
    }

    fn load(&self, group: usize) -> f64 {
        (0..self.weights.len()).filter(|expert| self.held[group][*expert]).map(|expert| self.weight(expert)).sum()
    }

    fn loads(&self) -> Vec<f64> {
        (0..self.groups.len()).map(|group| self.load(group)).collect()
    }

    /// Gives every expert the copies that it should have and every group its quota, and notes what was wrong before.
    fn mend(&mut self) {
        if self.is_new {
            self.split();
        }
        let before: usize = self.copies.iter().sum();
        self.is_wrong |= before != self.total || self.copies.contains(&0);
        self.is_wrong |= (0..self.groups.len()).any(|group| self.count(group) != self.quota[group]);
        let wanted = self.wanted();
        self.drop_copies(&wanted);
        self.add_copies(&wanted);
        self.fill_quotas();
    }

    /// The first placement: experts one after the other, the same number for each group.
    fn split(&mut self) {
        let (experts, n) = (self.weights.len(), self.groups.len());
        let mut next = 0;
        for group in 0..n {
            let count = share(experts, n, group, self.spare);
            for expert in next..next + count {
                self.held[group][expert] = true;
                self.copies[expert] = 1;
            }
            next += count;
        }
    }

    /// Copies by expert: as they are, with as few changes as make the hottest copy as cold as it can be.
    fn wanted(&mut self) -> Vec<usize> {
        let (n, experts) = (self.groups.len(), self.weights.len());
        let mut wanted: Vec<usize> = self.copies.iter().map(|copies| (*copies).max(1)).collect();
        let hotness = |expert: usize, copies: usize| self.weights[expert] / copies as f64;
        let hottest = |wanted: &[usize], below: usize| {
            let more = (0..experts).filter(|expert| wanted[*expert] < below);
            more.min_by(|a, b| hotness(*b, wanted[*b]).total_cmp(&hotness(*a, wanted[*a])).then(a.cmp(b)))
        };
        // the one whose copies get the least hot when it loses one
        let coldest = |wanted: &[usize], above: usize| {
            let less = (0..experts).filter(|expert| wanted[*expert] > above);
            less.min_by(|a, b| hotness(*a, wanted[*a] - 1).total_cmp(&hotness(*b, wanted[*b] - 1)).then(b.cmp(a)))
        };
        let sum = |wanted: &[usize]| wanted.iter().sum::<usize>();
        while sum(&wanted) > self.total {
            let Some(expert) = coldest(&wanted, self.min_copies).or_else(|| coldest(&wanted, 1)) else { break };
            wanted[expert] -= 1;
        }
        while sum(&wanted) < self.total {
            let Some(expert) = hottest(&wanted, self.min_copies).or_else(|| hottest(&wanted, n)) else { break };
            wanted[expert] += 1;
        }
        let mut is_short = false;
        while let (Some(to), Some(from)) = (hottest(&wanted, self.min_copies), coldest(&wanted, self.min_copies)) {
            is_short = true;
            (wanted[to], wanted[from]) = (wanted[to] + 1, wanted[from] - 1);
        }
        let least = self.min_copies.min(wanted.iter().copied().min().unwrap_or(1));
        // where not all can have what they should at least, none has more
        let most = if least < self.min_copies { self.min_copies } else { n };
        while let (Some(to), Some(from)) = (hottest(&wanted, most), coldest(&wanted, least)) {
            // one that is about as hot is not worth the move
            if to == from || hotness(to, wanted[to]) <= hotness(from, wanted[from] - 1) * (1.0 + EPSILON) {
                break;
            }
            (wanted[to], wanted[from]) = (wanted[to] + 1, wanted[from] - 1);
        }
        self.is_wrong |= is_short;
        wanted
    }

    fn drop_copies(&mut self, wanted: &[usize]) {
        for (expert, wanted) in wanted.iter().enumerate() {
            while self.copies[expert] > *wanted {
                let loads = self.loads();
                let holders = (0..self.groups.len()).filter(|group| self.held[*group][expert]);
                let over = |group: usize| self.count(group) as isize - self.quota[group] as isize;
                let most =
                    holders.max_by(|a, b| over(*a).cmp(&over(*b)).then(loads[*a].total_cmp(&loads[*b])).then(b.cmp(a)));
                let Some(group) = most else { break };
                self.held[group][expert] = false;
                self.copies[expert] -= 1;
            }
        }
    }

    /// The hottest first, each to the group with room that is the least busy.
    fn add_copies(&mut self, wanted: &[usize]) {
        let mut missing: Vec<usize> =
            (0..wanted.len()).filter(|expert| self.copies[*expert] < wanted[*expert]).collect();
        let weight = |expert: usize| self.weights[expert] / wanted[expert] as f64;
        missing.sort_by(|a, b| weight(*b).total_cmp(&weight(*a)).then(a.cmp(b)));
        for expert in missing {
            while self.copies[expert] < wanted[expert] {
                let loads = self.loads();
                let others = (0..self.groups.len()).filter(|group| !self.held[*group][expert]);
                let over = |group: usize| (self.count(group) + 1).saturating_sub(self.quota[group]);
                let least = others.min_by(|a, b| {
                    let costs_nothing = |group: usize| !self.stood[group][expert];
                    over(*a)
                        .cmp(&over(*b))
                        .then(costs_nothing(*a).cmp(&costs_nothing(*b)))
                        .then(loads[*a].total_cmp(&loads[*b]))
                        .then(a.cmp(b))
                });
                let Some(group) = least else { break };
                self.held[group][expert] = true;
                self.copies[expert] += 1;
            }
        }
    }

    /// Moves copies from groups that hold too many to those that hold too few.
    fn fill_quotas(&mut self) {
        let n = self.groups.len();
        let is_over = |layer: &Self, group: usize| layer.count(group) > layer.quota[group];
        let is_under = |layer: &Self, group: usize| layer.count(group) < layer.quota[group];
        while let (Some(from), Some(to)) =
            ((0..n).find(|group| is_over(self, *group)), (0..n).find(|group| is_under(self, *group)))
        {
            let (load_from, load_to) = (self.load(from), self.load(to));
            let movable = (0..self.weights.len()).filter(|expert| self.held[from][*expert] && !self.held[to][*expert]);
            let cost = |expert: usize| isize::from(self.stood[from][expert]) - isize::from(self.stood[to][expert]);
            let busier = |expert: usize| (load_from - self.weight(expert)).max(load_to + self.weight(expert));
            let best =
                movable.min_by(|a, b| cost(*a).cmp(&cost(*b)).then(busier(*a).total_cmp(&busier(*b))).then(b.cmp(a)));
            // quotas differ by one at most, so that `from` holds more than `to`, and one that `to` lacks
            let Some(expert) = best else { break };
            (self.held[from][expert], self.held[to][expert]) = (false, true);
        }
    }

    /// Swaps experts of the busiest group for lighter ones of others, the best swap first, until it is within
    /// `tolerance` of the average or cannot get less busy.
    fn balance(&mut self, tolerance: f64) {
        let (n, experts) = (self.groups.len(), self.weights.len());
        let mut loads = self.loads();
        let mean = loads.iter().sum::<f64>() / n as f64;
        // each swap makes two groups more alike, so that it ends; a bound for rounding's sake
        for _ in 0..4 * experts * n {
            let Some(busiest) = (0..n).max_by(|a, b| loads[*a].total_cmp(&loads[*b]).then(b.cmp(a))) else { return };
            if loads[busiest] <= mean * (1.0 + tolerance) {
                return;
            }
            let Some((other, gives, takes)) = self.best_swap(busiest, &loads) else { return };
            (self.held[busiest][gives], self.held[other][gives]) = (false, true);
            (self.held[busiest][takes], self.held[other][takes]) = (true, false);
            (loads[busiest], loads[other]) = (self.load(busiest), self.load(other));
        }
    }

    /// The swap that leaves the busier of the two groups the least busy: with whom, what it gives, what it takes.
    fn best_swap(&self, busiest: usize, loads: &[f64]) -> Option<(usize, usize, usize)> {
        let mut best = None;
        for other in (0..self.groups.len()).filter(|other| *other != busiest) {
            let only = |a: usize, b: usize| {
                (0..self.weights.len()).filter(move |expert| self.held[a][*expert] && !self.held[b][*expert])
            };
            for gives in only(busiest, other) {
                for takes in only(other, busiest) {
                    let change = self.weight(gives) - self.weight(takes);
                    let busier = (loads[busiest] - change).max(loads[other] + change);
                    let least = best.map_or(loads[busiest], |(least, _)| least);
                    if busier < least - EPSILON {
                        best = Some((busier, (other, gives, takes)));
                    }
                }
            }
        }
        best.map(|(_, swap)| swap)
    }

    fn placed(&self) -> Vec<Vec<usize>> {
        let holders = |expert: usize| {
            let held = self.groups.iter().zip(&self.held).filter(|(_, held)| held[expert]);
            held.map(|(group, _)| *group).collect()
        };
        (0..self.weights.len()).map(holders).collect()
    }
}

#[cfg(test)]
mod tests;
