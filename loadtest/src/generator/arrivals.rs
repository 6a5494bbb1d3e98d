//! When requests come that do not wait for each other.
use crate::random::Random;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// The least and largest shape of gamma distributed gaps.
const SHAPES: std::ops::RangeInclusive<f64> = 0.01..=1000.0;

/// The process that makes the gaps between arrivals.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrivals {
    /// Requests know nothing of each other: exponential gaps.
    Poisson,
    /// All gaps are the same.
    Constant,
    /// Gamma distributed gaps: below a shape of 1 requests come in bursts, above it more evenly. The gaps' coefficient
    /// of variation is `1 / sqrt(shape)`.
    Gamma {
        /// Above 0; 1 is Poisson.
        shape: f64,
    },
}

impl FromStr for Arrivals {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "poisson" => Ok(Self::Poisson),
            None if text == "constant" => Ok(Self::Constant),
            Some(("gamma", shape)) => match shape.parse() {
                Ok(shape) if SHAPES.contains(&shape) => Ok(Self::Gamma { shape }),
                _ => Err(format!("the shape of gamma is '{shape}'; use {} to {}", SHAPES.start(), SHAPES.end())),
            },
            _ => Err("use poisson, constant, or gamma:SHAPE as gamma:0.25".into()),
        }
    }
}

impl fmt::Display for Arrivals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Poisson => f.write_str("poisson"),
            Self::Constant => f.write_str("constant"),
            Self::Gamma { shape } => write!(f, "gamma:{shape}"),
        }
    }
}

impl Arrivals {
    /// The times from the start, of `rate` arrivals a second on average, without end. The first comes after the first
    /// gap. The same for one seed.
    pub fn times(self, rate: f64, seed: u64) -> impl Iterator<Item = Duration> + Send + 'static {
        let mut random = Random::named(seed, "arrivals");
        let mut at = 0.0;
        std::iter::repeat_with(move || {
            at += match self {
                Self::Poisson => random.exponential(),
                Self::Constant => 1.0,
                Self::Gamma { shape } => random.gamma(shape),
            } / rate;
            Duration::from_secs_f64(at)
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    fn gaps(arrivals: Arrivals, rate: f64) -> Vec<f64> {
        let times: Vec<f64> = arrivals.times(rate, 3).take(50_001).map(|time| time.as_secs_f64()).collect();
        times.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }

    #[test]
    fn gaps_have_the_rate_and_variation_of_their_process() {
        let cases = [
            (Arrivals::Poisson, 1.0),
            (Arrivals::Constant, 0.0),
            (Arrivals::Gamma { shape: 0.25 }, 2.0),
            (Arrivals::Gamma { shape: 4.0 }, 0.5),
        ];
        for (arrivals, variation) in cases {
            let gaps = gaps(arrivals, 20.0);
            let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
            let deviation = (gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
            assert!((mean * 20.0 - 1.0).abs() < 0.03, "{arrivals}: mean {mean}");
            assert!((deviation / mean - variation).abs() < 0.06, "{arrivals}: {}", deviation / mean);
        }
    }

    #[test]
    fn a_seed_s_schedule_is_the_same_and_never_goes_back() {
        let times = |seed| Arrivals::Poisson.times(5.0, seed).take(100).collect::<Vec<_>>();
        assert_eq!(times(1), times(1));
        assert_ne!(times(1), times(2));
        assert!(times(1).is_sorted());
        let constant: Vec<_> = Arrivals::Constant.times(4.0, 9).take(3).collect();
        assert_eq!(constant, [250, 500, 750].map(Duration::from_millis));
    }

    #[test]
    fn it_is_read_as_it_is_written() {
        for text in ["poisson", "constant", "gamma:0.25"] {
            assert_eq!(text.parse::<Arrivals>().unwrap().to_string(), text);
        }
        for wrong in ["", "gamma", "gamma:0", "gamma:-1", "gamma:x", "gamma:1e9", "uniform"] {
            let error = wrong.parse::<Arrivals>().unwrap_err();
            assert!(error.contains("use "), "{wrong}: {error}");
        }
    }
}
