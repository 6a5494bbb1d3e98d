//! What the machine itself can do: the most that any engine could reach.
use crate::stats::Summary;
use anyhow::{Context, Result};
use serde::Serialize;
use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

/// Bytes that each thread reads: several times the largest cache of today's processors, together.
const BYTES: usize = 512 << 20;
/// Words that are added up side by side, so that the processor waits for memory and not for a sum.
const LANES: usize = 64;

/// Limits of this machine, in the run in which the engines are measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Ceilings {
    /// Bytes a second that all threads together read from memory, the largest of the rounds.
    pub read_bytes_s: f64,
    /// Operations a second on int8 of all threads, a multiplication and an addition being two; what the command line
    /// said, if it did.
    pub int8_ops_s: Option<f64>,
}

/// Bytes a second that so many threads read together, in each of `rounds` rounds after one to warm up.
///
/// # Errors
/// When a thread fails.
pub fn read_bandwidth(threads: usize, rounds: usize) -> Result<Vec<f64>> {
    read(threads, rounds, BYTES)
}

fn read(threads: usize, rounds: usize, bytes: usize) -> Result<Vec<f64>> {
    let barrier = Barrier::new(threads);
    let one = || {
        // pages that are written are pages of their own
        let words: Vec<u64> = (0..bytes as u64 / 8).collect();
        let mut times = Vec::with_capacity(rounds + 1);
        for _ in 0..=rounds {
            barrier.wait();
            let begun = Instant::now();
            black_box(sum(black_box(&words)));
            times.push((begun, Instant::now()));
        }
        times
    };
    let of_threads: Vec<Vec<(Instant, Instant)>> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
        running.into_iter().map(std::thread::ScopedJoinHandle::join).collect::<std::thread::Result<_>>()
    })
    .ok()
    .context("a thread that measures the bandwidth failed")?;
    let round = |at: usize| {
        let begun = of_threads.iter().map(|times| times[at].0).min();
        let ended = of_threads.iter().map(|times| times[at].1).max();
        let seconds = begun.zip(ended).map_or(f64::INFINITY, |(begun, ended)| (ended - begun).as_secs_f64());
        (threads * bytes) as f64 / seconds
    };
    Ok((1..=rounds).map(round).collect())
}

fn sum(words: &[u64]) -> u64 {
    let mut lanes = [0u64; LANES];
    let chunks = words.chunks_exact(LANES);
    let rest = chunks.remainder().iter().fold(0u64, |sum, word| sum.wrapping_add(*word));
    for chunk in chunks {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.into_iter().fold(rest, u64::wrapping_add)
}

impl Ceilings {
    /// Of so many threads.
    ///
    /// # Errors
    /// When the measurement fails.
    pub fn measure(threads: usize, int8_gops: Option<f64>) -> Result<Self> {
        let read_bytes_s = Summary::of(read_bandwidth(threads, 8)?).max;
        Ok(Self { read_bytes_s, int8_ops_s: int8_gops.map(|gops| gops * 1e9) })
    }

    /// The larger of each: what slows the machine for a while is no limit of it.
    pub fn or_larger(self, other: Self) -> Self {
        Self {
            read_bytes_s: self.read_bytes_s.max(other.read_bytes_s),
            int8_ops_s: self.int8_ops_s.or(other.int8_ops_s),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    #[test]
    fn all_words_are_read() {
        let words: Vec<u64> = (0..1000).collect();
        assert_eq!(sum(&words), 499_500);
        assert_eq!(sum(&words[..63]), 63 * 31);
    }

    #[test]
    fn each_round_has_a_rate() {
        let rates = read(2, 3, 1 << 20).unwrap();
        assert!(rates.len() == 3 && rates.iter().all(|rate| rate.is_finite() && *rate > 0.0), "{rates:?}");
    }

    #[test]
    fn the_larger_of_two_measurements_is_the_ceiling() {
        let a = Ceilings { read_bytes_s: 2.0, int8_ops_s: None };
        let b = Ceilings { read_bytes_s: 1.0, int8_ops_s: Some(5.0) };
        assert_eq!(a.or_larger(b), Ceilings { read_bytes_s: 2.0, int8_ops_s: Some(5.0) });
    }
}
