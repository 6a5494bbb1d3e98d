//! What Moesaic's speed costs in quality: the demo model's perplexity in each configuration that is timed, and in f32.
use super::bench::{LIMIT, output};
use super::engine::Engine;
use crate::report::Table;
use anyhow::{Context, Result};
use serde::Serialize;

/// Perplexity that is allowed, as a multiple of that in f32.
const TARGET: f64 = 1.01;
/// Samples of each evaluation set.
const SAMPLES: &str = "200";

/// The first is what the others are compared with.
const CONFIGURATIONS: [(&str, &str); 4] = [
    ("f32 throughout", "--weights f32 --activations f32 --kv f32"),
    ("q4 weights, int8 activations, bf16 keys and values", "--weights q4 --kv bf16"),
    ("q4 weights, int8 activations, int8 keys and values", "--weights q4 --kv int8"),
    ("bf16 weights, activations, keys and values", "--weights bf16 --kv bf16"),
];

/// One configuration's.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Row {
    name: &'static str,
    flags: &'static str,
    perplexity: f64,
}

/// Those that were measured: all, or none.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Quality(Vec<Row>);

impl Quality {
    /// Runs `moesaic eval` in every configuration.
    ///
    /// # Errors
    /// With the end of what it says, when it fails.
    pub async fn measure(engine: &Engine, threads: usize) -> Result<Self> {
        let mut rows = Vec::new();
        let threads = threads.to_string();
        for (name, flags) in CONFIGURATIONS {
            let fixed = ["eval", "--json", "--limit", SAMPLES, "--threads", &threads].into_iter();
            let arguments: Vec<String> = fixed.chain(flags.split(' ')).map(str::to_owned).collect();
            let (printed, _) = output(&engine.bench_program(), &arguments, LIMIT).await.context(name)?;
            let perplexity = read(&printed).context(name)?;
            crate::tell(&format!("perplexity, {name}: {perplexity:.5}"));
            rows.push(Row { name, flags, perplexity });
        }
        Ok(Self(rows))
    }

    /// Whether nothing was measured.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn ratio(&self, row: &Row) -> f64 {
        row.perplexity / self.0[0].perplexity
    }

    /// Those that are beyond what is allowed.
    pub fn beyond(&self) -> Vec<&'static str> {
        // a perplexity that is no number is not within it
        let is_within = |row: &&Row| self.ratio(row) <= TARGET;
        self.0.iter().filter(|row| !is_within(row)).map(|row| row.name).collect()
    }

    /// The table.
    pub fn table(&self) -> Table {
        let title = format!("Perplexity of the demo model, {SAMPLES} samples of each set");
        let mut table = Table::new(&title, &["Moesaic with", "perplexity", "of f32's", "target"]);
        for row in &self.0 {
            let [perplexity, ratio] = [row.perplexity, self.ratio(row)].map(|value| format!("{value:.5}"));
            table.row([row.name.to_owned(), perplexity, ratio, TARGET.to_string()]);
        }
        table
    }
}

fn read(printed: &str) -> Result<f64> {
    let report: serde_json::Value = serde_json::from_str(printed).context("it printed no report")?;
    report["answer_perplexity"].as_f64().context("its report has no answer_perplexity")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    #[test]
    fn what_is_lost_is_told_and_too_much_is_named() {
        assert_eq!(read(r#"{"answer_perplexity":1.25,"samples":3}"#).unwrap(), 1.25);
        assert!(read("{}").is_err() && read("killed").is_err());
        let row = |name, perplexity| Row { name, flags: "", perplexity };
        let quality = Quality(vec![row("f32", 2.0), row("near", 2.02), row("far", 2.03), row("none", f64::NAN)]);
        assert_eq!(quality.beyond(), ["far", "none"]);
        let table = quality.table().markdown();
        assert!(table.contains("| near | 2.02000 | 1.01000 | 1.01 |"), "{table}");
        assert!(Quality::default().beyond().is_empty());
    }
}
