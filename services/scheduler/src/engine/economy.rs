//! Whether blocks of the prefix store are worth fetching: what that takes against what computing them takes, both as
//! they were measured.
use crate::config::FetchPolicy;
use moesaic_types::BLOCK_TOKENS;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What the newest measurement counts.
const WEIGHT: f64 = 0.2;

/// Steps with fewer prompt tokens say little about the rate of prompts.
const MIN_TOKENS: usize = 32;

/// Of a step's tokens, so many in four at least must be of prompts.
const MIN_SHARE: usize = 3;

/// Once in so many times it is fetched against the estimate: else one that was wrong would never be corrected.
const PROBE_EVERY: u32 = 16;

/// The measurements; shared by the engine and its fetches.
#[derive(Debug)]
pub struct Economy {
    policy: FetchPolicy,
    rates: Mutex<Rates>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Rates {
    /// Seconds to compute a token of a prompt.
    token: Option<f64>,
    /// Seconds until the store says what it has.
    latency: Option<f64>,
    /// Seconds to fetch a byte.
    byte: Option<f64>,
    refused: u32,
}

fn average(average: &mut Option<f64>, sample: f64) {
    *average = Some(average.map_or(sample, |before| before + WEIGHT * (sample - before)));
}

impl Economy {
    /// Nothing was measured yet.
    pub fn new(policy: FetchPolicy) -> Self {
        Self { policy, rates: Mutex::default() }
    }

    fn rates(&self) -> MutexGuard<'_, Rates> {
        self.rates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the store is asked at all.
    pub fn asks(&self) -> bool {
        self.policy != FetchPolicy::Never
    }

    /// A step took this long for so many tokens, some of them of prompts.
    pub fn computed(&self, prompt_tokens: usize, tokens: usize, time: Duration) {
        if prompt_tokens >= MIN_TOKENS && prompt_tokens * 4 >= tokens * MIN_SHARE {
            average(&mut self.rates().token, time.as_secs_f64() / tokens as f64);
        }
    }

    /// The store took this long to say what it has.
    pub fn answered(&self, time: Duration) {
        average(&mut self.rates().latency, time.as_secs_f64());
    }

    /// So many bytes took this long.
    pub fn fetched(&self, bytes: usize, time: Duration) {
        if bytes > 0 {
            average(&mut self.rates().byte, time.as_secs_f64() / bytes as f64);
        }
    }

    /// Whether these blocks are to be fetched. What was not measured yet is tried.
    pub fn is_worth(&self, blocks: usize, block_bytes: usize) -> bool {
        let mut rates = self.rates();
        let (Some(token), Some(latency), Some(byte)) = (rates.token, rates.latency, rates.byte) else {
            return true;
        };
        let fetch = latency + byte * (blocks * block_bytes) as f64;
        let is_cheaper = fetch < token * (blocks * BLOCK_TOKENS) as f64;
        if is_cheaper || self.policy == FetchPolicy::Always {
            rates.refused = 0;
            return true;
        }
        rates.refused += 1;
        rates.refused.is_multiple_of(PROBE_EVERY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Tokens take 1 ms, the store answers in 10 ms and sends 1 MB in 10 ms.
    fn measured(policy: FetchPolicy) -> Economy {
        let economy = Economy::new(policy);
        economy.computed(500, 500, 500 * MS);
        economy.answered(10 * MS);
        economy.fetched(1_000_000, 10 * MS);
        economy
    }

    #[test]
    fn the_cheaper_is_chosen() {
        let economy = measured(FetchPolicy::Estimated);
        assert!(economy.is_worth(1, 5_000_000), "10 + 50 ms against 64");
        assert!(!economy.is_worth(1, 5_500_000), "10 + 55 ms against 64");
        assert!(economy.is_worth(2, 5_500_000), "10 + 110 ms against 128");
        assert!(measured(FetchPolicy::Always).is_worth(1, 1_000_000_000));
        assert!(!measured(FetchPolicy::Never).asks() && economy.asks());
    }

    #[test]
    fn what_is_unknown_is_tried_and_a_bad_estimate_is_tried_again() {
        let new = Economy::new(FetchPolicy::Estimated);
        assert!(new.is_worth(1, 1_000_000_000));
        new.computed(MIN_TOKENS - 1, 31, MS);
        new.computed(500, 1000, MS);
        new.answered(MS);
        new.fetched(0, MS);
        assert!(new.is_worth(1, 1_000_000_000), "those measurements say nothing");
        let economy = measured(FetchPolicy::Estimated);
        let tried = (0..64).filter(|_| economy.is_worth(1, 1_000_000_000)).count();
        assert_eq!(tried, 4);
    }

    #[test]
    fn the_estimate_follows_what_is_measured() {
        let economy = measured(FetchPolicy::Estimated);
        assert!(!economy.is_worth(1, 5_500_000));
        for _ in 0..20 {
            economy.fetched(1_000_000, MS);
        }
        assert!(economy.is_worth(1, 5_500_000));
        for _ in 0..20 {
            economy.computed(500, 500, 5 * MS);
        }
        assert!(!economy.is_worth(1, 5_500_000));
    }
}
