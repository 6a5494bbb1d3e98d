//! Which replica takes a request: a pure function of what is known of the replicas.
//!
//! The prefix-aware cost is that of KV-aware routing as NVIDIA's Dynamo has it: blocks of the prompt that must be
//! computed, plus blocks that the replica decodes already; here also the requests that wait there, and blocks that the
//! kv-stores have, which cost less than computed ones and the same at every replica.
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
    /// A block that a kv-store has in RAM, as a part of one that must be computed.
    pub store_ram: f64,
    /// The same for one on disk.
    pub store_disk: f64,
    /// A request that waits.
    pub queue: f64,
}

/// What was placed at a replica since it said its load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fresh {
    /// Requests.
    pub requests: usize,
    /// Blocks that those will need, prompt and output.
    pub blocks: usize,
}

/// Blocks of a prompt by where they are; the others must be computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// At the replica, from the prompt's start.
    pub local: usize,
    /// After those, in a kv-store's RAM.
    pub ram: usize,
    /// After those, on a kv-store's disk.
    pub disk: usize,
}

/// What is known of a replica that can take the request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate<'a> {
    /// Its load when it was last told.
    pub load: &'a ReplicaLoad,
    /// What came since.
    pub fresh: Fresh,
}

impl Candidate<'_> {
    fn requests(&self) -> usize {
        self.load.running + self.load.waiting + self.fresh.requests
    }

    /// The work that the replica has.
    fn work(&self, weights: &Weights) -> f64 {
        let decode_blocks = (self.load.kv_blocks_used + self.fresh.blocks) as f64;
        let waiting = (self.load.waiting + self.fresh.requests) as f64;
        decode_blocks + weights.queue * waiting
    }
}

/// The work of the missing prefill.
fn prefill(prompt_tokens: usize, Known { local, ram, disk }: Known, weights: &Weights) -> f64 {
    // The last token is computed whatever is cached: its logits are needed.
    let missing_tokens = prompt_tokens.saturating_sub((local + ram + disk) * BLOCK_TOKENS).max(1);
    let computed = missing_tokens as f64 / BLOCK_TOKENS as f64;
    let fetched = weights.store_ram * ram as f64 + weights.store_disk * disk as f64;
    weights.prefill * (computed + fetched)
}

/// How many requests of so many blocks a replica can take now: those that it can begin at once, and `ahead` more that
/// wait there, so that it has something to go on with before it says that it has room. One that says no limit has room
/// without end; one with nothing to do always has some.
pub fn room(load: &ReplicaLoad, fresh: Fresh, blocks: usize, ahead: usize) -> usize {
    if load.max_running == 0 {
        return usize::MAX;
    }
    let free_blocks = load.kv_blocks_total.saturating_sub(load.kv_blocks_used + fresh.blocks);
    // where requests wait beside free places, something else is missing; it says only how many wait
    let has_places = load.waiting == 0 && (load.kv_blocks_total == 0 || blocks <= free_blocks);
    let places = if has_places { load.max_running.saturating_sub(load.running) } else { 0 };
    (places + ahead).saturating_sub(load.waiting + fresh.requests)
}

/// The index of the chosen candidate; `None` if there is none. What is believed of the prompt's blocks at one is asked for
/// by its index, and only where it can matter. `turn` grows by one with each decision: it drives round-robin and spreads
/// ties.
pub fn choose(
    policy: Policy,
    weights: &Weights,
    prompt_tokens: usize,
    candidates: &[Candidate<'_>],
    known: impl Fn(usize) -> Known,
    turn: usize,
) -> Option<usize> {
    let count = candidates.len();
    if count == 0 {
        return None;
    }
    let first = turn % count;
    // In the order of turns, the first of equals wins: equals take turns.
    let in_turn = (first..count).chain(0..first);
    match policy {
        Policy::RoundRobin => Some(first),
        Policy::LeastLoaded => in_turn.min_by_key(|&index| candidates[index].requests()),
        Policy::PrefixAware => {
            // with all of the prompt in its pool
            let least_prefill = prefill(1, Known::default(), weights);
            let mut least: Option<(f64, usize, usize)> = None;
            for index in in_turn {
                let candidate = &candidates[index];
                let work = candidate.work(weights);
                if least.is_some_and(|(least, ..)| work + least_prefill > least) {
                    continue;
                }
                let (cost, requests) = (work + prefill(prompt_tokens, known(index), weights), candidate.requests());
                let is_less = |least: (f64, usize, usize)| (cost, requests) < (least.0, least.1);
                if least.is_none_or(is_less) {
                    least = Some((cost, requests, index));
                }
            }
            least.map(|(.., index)| index)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WEIGHTS: Weights = Weights { prefill: 1.0, store_ram: 0.2, store_disk: 0.5, queue: 4.0 };

    /// A replica and what is believed of the prompt's blocks there.
    #[derive(Clone, Copy)]
    struct Candidate<'a> {
        load: &'a ReplicaLoad,
        fresh: Fresh,
        known: Known,
    }

    impl Candidate<'_> {
        fn cost(&self, prompt_tokens: usize, weights: &Weights) -> f64 {
            self.bare().work(weights) + prefill(prompt_tokens, self.known, weights)
        }

        fn bare(&self) -> super::Candidate<'_> {
            super::Candidate { load: self.load, fresh: self.fresh }
        }
    }

    fn choose(
        policy: Policy,
        weights: &Weights,
        prompt_tokens: usize,
        candidates: &[Candidate<'_>],
        turn: usize,
    ) -> Option<usize> {
        let bare: Vec<_> = candidates.iter().map(Candidate::bare).collect();
        super::choose(policy, weights, prompt_tokens, &bare, |index| candidates[index].known, turn)
    }

    fn load(running: usize, waiting: usize, used: usize) -> ReplicaLoad {
        ReplicaLoad { running, waiting, kv_blocks_used: used, ..ReplicaLoad::default() }
    }

    /// A candidate whose load lives as long as the test.
    fn candidate(running: usize, waiting: usize, used: usize, local: usize) -> Candidate<'static> {
        let load = Box::leak(Box::new(load(running, waiting, used)));
        Candidate { load, fresh: Fresh::default(), known: Known { local, ..Known::default() } }
    }

    fn prefix_aware(prompt_tokens: usize, candidates: &[Candidate<'_>]) -> Option<usize> {
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
        crowded.fresh = Fresh { requests: 3, blocks: 6 };
        for policy in [Policy::PrefixAware, Policy::LeastLoaded] {
            assert_eq!(choose(policy, &WEIGHTS, 10, &[crowded, candidate(1, 0, 2, 0)], 0), Some(1));
        }
    }

    #[test]
    fn what_the_stores_have_makes_load_count_for_more_than_a_prefix() {
        let prompt = 40 * BLOCK_TOKENS;
        let with = |ram, disk, mut candidate: Candidate<'static>| {
            (candidate.known.ram, candidate.known.disk) = (ram, disk);
            candidate
        };
        // the busy one has 30 blocks of 40, the idle one none
        let busy = || candidate(2, 0, 20, 30);
        assert_eq!(prefix_aware(prompt, &[candidate(0, 0, 0, 0), busy()]), Some(1), "30 to compute against 20 of load");
        assert_eq!(prefix_aware(prompt, &[with(30, 0, candidate(0, 0, 0, 0)), busy()]), Some(0), "6 to fetch");
        assert_eq!(prefix_aware(prompt, &[with(0, 30, candidate(0, 0, 0, 0)), busy()]), Some(0), "15 to read");
        let free = Weights { store_ram: 1.0, store_disk: 1.0, ..WEIGHTS };
        let pair = [with(30, 0, candidate(0, 0, 0, 0)), busy()];
        assert_eq!(choose(Policy::PrefixAware, &free, prompt, &pair, 0), Some(1), "as dear as computing them");
    }

    #[test]
    fn room_is_what_can_begin_and_a_few_more() {
        let of = |running, waiting, requests, blocks| {
            let load = ReplicaLoad { max_running: 8, kv_blocks_total: 100, ..load(running, waiting, 10 * running) };
            room(&load, Fresh { requests, blocks: 0 }, blocks, 2)
        };
        assert_eq!(of(0, 0, 0, 5), 10);
        assert_eq!(of(6, 0, 0, 5), 4);
        assert_eq!(of(6, 0, 3, 5), 1);
        assert_eq!((of(8, 0, 0, 5), of(8, 0, 2, 5), of(8, 2, 0, 5), of(8, 9, 9, 5)), (2, 0, 0, 0));
        assert_eq!(of(6, 1, 0, 5), 1, "places are free, yet one waits: for blocks");
        assert_eq!((of(6, 0, 0, 40), of(6, 0, 0, 41)), (4, 2), "its blocks are not free");
        assert_eq!(of(0, 0, 0, 1000), 2, "one with nothing to do has room for whatever comes");
        assert_eq!(room(&load(500, 500, 0), Fresh { requests: 9, blocks: 9 }, 9, 2), usize::MAX, "it says no limit");
    }

    #[test]
    fn nobody_is_nobody() {
        for policy in [Policy::PrefixAware, Policy::LeastLoaded, Policy::RoundRobin] {
            assert_eq!(choose(policy, &WEIGHTS, 10, &[], 3), None);
        }
    }

    proptest! {
        /// Looking at all of them finds the same: least cost, then fewest requests, then the first in turn.
        #[test]
        fn who_is_passed_over_would_not_have_been_chosen(
            prompt in 1usize..3000, turn in 0usize..9,
            all in prop::collection::vec((0usize..4, 0usize..3, 0usize..40, 0usize..40, 0usize..9), 1..9),
        ) {
            let candidates: Vec<_> = all.iter().map(|(running, waiting, used, local, ram)| {
                let mut candidate = candidate(*running, *waiting, *used, *local);
                candidate.known.ram = *ram;
                candidate
            }).collect();
            let in_turn = (0..all.len()).map(|at| (turn + at) % all.len());
            let least = in_turn.min_by(|a, b| {
                let of = |index: usize| (candidates[index].cost(prompt, &WEIGHTS), candidates[index].bare().requests());
                of(*a).partial_cmp(&of(*b)).unwrap()
            });
            prop_assert_eq!(choose(Policy::PrefixAware, &WEIGHTS, prompt, &candidates, turn), least);
        }

        #[test]
        fn more_overlap_or_less_load_never_loses_to_a_twin(
            prompt in 1usize..10_000, running in 0usize..50, waiting in 0usize..50, used in 0usize..500,
            overlap in 0usize..100, better in 1usize..50, turn in 0usize..7,
        ) {
            let prompt = prompt + (overlap + better) * BLOCK_TOKENS;
            let twin = candidate(running, waiting, used, overlap);
            let improved = [
                Candidate { known: Known { local: overlap + better, ..twin.known }, ..twin },
                Candidate { known: Known { ram: better, ..twin.known }, ..twin },
                Candidate { known: Known { disk: better, ..twin.known }, ..twin },
                candidate(running, waiting, used.saturating_sub(better), overlap),
                candidate(running, waiting.saturating_sub(better), used, overlap),
            ];
            for improved in improved {
                let cheaper = improved.cost(prompt, &WEIGHTS) < twin.cost(prompt, &WEIGHTS);
                prop_assert!(improved.cost(prompt, &WEIGHTS) <= twin.cost(prompt, &WEIGHTS));
                if cheaper {
                    let pair = [twin, improved];
                    prop_assert_eq!(choose(Policy::PrefixAware, &WEIGHTS, prompt, &pair, turn), Some(1));
                }
            }
        }
    }
}
