//! Gates: which experts a token goes to, and with what weight. Pure functions over one row of logits.
//!
//! Ties go to the lower expert id, so a choice never depends on anything but the row itself. A NaN counts as the
//! smallest value.
use moesaic_types::Routing;
use std::cell::RefCell;
use std::cmp::Ordering;

/// Experts in equal groups, of which only the best are eligible (DeepSeek's node-limited routing).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// How many groups the experts form; divides their number.
    pub count: usize,
    /// How many groups stay eligible.
    pub keep: usize,
}

/// How a gate chooses.
#[derive(Clone, Debug, PartialEq)]
pub enum GatePolicy {
    /// Softmax over all experts, then the best `top_k` (Qwen, OLMoE, Mixtral with `normalize`, DeepSeek-V2).
    /// Groups are ranked by their best expert.
    SoftmaxTopK {
        /// Experts of a token.
        top_k: usize,
        /// Whether the chosen weights are divided by their sum.
        normalize: bool,
        /// Group limits.
        groups: Option<Groups>,
        /// Multiplies the weights.
        scale: f32,
    },
    /// The best `top_k` logits, then softmax over those alone (GPT-OSS, Granite).
    TopKSoftmax {
        /// Experts of a token.
        top_k: usize,
    },
    /// Sigmoid scores; a bias per expert enters the choice but not the weight (DeepSeek-V3, GLM-4).
    /// Groups are ranked by the sum of their two best biased scores.
    Sigmoid {
        /// Experts of a token.
        top_k: usize,
        /// Whether the chosen weights are divided by their sum.
        normalize: bool,
        /// Group limits.
        groups: Option<Groups>,
        /// Multiplies the weights.
        scale: f32,
    },
    /// Softmax, then the smallest set of best experts whose probabilities sum to `p` at least; at least one and at
    /// most `max_active` experts; weights divided by their sum.
    DynamicTopP {
        /// Probability mass to reach, in (0, 1].
        p: f32,
        /// The cap on active experts.
        max_active: usize,
    },
}

impl GatePolicy {
    /// The most experts that a token can go to.
    pub fn max_active(&self) -> usize {
        match *self {
            Self::SoftmaxTopK { top_k, .. } | Self::TopKSoftmax { top_k } | Self::Sigmoid { top_k, .. } => top_k,
            Self::DynamicTopP { max_active, .. } => max_active,
        }
    }

    /// Routes every row of `logits` `[tokens, experts]`; `bias` `[experts]` enters the choice of [`Self::Sigmoid`]. What
    /// `routing` held before is forgotten.
    pub fn route(&self, logits: &[f32], experts: usize, bias: Option<&[f32]>, routing: &mut Routing) {
        let (tokens, active) = (logits.len() / experts, self.max_active().min(experts));
        routing.clear();
        routing.offsets.reserve(tokens);
        routing.experts.reserve(tokens * active);
        routing.weights.reserve(tokens * active);
        SCRATCH.with_borrow_mut(|scratch| {
            for row in logits.chunks_exact(experts) {
                routing.push(self.choose_in(scratch, row, bias));
            }
        });
    }

    /// The experts of one token with their weights, best first.
    pub fn choose(&self, logits: &[f32], bias: Option<&[f32]>) -> Vec<(u32, f32)> {
        self.choose_in(&mut Scratch::default(), logits, bias).collect()
    }

    fn choose_in<'a>(
        &self,
        scratch: &'a mut Scratch,
        logits: &[f32],
        bias: Option<&[f32]>,
    ) -> impl Iterator<Item = (u32, f32)> + use<'a> {
        let Scratch { scores, biased, grouping, chosen, weights } = scratch;
        match *self {
            // the divisor of a softmax over all would cancel
            Self::SoftmaxTopK { top_k, normalize: true, groups: None, scale } => {
                softmax_of_best(logits, top_k, chosen, weights);
                weights.iter_mut().for_each(|weight| *weight *= scale);
            }
            Self::SoftmaxTopK { top_k, normalize, groups, scale } => {
                refill(scores, logits.iter().copied());
                softmax(scores);
                let eligible = groups.map(|groups| grouping.eligible(scores, groups, 1));
                best(scores, eligible, top_k, chosen);
                weigh(chosen, scores, normalize, scale, weights);
            }
            Self::TopKSoftmax { top_k } => softmax_of_best(logits, top_k, chosen, weights),
            Self::Sigmoid { top_k, normalize, groups, scale } => {
                refill(scores, logits.iter().map(|&logit| sigmoid(logit)));
                let ranked = match bias {
                    Some(bias) => {
                        refill(biased, scores.iter().zip(bias).map(|(score, bias)| score + bias));
                        biased
                    }
                    None => &*scores,
                };
                let eligible = groups.map(|groups| grouping.eligible(ranked, groups, 2));
                best(ranked, eligible, top_k, chosen);
                weigh(chosen, scores, normalize, scale, weights);
            }
            Self::DynamicTopP { p, max_active } => {
                refill(scores, logits.iter().copied());
                softmax(scores);
                best(scores, None, max_active.max(1), chosen);
                let mut mass = 0.0;
                let needed = chosen.iter().position(|&expert| {
                    mass += scores[expert as usize];
                    mass >= p
                });
                chosen.truncate(needed.map_or(chosen.len(), |last| last + 1));
                weigh(chosen, scores, true, 1.0, weights);
            }
        }
        chosen.iter().copied().zip(weights.iter().copied())
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Memory that rows use one after another.
#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    biased: Vec<f32>,
    grouping: Grouping,
    /// The experts of a row, best first, and their weights.
    chosen: Vec<u32>,
    weights: Vec<f32>,
}

#[derive(Default)]
struct Grouping {
    members: Vec<u32>,
    sums: Vec<f32>,
    eligible: Vec<bool>,
}

impl Grouping {
    /// Which groups are eligible: those whose `members` best values have the largest sums.
    fn eligible(&mut self, values: &[f32], groups: Groups, members: usize) -> &[bool] {
        let Self { members: chosen, sums, eligible } = self;
        let of_group = |group: &[f32]| {
            best(group, None, members, chosen);
            chosen.iter().map(|&id| group[id as usize]).sum()
        };
        refill(sums, values.chunks_exact(values.len() / groups.count).map(of_group));
        best(sums, None, groups.keep, chosen);
        refill(eligible, (0..groups.count).map(|group| chosen.contains(&(group as u32))));
        eligible
    }
}

fn refill<T>(values: &mut Vec<T>, with: impl Iterator<Item = T>) {
    values.clear();
    values.extend(with);
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// In place.
fn softmax(values: &mut [f32]) {
    let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    values.iter_mut().for_each(|value| *value = (*value - max).exp());
    let sum: f32 = values.iter().sum();
    values.iter_mut().for_each(|value| *value /= sum);
}

/// The ids of the `count` best logits with the softmax over those alone, best first.
fn softmax_of_best(logits: &[f32], count: usize, chosen: &mut Vec<u32>, weights: &mut Vec<f32>) {
    best(logits, None, count, chosen);
    refill(weights, chosen.iter().map(|&expert| logits[expert as usize]));
    softmax(weights);
}

/// Larger first, lower index first among equals, NaN last.
fn rank(values: &[f32], a: usize, b: usize) -> Ordering {
    let key = |index: usize| if values[index].is_nan() { f32::NEG_INFINITY } else { values[index] };
    key(b).partial_cmp(&key(a)).unwrap_or(Ordering::Equal).then(a.cmp(&b))
}

/// The ids of the `count` best values, best first, among the groups that are eligible. Few of many: each value is
/// compared with the worst of those that are kept, and seldom stays.
fn best(values: &[f32], eligible: Option<&[bool]>, count: usize, kept: &mut Vec<u32>) {
    let size = values.len() / eligible.map_or(1, |eligible| eligible.len().max(1));
    kept.clear();
    for id in 0..values.len() {
        if eligible.is_some_and(|eligible| !eligible[id / size]) {
            continue;
        }
        let is_better_than = |&other: &u32| rank(values, id, other as usize).is_lt();
        if kept.len() < count || kept.last().is_some_and(is_better_than) {
            let place = kept.iter().rposition(|other| !is_better_than(other)).map_or(0, |last| last + 1);
            kept.insert(place, id as u32);
            kept.truncate(count);
        }
    }
}

fn weigh(chosen: &[u32], scores: &[f32], normalize: bool, scale: f32, weights: &mut Vec<f32>) {
    let sum: f32 = chosen.iter().map(|&expert| scores[expert as usize]).sum();
    let divisor = if normalize { sum + 1e-20 } else { 1.0 };
    refill(weights, chosen.iter().map(|&expert| scores[expert as usize] / divisor * scale));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn close(a: f32, b: f32) -> bool {
        (a - b).abs() < 1e-5
    }

    #[test]
    fn softmax_then_top_k_keeps_or_normalizes_the_probabilities() {
        let logits = [0.0, 2f32.ln(), 5f32.ln()];
        let policy = |normalize| GatePolicy::SoftmaxTopK { top_k: 2, normalize, groups: None, scale: 1.0 };
        let kept = policy(false).choose(&logits, None);
        assert_eq!([kept[0].0, kept[1].0], [2, 1]);
        assert!(close(kept[0].1, 0.625) && close(kept[1].1, 0.25));
        let normalized = policy(true).choose(&logits, None);
        assert!(close(normalized[0].1, 5.0 / 7.0) && close(normalized[1].1, 2.0 / 7.0));
    }

    #[test]
    fn top_k_then_softmax_sees_only_the_chosen() {
        let chosen = GatePolicy::TopKSoftmax { top_k: 2 }.choose(&[9.0, 1.0, 9.0, f32::NAN], None);
        assert_eq!(chosen, vec![(0, 0.5), (2, 0.5)]);
    }

    #[test]
    fn the_bias_enters_the_choice_but_not_the_weight() {
        let policy = GatePolicy::Sigmoid { top_k: 1, normalize: false, groups: None, scale: 3.0 };
        let chosen = policy.choose(&[0.0, 0.1], Some(&[1.0, 0.0]));
        assert_eq!(chosen, vec![(0, 1.5)]);
    }

    #[test]
    fn groups_are_ranked_by_their_two_best_with_sigmoid_and_by_their_best_with_softmax() {
        // Group 0 has the single best expert, group 1 the best pair.
        let logits = [3.0, -9.0, 2.0, 2.0];
        let groups = Some(Groups { count: 2, keep: 1 });
        let sigmoid = GatePolicy::Sigmoid { top_k: 2, normalize: true, groups, scale: 1.0 };
        assert_eq!(sigmoid.choose(&logits, None), vec![(2, 0.5), (3, 0.5)]);
        let softmax = GatePolicy::SoftmaxTopK { top_k: 2, normalize: true, groups, scale: 1.0 };
        assert_eq!(softmax.choose(&logits, None).iter().map(|c| c.0).collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn dynamic_top_p_takes_the_smallest_sufficient_set_up_to_the_cap() {
        let logits = [0.5f32.ln(), 0.3f32.ln(), 0.15f32.ln(), 0.05f32.ln()];
        let count = |p, max_active| GatePolicy::DynamicTopP { p, max_active }.choose(&logits, None).len();
        assert_eq!([count(0.01, 4), count(0.6, 4), count(0.9, 4), count(1.0, 3)], [1, 2, 3, 3]);
    }

    proptest! {
        #[test]
        fn every_policy_routes_within_bounds_and_matches_a_full_sort(
            logits in proptest::collection::vec(-20f32..20.0, 12), top_k in 1usize..6, p in 0.01f32..1.0,
        ) {
            let groups = Some(Groups { count: 4, keep: 2 });
            let policies = [
                GatePolicy::SoftmaxTopK { top_k, normalize: true, groups: None, scale: 1.0 },
                GatePolicy::SoftmaxTopK { top_k, normalize: false, groups, scale: 2.0 },
                GatePolicy::TopKSoftmax { top_k },
                GatePolicy::Sigmoid { top_k, normalize: true, groups, scale: 1.0 },
                GatePolicy::DynamicTopP { p, max_active: top_k },
            ];
            let mut sorted: Vec<usize> = (0..12).collect();
            sorted.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            for policy in &policies {
                let chosen = policy.choose(&logits, None);
                prop_assert!(!chosen.is_empty() && chosen.len() <= policy.max_active());
                prop_assert!(chosen.iter().all(|&(id, weight)| id < 12 && weight.is_finite() && weight >= 0.0));
                let mut ids: Vec<u32> = chosen.iter().map(|c| c.0).collect();
                ids.sort_unstable();
                ids.dedup();
                prop_assert_eq!(ids.len(), chosen.len());
            }
            let chosen = policies[2].choose(&logits, None);
            prop_assert!(chosen.iter().zip(&sorted).all(|(c, &s)| c.0 as usize == s));
            let sum: f32 = policies[4].choose(&logits, None).iter().map(|c| c.1).sum();
            prop_assert!((sum - 1.0).abs() < 1e-5);
            // A batch routes each row as that row alone.
            let batch: Vec<f32> = logits.iter().chain(logits.iter().rev()).chain(&logits).copied().collect();
            for (policy, bias) in policies.iter().flat_map(|policy| [(policy, None), (policy, Some(&logits[..]))]) {
                let mut routing = Routing::new();
                routing.push([(11, 1.0)]);
                policy.route(&batch, 12, bias, &mut routing);
                prop_assert_eq!(routing.tokens(), 3);
                for (token, row) in batch.chunks_exact(12).enumerate() {
                    prop_assert_eq!(routing.token(token).collect::<Vec<_>>(), policy.choose(row, bias));
                }
            }
        }
    }
}
