//! Objectives that a request meets or does not.
use crate::client::Answer;
use crate::stats::percentile;
use moesaic_config::HumanDuration;
use serde::Serialize;
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

/// What has a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Objective {
    /// Time to the first token.
    Ttft,
    /// The gap between tokens that 99 in 100 of the request's gaps are at most.
    Itl,
    /// Time for each token after the first, the mean of the request.
    Tpot,
    /// Time to the answer's end.
    E2e,
}

impl Objective {
    const ALL: [(&str, Self); 4] = [("ttft", Self::Ttft), ("itl", Self::Itl), ("tpot", Self::Tpot), ("e2e", Self::E2e)];

    /// Its short name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, of)| *of == self).map_or("", |(name, _)| name)
    }
}

/// Limits that a request must keep all of to be good: `ttft=500ms,itl=50ms`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Slo(pub Vec<(Objective, Duration)>);

impl FromStr for Slo {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut limits: Vec<(Objective, Duration)> = Vec::new();
        for part in text.split(',') {
            let (name, limit) = part.split_once('=').ok_or("write objectives as ttft=500ms,itl=50ms")?;
            let found = Objective::ALL.iter().find(|(of, _)| *of == name.trim());
            let (_, objective) =
                found.ok_or_else(|| format!("'{name}' is no objective; use ttft, itl, tpot or e2e"))?;
            let limit = limit.parse::<HumanDuration>()?.get();
            if limit.is_zero() {
                return Err(format!("{name} is 0; use a longer time"));
            }
            if limits.iter().any(|(of, _)| of == objective) {
                return Err(format!("{name} is there twice"));
            }
            limits.push((*objective, limit));
        }
        Ok(Self(limits))
    }
}

impl fmt::Display for Slo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let limits: Vec<String> =
            self.0.iter().map(|(of, limit)| format!("{}={}", of.name(), HumanDuration(*limit))).collect();
        f.write_str(&limits.join(","))
    }
}

/// The gaps between an answer's events, in seconds.
pub fn gaps(answer: &Answer) -> impl Iterator<Item = f64> + '_ {
    answer.events.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64())
}

impl Slo {
    /// Limits that an answer of a request that was scheduled then does not keep.
    pub fn missed(&self, scheduled: Instant, answer: &Answer) -> Vec<Objective> {
        let is_over = |(objective, limit): &&(Objective, Duration)| {
            let value = match objective {
                Objective::Ttft => (answer.first() - scheduled).as_secs_f64(),
                Objective::E2e => (answer.ended - scheduled).as_secs_f64(),
                // an answer of one token has no gap
                Objective::Tpot => answer.time_per_token().unwrap_or(0.0),
                Objective::Itl => {
                    let mut sorted: Vec<f64> = gaps(answer).collect();
                    sorted.sort_by(f64::total_cmp);
                    percentile(&sorted, 0.99)
                }
            };
            value > limit.as_secs_f64()
        };
        self.0.iter().filter(is_over).map(|(objective, _)| *objective).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    fn answer(scheduled: Instant, events: &[u64]) -> Answer {
        let at = |ms: &u64| scheduled + Duration::from_millis(*ms);
        Answer {
            sent: scheduled,
            events: events.iter().map(at).collect(),
            ended: at(&(events.last().unwrap() + 1)),
            prompt_tokens: 1,
            cached_tokens: 0,
            completion_tokens: events.len(),
            told_usage: true,
        }
    }

    #[test]
    fn each_objective_has_its_own_limit() {
        let scheduled = Instant::now();
        // first at 100 ms, gaps of 10, 10 and 70, their mean 30, the end at 191
        let answer = answer(scheduled, &[100, 110, 120, 190]);
        let missed = |slo: &str| slo.parse::<Slo>().unwrap().missed(scheduled, &answer);
        assert!(missed("ttft=100ms,itl=70ms,tpot=30ms,e2e=191ms").is_empty());
        assert_eq!(missed("ttft=99ms,e2e=1s"), [Objective::Ttft]);
        assert_eq!(missed("itl=60ms,tpot=30ms"), [Objective::Itl]);
        assert_eq!(missed("tpot=29ms,e2e=190ms"), [Objective::Tpot, Objective::E2e]);
        let late = scheduled - Duration::from_millis(50);
        let slo: Slo = "ttft=120ms".parse().unwrap();
        assert_eq!(slo.missed(late, &answer), [Objective::Ttft], "time counts from the schedule");
    }

    #[test]
    fn one_token_has_no_gap_to_miss() {
        let scheduled = Instant::now();
        let slo: Slo = "itl=1ms,tpot=1ms".parse().unwrap();
        assert!(slo.missed(scheduled, &answer(scheduled, &[500])).is_empty());
    }

    #[test]
    fn limits_are_read_as_they_are_written() {
        assert_eq!("ttft=1500ms,itl=50ms".parse::<Slo>().unwrap().to_string(), "ttft=1s500ms,itl=50ms");
        for (wrong, part) in [
            ("ttft", "ttft=500ms"),
            ("ttfb=1s", "ttft, itl, tpot or e2e"),
            ("ttft=5", "no duration"),
            ("ttft=0s", "longer"),
            ("itl=1s,itl=2s", "twice"),
        ] {
            let error = wrong.parse::<Slo>().unwrap_err();
            assert!(error.contains(part), "{wrong}: {error}");
        }
    }
}
