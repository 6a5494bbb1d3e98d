//! How consecutive pieces of work are cut into tasks: long runs first, short ones at the end.
//!
//! Memory is read fastest in long runs: where threads take turns at neighbouring panels, each one's prefetcher reads into
//! what is the other's (measured with two threads: 29 in place of 18 GB/s). Short runs at the end let a thread that comes
//! late cost little. Source: Polychronopoulos and Kuck, Guided Self-Scheduling (1987).
use std::ops::Range;

/// A thread's share of what is left is taken in so many runs.
const RUNS: usize = 2;

/// Pieces that are left.
pub(crate) struct Runs {
    left: usize,
    threads: usize,
}

impl Runs {
    pub(crate) fn new(pieces: usize, threads: usize) -> Self {
        Self { left: pieces, threads }
    }

    /// Pieces of the next run, but for the bounds that [`Self::cut`] is given.
    pub(crate) fn fair(&self) -> usize {
        let fair = if self.threads > 1 { self.left / (self.threads * RUNS) } else { self.left };
        fair.max(1)
    }

    /// Cuts the next `pieces` of them into runs of at most `most`, and of `least` where there are as many; `put` takes
    /// them in order.
    pub(crate) fn cut(&mut self, pieces: usize, least: usize, most: usize, mut put: impl FnMut(Range<usize>)) {
        let mut first = 0;
        while first < pieces {
            let count = self.fair().max(least).min(most).clamp(1, pieces - first);
            put(first..first + count);
            first += count;
            self.left = self.left.saturating_sub(count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(pieces: &[usize], threads: usize, least: usize, most: usize) -> Vec<usize> {
        let (mut runs, mut lengths) = (Runs::new(pieces.iter().sum(), threads), Vec::new());
        for &pieces in pieces {
            let mut end = 0;
            runs.cut(pieces, least, most, |run| {
                assert_eq!(run.start, end);
                end = run.end;
                lengths.push(run.len());
            });
            assert_eq!(end, pieces);
        }
        lengths
    }

    #[test]
    fn runs_shrink_within_their_bounds_and_are_all() {
        assert_eq!(all(&[48], 2, 1, 48), [12, 9, 6, 5, 4, 3, 2, 1, 1, 1, 1, 1, 1, 1]);
        assert_eq!(all(&[48], 2, 4, 10), [10, 9, 7, 5, 4, 4, 4, 4, 1]);
        assert_eq!(all(&[32, 8, 8], 2, 1, 48), [12, 9, 6, 5, 4, 3, 1, 2, 1, 1, 1, 1, 1, 1]);
        assert_eq!(all(&[48], 1, 1, 48), [48]);
        assert_eq!(all(&[3], 8, 1, 3), [1, 1, 1]);
        assert_eq!(all(&[0], 2, 1, 3), [0; 0]);
    }

    #[test]
    fn the_first_run_is_known_before_it_is_cut() {
        for (pieces, threads) in [(48, 2), (48, 1), (3, 8), (1, 1), (1000, 7)] {
            assert_eq!(all(&[pieces], threads, 1, pieces)[0], Runs::new(pieces, threads).fair());
        }
    }
}
