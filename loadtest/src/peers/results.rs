//! What was measured of all engines, and the tables of it.
use super::bench::Test;
use super::ceiling::Ceilings;
use super::engine::{Kind, Kv};
use crate::model::Shape;
use crate::report::{Table, number, percent};
use crate::stats::{Ratio, median};
use serde::Serialize;
use std::collections::BTreeMap;

/// One thing that all engines do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Case {
    /// One engine's benchmark program.
    Alone {
        /// What it measures.
        test: Test,
        /// How Moesaic stores keys and values. A peer has its better way in each.
        kv: Kv,
    },
    /// Servers with so many clients; tokens a second of all together.
    Serve {
        /// Clients at once.
        clients: usize,
        /// Beside a process that uses a core.
        busy: bool,
    },
}

impl Case {
    /// What tables call it.
    pub fn name(self) -> String {
        match self {
            Self::Alone { test: test @ Test::Generation { depth: 1.., .. }, kv: Kv::Bf16 } => {
                format!("{}, 16-bit KV", test.name())
            }
            Self::Alone { test: test @ Test::Generation { depth: 1.., .. }, kv: Kv::Int8 } => {
                format!("{}, int8 KV", test.name())
            }
            Self::Alone { test, .. } => test.name(),
            Self::Serve { clients, busy: false } => format!("server, {clients} client(s)"),
            Self::Serve { clients, busy: true } => format!("server, {clients} client(s), one core busy"),
        }
    }

    /// What is wanted of Moesaic over the better peer; `None` where nothing is.
    fn target(self, large: bool) -> Option<f64> {
        match self {
            Self::Alone { test: Test::Prompt { .. }, .. } if large => Some(1.4),
            Self::Alone { test: Test::Generation { .. }, .. } if large => Some(1.0),
            Self::Alone { test: Test::Generation { depth: 0, .. }, .. } => Some(1.05),
            Self::Alone { test: Test::Generation { .. }, kv: Kv::Bf16 } => Some(1.5),
            Self::Alone { test: Test::Generation { .. }, kv: Kv::Int8 } => Some(1.7),
            Self::Alone { test: Test::Prompt { tokens }, .. } => Some(if tokens > 1024 { 1.5 } else { 1.4 }),
            Self::Serve { clients: 1, busy: false } => Some(1.2),
            Self::Serve { clients: 2..=4, busy: false } => Some(1.6),
            Self::Serve { clients: 16, busy: false } => Some(2.0),
            Self::Serve { .. } => None,
        }
    }

    /// The share of the machine's limit that an engine's rate is: of what memory can be read, or of the operations. With
    /// a context a peer has none: which of its formats was the better one is not kept.
    fn share(self, kind: Kind, rate: f64, shape: &Shape, ceilings: &Ceilings) -> Option<f64> {
        match self {
            Self::Alone { test: Test::Prompt { .. }, .. } => {
                ceilings.int8_ops_s.map(|limit| rate * shape.operations_a_token() as f64 / limit)
            }
            Self::Alone { test: Test::Generation { depth: 1.., .. }, .. } if kind != Kind::Moesaic => None,
            Self::Alone { test: Test::Generation { tokens, depth }, kv } => {
                let values = 2 * shape.layers * shape.kv_heads * shape.head_dim;
                // int8 has an f32 scale for each token and head
                let bytes = if kv == Kv::Bf16 { 2.0 } else { 1.0 + 4.0 / shape.head_dim as f64 };
                let context = depth as f64 + tokens as f64 / 2.0;
                let read = shape.bytes_a_token() as f64 + values as f64 * bytes * context;
                Some(rate * read / ceilings.read_bytes_s)
            }
            Self::Serve { .. } => None,
        }
    }
}

/// Values of one case: those of each round, by engine; a round that failed has none.
pub type Rounds = BTreeMap<Kind, Vec<Option<f64>>>;

/// All values.
#[derive(Clone, Debug, Default)]
pub struct Results {
    cases: BTreeMap<Case, Rounds>,
    /// What failed, in words.
    pub failures: Vec<String>,
    /// What failed once and was tried again, in words.
    pub tried_again: Vec<String>,
}

/// The median of the rounds that did not fail.
fn middle(rounds: &[Option<f64>]) -> Option<f64> {
    let values: Vec<f64> = rounds.iter().flatten().copied().collect();
    (!values.is_empty()).then(|| median(&values))
}

/// Moesaic over a peer or the better one, round by round. A peer that was measured in other rounds must be in this one
/// too: without it the better one is not known.
fn ratio(rounds: &Rounds, of_peers: &[Kind]) -> Option<Ratio> {
    let own = rounds.get(&Kind::Moesaic)?;
    let was_measured = |values: &&Vec<Option<f64>>| values.iter().any(Option::is_some);
    let peers: Vec<_> = of_peers.iter().filter_map(|kind| rounds.get(kind)).filter(was_measured).collect();
    let pair = |(at, own): (usize, &Option<f64>)| {
        let of_round: Option<Vec<f64>> = peers.iter().map(|values| values.get(at).copied().flatten()).collect();
        let better = of_round?.into_iter().reduce(f64::max)?;
        (*own).map(|own| (own, better)).filter(|_| better > 0.0)
    };
    let pairs: Vec<(f64, f64)> = own.iter().enumerate().filter_map(pair).collect();
    (!pairs.is_empty()).then(|| Ratio::of(pairs))
}

/// An engine's cell: its rate, and in parentheses what must be known to read it.
fn cell(case: Case, kind: Kind, rounds: &Rounds, shape: &Shape, ceilings: &Ceilings) -> String {
    let values = rounds.get(&kind).map_or(&[][..], Vec::as_slice);
    let Some(rate) = middle(values) else { return "-".to_owned() };
    let (measured, all) = (values.iter().flatten().count(), rounds.values().map(Vec::len).max().unwrap_or(0));
    let share = case.share(kind, rate, shape, ceilings).map(percent);
    let holes = (measured < all).then(|| format!("{measured} of {all} rounds"));
    let remarks: Vec<String> = [share, holes].into_iter().flatten().collect();
    if remarks.is_empty() { number(rate) } else { format!("{} ({})", number(rate), remarks.join(", ")) }
}

const PEERS: [Kind; 2] = [Kind::LlamaCpp, Kind::Ik];

impl Results {
    /// Whether no engine has a value in any case.
    pub fn is_empty(&self) -> bool {
        self.cases.values().flat_map(BTreeMap::values).flatten().all(Option::is_none)
    }

    /// Adds a round's value.
    pub fn add(&mut self, case: Case, kind: Kind, round: usize, value: Option<f64>) {
        let values = self.cases.entry(case).or_default().entry(kind).or_default();
        values.resize(values.len().max(round + 1), None);
        values[round] = value;
    }

    /// What a case's ratio is held against: its target, or beside a busy process the ratio without it.
    fn target(&self, case: Case, large: bool) -> String {
        if let Case::Serve { clients, busy: true } = case {
            let without = self.cases.get(&Case::Serve { clients, busy: false });
            let without = without.and_then(|rounds| ratio(rounds, &PEERS));
            return without.map_or_else(String::new, |ratio| format!("{} (without)", number(ratio.median)));
        }
        case.target(large).map_or_else(String::new, |target| format!("{target}"))
    }

    /// The table of ratios and shares.
    pub fn table(&self, title: &str, shape: &Shape, ceilings: &Ceilings, large: bool) -> Table {
        let columns = [
            "tok/s (share of the machine's limit)",
            "Moesaic",
            "llama.cpp",
            "ik_llama.cpp",
            "ratio to the better",
            "rounds",
            "to llama.cpp",
            "target",
        ];
        let mut table = Table::new(title, &columns);
        for (case, rounds) in &self.cases {
            let cell = |kind: Kind| cell(*case, kind, rounds, shape, ceilings);
            let ratios = ratio(rounds, &PEERS);
            table.row([
                case.name(),
                cell(Kind::Moesaic),
                cell(Kind::LlamaCpp),
                cell(Kind::Ik),
                ratios.map_or_else(|| "-".into(), |ratio| number(ratio.median)),
                ratios.map_or_else(|| "-".into(), |ratio| format!("{} to {}", number(ratio.min), number(ratio.max))),
                ratio(rounds, &PEERS[..1]).map_or_else(|| "-".into(), |ratio| number(ratio.median)),
                self.target(*case, large),
            ]);
        }
        table
    }

    /// The same for programs.
    pub fn values(&self, shape: &Shape, ceilings: &Ceilings) -> serde_json::Value {
        let of_case = |(case, rounds): (&Case, &Rounds)| {
            let engine = |(kind, values): (&Kind, &Vec<Option<f64>>)| {
                let rate = middle(values);
                let share = rate.and_then(|rate| case.share(*kind, rate, shape, ceilings));
                (format!("{kind:?}"), serde_json::json!({"rounds": values, "median": rate, "share": share}))
            };
            let engines: serde_json::Map<String, serde_json::Value> = rounds.iter().map(engine).collect();
            serde_json::json!({
                "case": case, "name": case.name(), "engines": engines, "ratio_to_better": ratio(rounds, &PEERS),
                "ratio_to_llama_cpp": ratio(rounds, &PEERS[..1]),
            })
        };
        serde_json::json!({
            "cases": self.cases.iter().map(of_case).collect::<Vec<_>>(), "failures": self.failures,
            "tried_again": self.tried_again,
            "bytes_a_token": shape.bytes_a_token(), "operations_a_token": shape.operations_a_token(),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;
    use crate::model::Preset;

    const GENERATION: Case = Case::Alone { test: Test::Generation { tokens: 128, depth: 0 }, kv: Kv::Bf16 };

    fn results() -> Results {
        let mut results = Results::default();
        // the second round ran on a machine half as fast
        for (kind, values) in
            [(Kind::Moesaic, [200.0, 100.0]), (Kind::LlamaCpp, [150.0, 75.0]), (Kind::Ik, [180.0, 90.0])]
        {
            for (round, value) in values.into_iter().enumerate() {
                results.add(GENERATION, kind, round, Some(value));
            }
        }
        results
    }

    #[test]
    fn ratios_are_taken_round_by_round_to_the_better_peer() {
        let values = results();
        let rounds = &values.cases[&GENERATION];
        let better = ratio(rounds, &PEERS).unwrap();
        assert!((better.min - 200.0 / 180.0).abs() < 1e-9 && (better.max - better.min).abs() < 1e-9);
        assert!((ratio(rounds, &PEERS[..1]).unwrap().median - 4.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn the_table_has_shares_of_the_limit() {
        let ceilings = Ceilings { read_bytes_s: 40e9, int8_ops_s: Some(900e9) };
        let shape = Preset::Moe2b.shape();
        let row = results().table("t", &shape, &ceilings, false).rows[0].clone();
        // 150 tok/s of 152.6 MB and a context of 64 tokens, 1 MB, of 40 GB/s
        assert_eq!(row[..2], ["tg128", "150 (57.6%)"]);
        assert_eq!(row[4..], ["1.11", "1.11 to 1.11", "1.33", "1.05"]);
        let prompt = Case::Alone { test: Test::Prompt { tokens: 512 }, kv: Kv::Bf16 };
        assert!((prompt.share(Kind::Ik, 1000.0, &shape, &ceilings).unwrap() - 390.07e9 / 900e9).abs() < 1e-3);
        assert_eq!(prompt.share(Kind::Ik, 1.0, &shape, &Ceilings { int8_ops_s: None, ..ceilings }), None);
    }

    #[test]
    fn a_failed_round_and_a_missing_engine_leave_holes_and_no_ratio() {
        let mut results = Results::default();
        results.add(GENERATION, Kind::LlamaCpp, 1, Some(5.0));
        results.add(GENERATION, Kind::Moesaic, 0, Some(9.0));
        results.add(GENERATION, Kind::Moesaic, 1, None);
        let rounds = &results.cases[&GENERATION];
        assert_eq!(rounds[&Kind::LlamaCpp], [None, Some(5.0)]);
        assert_eq!(ratio(rounds, &PEERS), None);
        let table = results.table("t", &Preset::Moe2b.shape(), &Ceilings::default(), false);
        assert_eq!((table.rows[0][3].as_str(), table.rows[0][4].as_str()), ("-", "-"));
        for (cell, rate) in table.rows[0][1..3].iter().zip(["9.00 (", "5.00 ("]) {
            assert!(cell.starts_with(rate) && cell.ends_with("1 of 2 rounds)"), "{cell}");
        }
    }

    #[test]
    fn a_round_without_the_better_peer_gives_no_ratio_to_the_weaker_one() {
        let mut holed = results();
        holed.add(GENERATION, Kind::Ik, 1, None);
        holed.add(GENERATION, Kind::LlamaCpp, 1, Some(10.0));
        let better = ratio(&holed.cases[&GENERATION], &PEERS).unwrap();
        assert!((better.max - 200.0 / 180.0).abs() < 1e-9, "the second round would be 10: {better:?}");
        assert!((ratio(&holed.cases[&GENERATION], &PEERS[..1]).unwrap().max - 10.0).abs() < 1e-9);
        // one that was never measured is no peer
        holed.add(GENERATION, Kind::Ik, 0, None);
        assert!((ratio(&holed.cases[&GENERATION], &PEERS).unwrap().max - 10.0).abs() < 1e-9);
    }

    #[test]
    fn with_a_context_only_moesaic_has_a_share_and_scales_are_read_too() {
        let (shape, ceilings) = (Preset::Moe2b.shape(), Ceilings { read_bytes_s: 40e9, int8_ops_s: None });
        let deep = |kv| Case::Alone { test: Test::Generation { tokens: 128, depth: 4096 }, kv };
        assert_eq!(deep(Kv::Bf16).share(Kind::Ik, 50.0, &shape, &ceilings), None);
        // 16 layers of 4 heads of 64 keys and as many values, after 4096 tokens and half of the 128
        let bytes = |of_head: f64| shape.bytes_a_token() as f64 + 16.0 * 4.0 * 2.0 * of_head * 4160.0;
        for (kv, of_head) in [(Kv::Bf16, 128.0), (Kv::Int8, 68.0)] {
            let share = deep(kv).share(Kind::Moesaic, 50.0, &shape, &ceilings).unwrap();
            assert!((share - 50.0 * bytes(of_head) / 40e9).abs() < 1e-9, "{kv:?}: {share}");
        }
    }

    #[test]
    fn a_busy_row_is_held_against_the_ratio_without() {
        let mut results = Results::default();
        for (busy, own) in [(false, 131.0), (true, 120.0)] {
            results.add(Case::Serve { clients: 1, busy }, Kind::Moesaic, 0, Some(own));
            results.add(Case::Serve { clients: 1, busy }, Kind::Ik, 0, Some(100.0));
        }
        let of_row = |busy| results.target(Case::Serve { clients: 1, busy }, false);
        assert_eq!((of_row(false), of_row(true)), ("1.2".into(), "1.31 (without)".into()));
        assert_eq!(results.target(Case::Serve { clients: 4, busy: true }, false), "");
    }

    #[test]
    fn cases_have_the_targets_that_were_set() {
        let serve = |clients, busy| Case::Serve { clients, busy }.target(false);
        assert_eq!([serve(1, false), serve(4, false), serve(16, false)], [1.2, 1.6, 2.0].map(Some));
        assert_eq!((serve(4, true), GENERATION.target(true)), (None, Some(1.0)));
    }
}
