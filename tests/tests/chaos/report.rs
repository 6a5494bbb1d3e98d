//! The table of faults: what was expected, what came of it, and how long it took to recover.
use crate::load::{Ended, Outcome, Window};
use anyhow::{Context, Result};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

const HEAD: &str = "| fault | expected | outcome | requests | longest gap: all, one client | ready again after |\n\
                    | --- | --- | --- | --- | --- | --- |\n";

/// The table of one family of faults, written to `chaos/<family>.md` in the target folder. `chaos/table.md` has those
/// of all families.
pub struct Report {
    family: &'static str,
    rows: String,
    failures: Vec<String>,
}

impl Report {
    pub fn new(family: &'static str) -> Self {
        Self { family, rows: String::new(), failures: Vec::new() }
    }

    /// A fault that was made, and what came of it. `ready` is the time from its end until all was as before.
    pub fn add(&mut self, fault: &str, expected: &str, window: &Window, ready: Duration, outcome: Result<()>) {
        let told = match &outcome {
            Ok(()) => "as expected",
            Err(_) => "**not as expected**",
        };
        let row = format!(
            "| {fault} | {expected} | {told} | {} | {:.1} s, {:.1} s | {:.1} s |\n",
            requests(&window.ended),
            window.gap.as_secs_f32(),
            window.gap_of_one.as_secs_f32(),
            ready.as_secs_f32(),
        );
        print!("{row}");
        self.rows += &row;
        if let Err(error) = outcome {
            println!("{error:#}");
            self.failures.push(format!("{fault}: {error:#}"));
        }
    }

    /// A fault that cannot be made here, and why: a failure under `MOESAIC_TESTS_STRICT`.
    pub fn skip(&mut self, fault: &str, why: &str) {
        println!("skipped: {fault}: {why}");
        if std::env::var_os("MOESAIC_TESTS_STRICT").is_some_and(|value| !value.is_empty()) {
            self.failures.push(format!("{fault}: skipped: {why}"));
        }
        // it is no outcome of ours
        let _ = writeln!(self.rows, "| {fault} | | skipped: {why} | | | |");
    }

    /// Whether something was not as expected.
    pub fn has_failures(&self) -> bool {
        !self.failures.is_empty()
    }

    /// Writes the table.
    ///
    /// # Errors
    /// When it cannot be written.
    ///
    /// # Panics
    /// With all that was not as expected.
    pub fn finish(self) -> Result<()> {
        let folder = folder()?;
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(format!("{}.md", self.family)), &self.rows)?;
        let mut parts: Vec<PathBuf> = fs::read_dir(&folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
        parts.retain(|path| path.extension().is_some_and(|kind| kind == "md") && !path.ends_with("table.md"));
        parts.sort();
        let rows = parts.iter().map(fs::read_to_string).collect::<Result<String, _>>()?;
        fs::write(folder.join("table.md"), format!("{HEAD}{rows}"))?;
        assert!(self.failures.is_empty(), "not as expected:\n{}", self.failures.join("\n"));
        Ok(())
    }

    /// Where logs of a failed run are kept.
    ///
    /// # Errors
    /// Where the tests' binary is nowhere.
    pub fn logs(&self) -> Result<PathBuf> {
        Ok(folder()?.join("logs").join(self.family))
    }
}

/// `chaos` in the target folder, which the tests' binary is in, three levels deep.
fn folder() -> Result<PathBuf> {
    let tests = std::env::current_exe()?;
    let target = tests.ancestors().nth(3).map(Path::to_owned);
    Ok(target.context("the tests are in a target folder")?.join("chaos"))
}

/// How many requests ended in which way.
fn requests(ended: &[Ended]) -> String {
    let count = |kind: &str, is_one: fn(&Outcome) -> bool| {
        let count = ended.iter().filter(|ended| is_one(&ended.outcome)).count();
        (count > 0).then(|| format!("{count} {kind}"))
    };
    let counts = [
        count("equal", |outcome| *outcome == Outcome::Equal),
        count("different", |outcome| matches!(outcome, Outcome::Differs { .. })),
        count("refused and sent again", |outcome| matches!(outcome, Outcome::Refused { .. })),
        count("cut off and sent again", |outcome| matches!(outcome, Outcome::Cut { .. })),
        count("ended with an error", |outcome| matches!(outcome, Outcome::Failed { .. })),
    ];
    counts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}
