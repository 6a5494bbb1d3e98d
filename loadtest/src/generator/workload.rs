//! What is asked: each request by its number, the same for one seed whatever was asked before.
use super::lengths::Lengths;
use super::mooncake::Entry;
use crate::random::{Random, Zipf};
use std::sync::Arc;
use std::time::Duration;

/// A request's prompt as tokens, and how long its answer shall be.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// The prompt; what is not sent as tokens is made into text of about as many.
    pub tokens: Vec<u32>,
    /// Tokens of the answer.
    pub answer_tokens: usize,
}

/// Tokens that prompts are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vocabulary {
    /// The first.
    pub from: u32,
    /// All are below this.
    pub to: u32,
}

impl Vocabulary {
    fn tokens(self, random: &mut Random, count: usize) -> Vec<u32> {
        let width = (self.to - self.from) as usize;
        (0..count).map(|_| self.from + random.below(width) as u32).collect()
    }
}

/// Groups of requests whose prompts begin alike.
#[derive(Clone, Debug, PartialEq)]
pub struct Groups {
    /// How many.
    pub count: usize,
    /// Tokens of each group's prefix, which come before those of the prompt's own length.
    pub prefix: Lengths,
    /// Group `g` is as likely as `1 / (g + 1) ^ exponent`.
    pub exponent: f64,
}

/// Where requests come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// Drawn from distributions, without end.
    Drawn {
        /// Tokens of each prompt's own.
        prompts: Lengths,
        /// Tokens of each answer.
        answers: Lengths,
        /// Prefixes that come before.
        groups: Option<Groups>,
    },
    /// Those of a trace, once.
    Trace {
        /// The requests, and when they come.
        entries: Arc<[(Duration, Entry)]>,
        /// Tokens of a block.
        block: usize,
    },
}

/// All requests of a run.
#[derive(Clone, Debug)]
pub struct Workload {
    source: Source,
    vocabulary: Vocabulary,
    seed: u64,
    zipf: Option<Zipf>,
}

impl Workload {
    /// Requests of a source; another seed gives others.
    pub fn new(source: Source, vocabulary: Vocabulary, seed: u64) -> Self {
        let zipf = match &source {
            Source::Drawn { groups: Some(groups), .. } => Some(Zipf::new(groups.count, groups.exponent)),
            _ => None,
        };
        Self { source, vocabulary, seed, zipf }
    }

    /// How many there are; `None` without end.
    pub fn len(&self) -> Option<usize> {
        match &self.source {
            Source::Drawn { .. } => None,
            Source::Trace { entries, .. } => Some(entries.len()),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// When a trace's requests come.
    pub fn trace_times(&self) -> Option<Vec<Duration>> {
        match &self.source {
            Source::Drawn { .. } => None,
            Source::Trace { entries, .. } => Some(entries.iter().map(|(after, _)| *after).collect()),
        }
    }

    fn random(&self, what: &str, number: impl std::fmt::Display) -> Random {
        Random::named(self.seed, &format!("{what} {number}"))
    }

    /// A request; `None` after the last of a trace.
    pub fn request(&self, index: usize) -> Option<Wanted> {
        match &self.source {
            Source::Drawn { prompts, answers, groups } => {
                let mut lengths = self.random("lengths", index);
                let (own, answer_tokens) = (prompts.draw(&mut lengths), answers.draw(&mut lengths));
                let mut tokens = match (groups, &self.zipf) {
                    (Some(groups), Some(zipf)) => self.prefix(groups, zipf.draw(&mut self.random("group", index))),
                    _ => Vec::new(),
                };
                tokens.extend(self.vocabulary.tokens(&mut self.random("prompt", index), own));
                Some(Wanted { tokens, answer_tokens })
            }
            Source::Trace { entries, block } => {
                let (_, entry) = entries.get(index)?;
                let mut tokens = Vec::with_capacity(entry.input_length);
                for id in &entry.hash_ids {
                    let left = entry.input_length - tokens.len();
                    // a shorter last block is the beginning of the whole one
                    tokens.extend(self.vocabulary.tokens(&mut self.random("block", id), left.min(*block)));
                }
                let left = entry.input_length - tokens.len();
                tokens.extend(self.vocabulary.tokens(&mut self.random("prompt", index), left));
                Some(Wanted { tokens, answer_tokens: entry.output_length })
            }
        }
    }

    fn prefix(&self, groups: &Groups, group: usize) -> Vec<u32> {
        let mut random = self.random("prefix", group);
        let count = groups.prefix.draw(&mut random);
        self.vocabulary.tokens(&mut random, count)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;
    use crate::generator::mooncake::{Scale, parse};

    const VOCABULARY: Vocabulary = Vocabulary { from: 100, to: 400 };

    fn drawn(groups: Option<Groups>) -> Source {
        Source::Drawn { prompts: Lengths::Uniform { from: 5, to: 9 }, answers: Lengths::Fixed(4), groups }
    }

    #[test]
    fn a_request_is_the_same_each_time_and_others_with_another_seed() {
        let load = |seed| Workload::new(drawn(None), VOCABULARY, seed);
        let (a, b) = (load(1), load(2));
        for index in [0, 7, 3] {
            let wanted = a.request(index).unwrap();
            assert_eq!(wanted, load(1).request(index).unwrap());
            assert_ne!(wanted, b.request(index).unwrap());
            assert!((5..=9).contains(&wanted.tokens.len()) && wanted.answer_tokens == 4);
            assert!(wanted.tokens.iter().all(|token| (100..400).contains(token)));
        }
        assert_eq!((a.len(), a.is_empty(), a.trace_times()), (None, false, None));
    }

    #[test]
    fn a_group_s_requests_begin_alike_and_the_first_group_is_the_most_popular() {
        let groups = Groups { count: 3, prefix: Lengths::Fixed(20), exponent: 1.0 };
        let load = Workload::new(drawn(Some(groups)), VOCABULARY, 5);
        let mut by_prefix = std::collections::BTreeMap::<Vec<u32>, usize>::new();
        for index in 0..300 {
            let wanted = load.request(index).unwrap();
            assert!((25..=29).contains(&wanted.tokens.len()));
            *by_prefix.entry(wanted.tokens[..20].to_vec()).or_default() += 1;
        }
        let mut counts: Vec<usize> = by_prefix.into_values().collect();
        counts.sort_unstable();
        // 300 of weights 6, 3, 2
        assert_eq!(counts.len(), 3);
        for (count, expected) in counts.iter().zip([54.5, 81.8, 163.6]) {
            assert!((*count as f64 - expected).abs() < 30.0, "{counts:?}");
        }
    }

    #[test]
    fn a_trace_s_requests_share_the_blocks_that_have_one_number() {
        let lines = r#"{"timestamp":0,"input_length":1100,"output_length":2,"hash_ids":[7,8,9]}
            {"timestamp":10,"input_length":1200,"output_length":3,"hash_ids":[7,8,10]}
            {"timestamp":20,"input_length":600,"output_length":1,"hash_ids":[7]}"#;
        let entries = Scale::NONE.apply(&parse(lines.as_bytes()).unwrap()).unwrap();
        let load = Workload::new(Source::Trace { entries: entries.into(), block: 512 }, VOCABULARY, 1);
        let prompt = |index| load.request(index).unwrap().tokens;
        assert_eq!([prompt(0).len(), prompt(1).len(), prompt(2).len()], [1100, 1200, 600]);
        assert_eq!(prompt(0)[..1024], prompt(1)[..1024]);
        assert_ne!(prompt(0)[1024..1100], prompt(1)[1024..1100]);
        assert_eq!(prompt(2)[..512], prompt(0)[..512]);
        assert_ne!(prompt(2)[512..600], prompt(0)[512..600], "what has no block is a request's own");
        assert_eq!((load.request(1).unwrap().answer_tokens, load.request(3), load.len()), (3, None, Some(3)));
        assert_eq!(load.trace_times().unwrap(), [0, 10, 20].map(Duration::from_millis));
    }
}
