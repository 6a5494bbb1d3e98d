//! Which replica takes a request: a pure function of what is known of the replicas.
//!
//! The prefix-aware cost is that of KV-aware routing as NVIDIA's Dynamo has it: blocks of the prompt that must be
//! computed, plus blocks that the replica decodes already; here also the requests that wait there.
use moesaic_types::BLOCK_TOKENS;
use moesaic_types::boundary::ReplicaLoad;
use serde::{Deserialize, Serialize};

/// How a replica is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// The least work: missing prefill plus load.
    #[default]
    PrefixAware,
    /// The fewest requests.
    LeastLoaded,
    /// One after another.
    RoundRobin,
}

/// What each kind of work costs, in KV blocks in use.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weights {
    /// A block of the prompt that must be computed.
    pub prefill: f64,
    /// A request that waits.
    pub queue: f64,
}

/// What is known of a replica that can take the request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Candidate {
    /// Its load when it was last asked.
    pub load: ReplicaLoad,
    /// Requests placed there since.
    pub placed_requests: usize,
    /// Blocks that those will need, prompt and output.
    pub placed_blocks: usize,
    /// Blocks of the request's prompt, from its start, that it is believed to have.
    pub overlap_blocks: usize,
}

impl Candidate {
    fn requests(&self) -> usize {
        self.load.running + self.load.waiting + self.placed_requests
    }

    /// The work that the replica would have with this request.
    fn cost(&self, prompt_tokens: usize, weights: &Weights) -> f64 {
        // The last token is computed whatever is cached: its logits are needed.
        let missing_tokens = prompt_tokens.saturating_sub(self.overlap_blocks * BLOCK_TOKENS).max(1);
        let prefill_blocks = missing_tokens as f64 / BLOCK_TOKENS as f64;
        let decode_blocks = (self.load.kv_blocks_used + self.placed_blocks) as f64;
        let waiting = (self.load.waiting + self.placed_requests) as f64;
        weights.prefill * prefill_blocks + decode_blocks + weights.queue * waiting
    }
}

/// The index of the chosen candidate; `None` if there is none. `turn` grows by one with each decision: it drives
/// round-robin and spreads ties.
pub fn choose(
    policy: Policy,
    weights: &Weights,
    prompt_tokens: usize,
    candidates: &[Candidate],
    turn: usize,
) -> Option<usize> {
    let count = candidates.len();
    if count == 0 {
        return None;
    }
    // In the order of turns, the first of equals wins: equals take turns.
    let in_turn = (0..count).map(|offset| (turn + offset) % count);
    match policy {
        Policy::RoundRobin => Some(turn % count),
        Policy::LeastLoaded => in_turn.min_by_key(|&index| candidates[index].requests()),
        Policy::PrefixAware => in_turn.min_by(|&a, &b| {
            let (a, b) = (&candidates[a], &candidates[b]);
            let by_cost = a.cost(prompt_tokens, weights).total_cmp(&b.cost(prompt_tokens, weights));
            by_cost.then_with(|| a.requests().cmp(&b.requests()))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WEIGHTS: Weights = Weights { prefill: 1.0, queue: 4.0 };

    fn candidate(running: usize, waiting: usize, used: usize, overlap: usize) -> Candidate {
        let load = ReplicaLoad { running, waiting, kv_blocks_used: used, ..ReplicaLoad::default() };
        Candidate { load, overlap_blocks: overlap, ..Candidate::default() }
    }

    fn prefix_aware(prompt_tokens: usize, candidates: &[Candidate]) -> Option<usize> {
        choose(Policy::PrefixAware, &WEIGHTS, prompt_tokens, candidates, 0)
    }

    #[test]
    fn a_long_prefix_outweighs_some_load_but_not_any() {
        let prompt = 40 * BLOCK_TOKENS;
        assert_eq!(prefix_aware(prompt, &[candidate(0, 0, 0, 0), candidate(2, 0, 20, 30)]), Some(1));
        assert_eq!(prefix_aware(prompt, &[candidate(0, 0, 0, 0), candidate(2, 0, 31, 30)]), Some(0));
        assert_eq!(prefix_aware(prompt, &[candidate(0, 0, 0, 0), candidate(2, 8, 0, 30)]), Some(0), "a queue counts");
    }

    #[test]
    fn equal_cost_goes_to_fewer_requests_then_takes_turns() {
        assert_eq!(prefix_aware(10, &[candidate(2, 0, 3, 0), candidate(1, 0, 3, 0)]), Some(1));
        let same = vec![candidate(1, 0, 3, 0); 3];
        for policy in [Policy::PrefixAware, Policy::LeastLoaded, Policy::RoundRobin] {
            let chosen: Vec<_> = (0..6).filter_map(|turn| choose(policy, &WEIGHTS, 10, &same, turn)).collect();
            assert_eq!(chosen, [0, 1, 2, 0, 1, 2], "{policy:?}");
        }
    }

    #[test]
    fn what_was_placed_since_the_last_poll_counts() {
        let mut crowded = candidate(0, 0, 0, 0);
        (crowded.placed_requests, crowded.placed_blocks) = (3, 6);
        for policy in [Policy::PrefixAware, Policy::LeastLoaded] {
            assert_eq!(choose(policy, &WEIGHTS, 10, &[crowded.clone(), candidate(1, 0, 2, 0)], 0), Some(1));
        }
    }

    #[test]
    fn nobody_is_nobody() {
        for policy in [Policy::PrefixAware, Policy::LeastLoaded, Policy::RoundRobin] {
            assert_eq!(choose(policy, &WEIGHTS, 10, &[], 3), None);
        }
    }

    proptest! {
        #[test]
        fn more_overlap_or_less_load_never_loses_to_a_twin(
            prompt in 1usize..10_000, running in 0usize..50, waiting in 0usize..50, used in 0usize..500,
            overlap in 0usize..100, better in 1usize..50, turn in 0usize..7,
        ) {
            let twin = candidate(running, waiting, used, overlap);
            let improved = [
                Candidate { overlap_blocks: overlap + better, ..twin.clone() },
                candidate(running, waiting, used.saturating_sub(better), overlap),
                candidate(running, waiting.saturating_sub(better), used, overlap),
            ];
            for improved in improved {
                let cheaper = improved.cost(prompt, &WEIGHTS) < twin.cost(prompt, &WEIGHTS);
                prop_assert!(improved.cost(prompt, &WEIGHTS) <= twin.cost(prompt, &WEIGHTS));
                if cheaper {
                    let pair = [twin.clone(), improved];
                    prop_assert_eq!(choose(Policy::PrefixAware, &WEIGHTS, prompt, &pair, turn), Some(1));
                }
            }
        }
    }
}
