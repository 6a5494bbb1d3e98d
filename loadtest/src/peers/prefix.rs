//! A shared prefix: times to the first token when it is new, and when it was just asked for.
use super::engine::{Engine, Kind};
use crate::report::{Table, ms, number};
use crate::stats::{Ratio, median};
use std::collections::BTreeMap;

/// What is wanted of Moesaic: its warm time over its cold one, at most.
const TARGET: f64 = 0.06;

/// Times to the first token of one engine in one round, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Times {
    /// Of a prompt whose prefix is new.
    pub cold: f64,
    /// Of one that begins as another did just before.
    pub warm: f64,
}

/// Times of all engines in all rounds that did not fail.
#[derive(Clone, Debug, Default)]
pub struct Prefix(BTreeMap<Kind, Vec<Times>>);

/// What the rounds of one engine say.
struct Middle {
    cold: f64,
    warm: f64,
    share: Ratio,
}

impl Middle {
    fn of(rounds: &[Times]) -> Self {
        let middle = |of: fn(&Times) -> f64| median(&rounds.iter().map(of).collect::<Vec<_>>());
        let share = Ratio::of(rounds.iter().map(|times| (times.warm, times.cold)));
        Self { cold: middle(|times| times.cold), warm: middle(|times| times.warm), share }
    }
}

impl Prefix {
    /// Whether no engine was measured.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds a round's.
    pub fn add(&mut self, kind: Kind, times: Times) {
        self.0.entry(kind).or_default().push(times);
    }

    /// The table.
    pub fn table(&self, title: &str, engines: &[Engine]) -> Table {
        let columns = ["TTFT", "cold ms", "warm ms", "warm / cold", "range", "rounds", "target"];
        let mut table = Table::new(title, &columns);
        for engine in engines {
            let Some(rounds) = self.0.get(&engine.kind) else { continue };
            let Middle { cold, warm, share } = Middle::of(rounds);
            let target = if engine.kind == Kind::Moesaic { TARGET.to_string() } else { String::new() };
            let range = format!("{} to {}", number(share.min), number(share.max));
            let measured = [ms(cold), ms(warm), number(share.median), range, rounds.len().to_string(), target];
            table.row(std::iter::once(engine.name.to_owned()).chain(measured));
        }
        table
    }

    /// The same for programs.
    pub fn values(&self, tokens: usize) -> serde_json::Value {
        let engine = |(kind, rounds): (&Kind, &Vec<Times>)| {
            let Middle { cold, warm, share } = Middle::of(rounds);
            let of = |of: fn(&Times) -> f64| rounds.iter().map(of).collect::<Vec<_>>();
            let values = serde_json::json!({
                "cold_s": of(|times| times.cold), "warm_s": of(|times| times.warm), "median_cold_s": cold,
                "median_warm_s": warm, "warm_over_cold": share,
            });
            (format!("{kind:?}"), values)
        };
        let engines: serde_json::Map<String, serde_json::Value> = self.0.iter().map(engine).collect();
        serde_json::json!({"tokens": tokens, "engines": engines, "target_warm_over_cold": TARGET})
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn each_engine_has_its_own_warm_over_cold() {
        let mut prefix = Prefix::default();
        for (cold, warm) in [(2.0, 0.1), (1.0, 0.06), (4.0, 0.16)] {
            prefix.add(Kind::Moesaic, Times { cold, warm });
        }
        prefix.add(Kind::Ik, Times { cold: 3.0, warm: 0.3 });
        let engines =
            [Kind::Moesaic, Kind::LlamaCpp, Kind::Ik].map(|kind| Engine::new(kind, PathBuf::new(), "1".into()));
        let table = prefix.table("t", &engines);
        assert_eq!(table.rows.len(), 2, "llama.cpp was not measured");
        assert_eq!(table.rows[0], ["Moesaic", "2000", "100", "0.050", "0.040 to 0.060", "3", "0.06"]);
        assert_eq!(table.rows[1], ["ik_llama.cpp", "3000", "300", "0.100", "0.100 to 0.100", "1", ""]);
        let values = prefix.values(2000);
        assert_eq!(values["engines"]["Moesaic"]["warm_s"], serde_json::json!([0.1, 0.06, 0.16]));
        assert_eq!(values["engines"]["Ik"]["median_cold_s"], 3.0);
    }
}
