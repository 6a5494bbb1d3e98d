//! A trace of requests of which many begin alike: groups share a prefix, and some groups are asked for far more often.
use crate::client::{Completion, Prompt};
use crate::load::Arrival;
use crate::random::{Random, Zipf};
use std::time::Duration;

/// What a trace is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// Groups of requests with one prefix each.
    pub groups: usize,
    /// How uneven the groups' popularity is: group `g` is as likely as `1 / (g + 1) ^ exponent`.
    pub exponent: f64,
    /// Tokens of a group's prefix.
    pub prefix_tokens: usize,
    /// Tokens of each request's own, after the prefix.
    pub tail_tokens: usize,
    /// Tokens of each answer.
    pub output_tokens: usize,
    /// Requests.
    pub requests: usize,
    /// Tokens are below this.
    pub vocab: usize,
    /// Decides everything else.
    pub seed: u64,
}

impl Trace {
    /// A group's prefix.
    pub fn prefix(&self, group: usize) -> Vec<u32> {
        Random::named(self.seed, &format!("prefix {group}")).tokens(self.prefix_tokens, self.vocab)
    }

    /// The group of each request.
    pub fn groups(&self) -> Vec<usize> {
        let (zipf, mut random) = (Zipf::new(self.groups, self.exponent), Random::named(self.seed, "groups"));
        (0..self.requests).map(|_| zipf.draw(&mut random)).collect()
    }

    /// The requests.
    pub fn completions(&self) -> Vec<Completion> {
        let request = |(index, group): (usize, usize)| {
            let mut tokens = self.prefix(group);
            tokens.extend(Random::named(self.seed, &format!("tail {index}")).tokens(self.tail_tokens, self.vocab));
            Completion { prompt: Prompt::Tokens(tokens), max_tokens: self.output_tokens }
        };
        self.groups().into_iter().enumerate().map(request).collect()
    }

    /// The requests, so many a second on average, none knowing of the others.
    pub fn arrivals(&self, rate: f64) -> Vec<Arrival> {
        let mut random = Random::named(self.seed, "arrivals");
        let mut after = 0.0;
        let arrival = |completion| {
            after += random.exponential() / rate;
            Arrival { after: Duration::from_secs_f64(after), completion }
        };
        self.completions().into_iter().map(arrival).collect()
    }

    /// The share of prompt tokens, in whole blocks of `block` tokens, that a cache without end would find: what no
    /// policy can be better than.
    pub fn best_hit_rate(&self, block: usize) -> f64 {
        let mut seen = std::collections::HashSet::new();
        let repeated = self.groups().into_iter().filter(|group| !seen.insert(*group)).count();
        let shared = self.prefix_tokens / block * block;
        (repeated * shared) as f64 / (self.requests * (self.prefix_tokens + self.tail_tokens)).max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace() -> Trace {
        Trace {
            groups: 5,
            exponent: 1.0,
            prefix_tokens: 130,
            tail_tokens: 10,
            output_tokens: 4,
            requests: 200,
            vocab: 500,
            seed: 1,
        }
    }

    fn tokens(completion: &Completion) -> &[u32] {
        match &completion.prompt {
            Prompt::Tokens(tokens) => tokens,
            Prompt::Text(_) => &[],
        }
    }

    #[test]
    fn a_group_s_requests_begin_alike_and_end_differently() {
        let (groups, completions) = (trace().groups(), trace().completions());
        assert_eq!((groups.len(), completions.len()), (200, 200));
        for (a, group_a) in completions.iter().zip(&groups) {
            assert_eq!(tokens(a).len(), 140);
            assert!(tokens(a).iter().all(|token| *token < 500) && a.max_tokens == 4);
            for (b, group_b) in completions.iter().zip(&groups).take(20) {
                assert_eq!(tokens(a)[..130] == tokens(b)[..130], group_a == group_b);
                assert_eq!(tokens(a)[130..] == tokens(b)[130..], a == b);
            }
        }
        let count = |group: usize| groups.iter().filter(|&&of| of == group).count();
        assert!(count(0) > 2 * count(4), "the first group is the most popular");
    }

    #[test]
    fn a_trace_is_the_same_each_time_and_another_with_another_seed() {
        assert_eq!(trace().completions(), trace().completions());
        assert_ne!(trace().completions(), Trace { seed: 2, ..trace() }.completions());
    }

    #[test]
    fn arrivals_keep_their_order_and_rate() {
        let arrivals = trace().arrivals(50.0);
        assert!(arrivals.is_sorted_by_key(|arrival| arrival.after));
        let last = arrivals.last().map_or(0.0, |arrival| arrival.after.as_secs_f64());
        assert!((last / 4.0 - 1.0).abs() < 0.3, "200 requests at 50 a second took {last} s");
    }

    #[test]
    fn the_best_hit_rate_is_that_of_all_but_the_groups_first_requests() {
        // one group: 199 of 200 requests find two blocks of 64 in 140 tokens
        let one = Trace { groups: 1, ..trace() };
        assert!((one.best_hit_rate(64) - 199.0 * 128.0 / (200.0 * 140.0)).abs() < 1e-9);
        assert!(trace().best_hit_rate(64) < one.best_hit_rate(64));
    }
}
