//! What is said of many measurements.
use serde::Serialize;

/// Percentiles of some values, all in one unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// How many there were.
    pub count: usize,
    /// Their mean.
    pub mean: f64,
    /// The least.
    pub min: f64,
    /// Half are at most this.
    pub p50: f64,
    /// Nine in ten are at most this.
    pub p90: f64,
    /// 99 in 100 are at most this.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

/// The value that the share `fraction` (0 to 1) of `sorted` is at most, between neighbours in proportion; 0 of none.
pub fn percentile(sorted: &[f64], fraction: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let place = fraction.clamp(0.0, 1.0) * last as f64;
    let (below, above) = (place.floor() as usize, place.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * (place - below as f64)
}

/// The middle value; 0 of none.
pub fn median(values: &[f64]) -> f64 {
    Summary::of(values.iter().copied()).p50
}

impl Summary {
    /// Of values in any order.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (Some(&min), Some(&max)) = (sorted.first(), sorted.last()) else { return Self::default() };
        Self {
            count: sorted.len(),
            mean: sorted.iter().sum::<f64>() / sorted.len() as f64,
            min,
            p50: percentile(&sorted, 0.5),
            p90: percentile(&sorted, 0.9),
            p99: percentile(&sorted, 0.99),
            max,
        }
    }
}

/// A ratio measured in pairs that were run one after another: what slows both at the time slows its both sides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Ratio {
    /// The median of the pairs' ratios.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Ratio {
    /// Of `(numerator, denominator)` pairs; those with a denominator of 0 say nothing.
    pub fn of(pairs: impl IntoIterator<Item = (f64, f64)>) -> Self {
        let ratios = pairs.into_iter().filter(|(_, below)| *below != 0.0).map(|(above, below)| above / below);
        let Summary { p50, min, max, .. } = Summary::of(ratios);
        Self { median: p50, min, max }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_lie_between_neighbours() {
        let values = [30.0, 10.0, 20.0, 40.0];
        let summary = Summary::of(values);
        assert_eq!((summary.min, summary.p50, summary.max, summary.mean), (10.0, 25.0, 40.0, 25.0));
        assert!((summary.p90 - 37.0).abs() < 1e-9 && (summary.p99 - 39.7).abs() < 1e-9);
        let hundred: Vec<f64> = (0..=100).map(f64::from).collect();
        assert_eq!([0.0, 0.5, 0.99, 1.0].map(|at| percentile(&hundred, at)), [0.0, 50.0, 99.0, 100.0]);
    }

    #[test]
    fn one_value_is_all_of_them_and_none_is_zero() {
        let one = Summary::of([3.0]);
        assert_eq!([one.min, one.p50, one.p90, one.p99, one.max], [3.0; 5]);
        assert_eq!(Summary::of([]), Summary::default());
        assert_eq!(median(&[]), 0.0);
    }

    #[test]
    fn ratios_are_taken_pair_by_pair() {
        // the second pair ran on a machine twice as slow
        let ratio = Ratio::of([(8.0, 10.0), (4.0, 5.0), (9.0, 10.0), (1.0, 0.0)]);
        assert_eq!(ratio, Ratio { median: 0.8, min: 0.8, max: 0.9 });
    }
}
