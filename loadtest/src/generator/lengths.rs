//! How long prompts and answers are.
use super::mooncake;
use crate::random::Random;
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

/// The most tokens of a prompt or an answer.
pub const LONGEST: usize = 1 << 20;

/// The largest sigma of lognormal lengths: with it one in a hundred is a thousand times the median.
const LARGEST_SIGMA: f64 = 3.0;

/// A distribution of numbers of tokens, each from 1 to [`LONGEST`].
#[derive(Clone, Debug, PartialEq)]
pub enum Lengths {
    /// Always the same.
    Fixed(usize),
    /// Each from the first to the last is as likely.
    Uniform {
        /// The least.
        from: usize,
        /// The largest.
        to: usize,
    },
    /// The logarithm is normally distributed; what is longer than `most` is drawn again.
    LogNormal {
        /// Half are at most this.
        median: usize,
        /// Standard deviation of the natural logarithm.
        sigma: f64,
        /// None is longer.
        most: usize,
    },
    /// Each of a trace's lengths is as likely.
    Trace {
        /// The file's name.
        name: String,
        /// The lengths, at least one.
        lengths: Arc<[usize]>,
    },
}

/// Which lengths of a trace's requests are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Their prompts'.
    Prompt,
    /// Their answers'.
    Answer,
}

const FORMS: &str =
    "use a number of tokens, uniform:FROM..TO, lognormal:MEDIAN:SIGMA, lognormal:MEDIAN:SIGMA:MOST or trace:FILE";

fn tokens(text: &str) -> Result<usize, String> {
    let count = text.parse().ok().filter(|count| (1..=LONGEST).contains(count));
    count.ok_or_else(|| format!("'{text}' is no number of tokens; use 1 to {LONGEST}"))
}

impl Lengths {
    /// Reads `128`, `fixed:128`, `uniform:64..256`, `lognormal:200:0.8`, `lognormal:200:0.8:4000` or `trace:FILE`.
    ///
    /// # Errors
    /// Says what is possible, or what is wrong with the trace's file.
    pub fn parse(text: &str, side: Side) -> Result<Self, String> {
        let (kind, rest) = text.split_once(':').unwrap_or(("fixed", text));
        match kind {
            "fixed" => Ok(Self::Fixed(tokens(rest)?)),
            "uniform" => {
                let (from, to) = rest.split_once("..").ok_or(FORMS)?;
                let (from, to) = (tokens(from)?, tokens(to.trim_start_matches('='))?);
                if from > to {
                    return Err(format!("uniform:{from}..{to} has nothing in it; write the smaller number first"));
                }
                Ok(Self::Uniform { from, to })
            }
            "lognormal" => {
                let mut parts = rest.split(':');
                let median = tokens(parts.next().unwrap_or_default())?;
                let sigma = parts.next().ok_or(FORMS)?;
                let most = parts.next().map_or(Ok(LONGEST), tokens)?;
                let read = sigma.parse().ok().filter(|sigma| (0.0..=LARGEST_SIGMA).contains(sigma));
                let sigma = read.ok_or_else(|| format!("sigma is '{sigma}'; use 0 to {LARGEST_SIGMA}"))?;
                if parts.next().is_some() {
                    return Err(FORMS.into());
                }
                if most < median {
                    return Err(format!("the longest, {most}, is below the median, {median}"));
                }
                Ok(Self::LogNormal { median, sigma, most })
            }
            "trace" => {
                let entries = mooncake::read(Path::new(rest)).map_err(|error| format!("{error:#}"))?;
                let of = |entry: &mooncake::Entry| match side {
                    Side::Prompt => entry.input_length,
                    Side::Answer => entry.output_length,
                };
                let name = Path::new(rest).file_name().unwrap_or_default().to_string_lossy().into_owned();
                Ok(Self::Trace { name, lengths: entries.iter().map(of).collect() })
            }
            _ => Err(FORMS.into()),
        }
    }

    /// One of them.
    pub fn draw(&self, random: &mut Random) -> usize {
        match self {
            Self::Fixed(tokens) => *tokens,
            Self::Uniform { from, to } => from + random.below(to - from + 1),
            Self::LogNormal { median, sigma, most } => loop {
                let drawn = (*median as f64 * (sigma * random.normal()).exp()).round();
                // the median itself can be drawn, so this ends
                if drawn <= *most as f64 {
                    break (drawn as usize).max(1);
                }
            },
            Self::Trace { lengths, .. } => lengths[random.below(lengths.len())],
        }
    }
}

/// Lengths of prompts.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptLengths(pub Lengths);

/// Lengths of answers.
#[derive(Clone, Debug, PartialEq)]
pub struct AnswerLengths(pub Lengths);

impl FromStr for PromptLengths {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Lengths::parse(text, Side::Prompt).map(Self)
    }
}

impl FromStr for AnswerLengths {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Lengths::parse(text, Side::Answer).map(Self)
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(tokens) => write!(f, "{tokens}"),
            Self::Uniform { from, to } => write!(f, "uniform:{from}..{to}"),
            Self::LogNormal { median, sigma, most: LONGEST } => write!(f, "lognormal:{median}:{sigma}"),
            Self::LogNormal { median, sigma, most } => write!(f, "lognormal:{median}:{sigma}:{most}"),
            Self::Trace { name, .. } => write!(f, "trace:{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    fn drawn(text: &str) -> Vec<f64> {
        let (lengths, mut random) = (Lengths::parse(text, Side::Prompt).unwrap(), Random::new(11));
        (0..40_000).map(|_| lengths.draw(&mut random) as f64).collect()
    }

    fn mean(values: &[f64]) -> f64 {
        values.iter().sum::<f64>() / values.len() as f64
    }

    #[test]
    fn lengths_have_their_moments() {
        assert!(drawn("128").iter().all(|length| *length == 128.0));
        let uniform = drawn("uniform:10..20");
        assert!(uniform.iter().all(|length| (10.0..=20.0).contains(length)) && (mean(&uniform) - 15.0).abs() < 0.05);
        // both ends are drawn
        assert!([10.0, 20.0].iter().all(|end| uniform.contains(end)));
        let normal: Vec<f64> = drawn("lognormal:400:0.5").iter().map(|length| length.ln()).collect();
        assert!((mean(&normal) - 400f64.ln()).abs() < 0.01, "{}", mean(&normal));
        let variance = mean(&normal.iter().map(|x| (x - 400f64.ln()).powi(2)).collect::<Vec<_>>());
        assert!((variance.sqrt() - 0.5).abs() < 0.01, "{variance}");
        let cut = drawn("lognormal:400:0.5:500");
        assert!(cut.iter().all(|length| *length <= 500.0) && !cut.contains(&0.0));
        assert!(
            cut.iter().filter(|length| **length == 500.0).count() < 200,
            "the longest is not where all others went"
        );
    }

    #[test]
    fn a_trace_s_lengths_are_drawn_from_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.jsonl");
        let line = |input: u32, output: u32| {
            format!("{{\"timestamp\":0,\"input_length\":{input},\"output_length\":{output},\"hash_ids\":[]}}\n")
        };
        std::fs::write(&path, line(7, 3) + &line(9, 5)).unwrap();
        let text = format!("trace:{}", path.display());
        let prompts = drawn(&text);
        assert!(prompts.iter().all(|length| [7.0, 9.0].contains(length)) && (mean(&prompts) - 8.0).abs() < 0.05);
        let AnswerLengths(answers) = text.parse().unwrap();
        assert!([3, 5].contains(&answers.draw(&mut Random::new(1))) && answers.to_string() == "trace:t.jsonl");
    }

    #[test]
    fn what_is_wrong_is_said_with_the_limit() {
        let cases = [
            ("0", "1 to"),
            ("2000000", "1048576"),
            ("x", "1 to"),
            ("uniform:5", "uniform:FROM..TO"),
            ("uniform:9..3", "smaller"),
            ("lognormal:10", "lognormal:MEDIAN:SIGMA"),
            ("lognormal:10:-1", "0 to 3"),
            ("lognormal:10:1:5", "below the median"),
            ("lognormal:10:1:50:3", "lognormal"),
            ("pareto:3", "lognormal"),
            ("trace:/nowhere/at/all", "nowhere"),
        ];
        for (text, part) in cases {
            let error = Lengths::parse(text, Side::Answer).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        for text in ["128", "uniform:1..2", "lognormal:200:0.8", "lognormal:200:0.8:4000"] {
            assert_eq!(Lengths::parse(text, Side::Answer).unwrap().to_string(), text);
        }
    }
}
