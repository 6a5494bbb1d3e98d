//! What was measured, for the terminal, for files of results, and for programs.
use crate::machine::Machine;
use anyhow::{Context, Result};
use serde::Serialize;
use std::fmt::Write;
use std::fs::OpenOptions;
use std::path::Path;

/// A table of a result.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Table {
    /// What it shows.
    pub title: String,
    /// Heads of the columns.
    pub columns: Vec<String>,
    /// Rows of as many cells.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub fn new(title: &str, columns: &[&str]) -> Self {
        Self { title: title.into(), columns: columns.iter().map(|&column| column.into()).collect(), rows: Vec::new() }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    fn widths(&self) -> Vec<usize> {
        let width = |at: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(at));
            cells.chain(self.columns.get(at)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        (0..self.columns.len()).map(width).collect()
    }

    /// For the terminal: the first column to the left, numbers to the right.
    pub fn text(&self) -> String {
        let widths = self.widths();
        let line = |cells: &[String]| {
            let cell = |(at, (cell, width)): (usize, (&String, &usize))| match at {
                0 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            };
            let cells: Vec<String> = cells.iter().zip(&widths).enumerate().map(cell).collect();
            cells.join("  ").trim_end().to_owned()
        };
        let mut text = format!("{}\n", self.title);
        for cells in std::iter::once(&self.columns).chain(&self.rows) {
            text += &format!("  {}\n", line(cells));
        }
        text
    }

    /// For a file.
    pub fn markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let ruler: Vec<String> =
            (0..self.columns.len()).map(|at| if at == 0 { "---" } else { "---:" }.into()).collect();
        let rows: String = self.rows.iter().map(|row| line(row)).collect();
        format!("**{}**\n\n{}{}{rows}", self.title, line(&self.columns), line(&ruler))
    }
}

/// One measurement's outcome.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Section {
    /// What was measured.
    pub title: String,
    /// How, in sentences.
    pub method: String,
    /// What came out.
    pub tables: Vec<Table>,
    /// What must be known to read it.
    pub notes: Vec<String>,
    /// The same numbers for programs.
    pub values: serde_json::Value,
}

/// Everything that one run of this program measured.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    /// When it ended, as `2026-11-27`.
    pub date: String,
    /// The command that gives it again.
    pub command: String,
    /// Where it was measured.
    pub machine: Machine,
    /// What was measured.
    pub sections: Vec<Section>,
}

impl Record {
    /// As a page.
    pub fn markdown(&self) -> String {
        let Machine { cpu, cores, memory_gib, kernel, commit, load_before, load_after, build } = &self.machine;
        let mut page = String::new();
        // writing to a text never fails
        let _ = writeln!(
            page,
            "Measured {} at commit {commit} ({build} build) on {cores} cores of {cpu}, {memory_gib:.0} GiB, Linux \
             {kernel}.\nLoad average of the machine before and after: {load_before:.2} and {load_after:.2}.\n\n    {}\n",
            self.date, self.command
        );
        for section in &self.sections {
            let _ = writeln!(page, "## {}\n\n{}\n", section.title, section.method);
            section.tables.iter().for_each(|table| page += &format!("{}\n", table.markdown()));
            section.notes.iter().for_each(|note| page += &format!("- {note}\n"));
            page += "\n";
        }
        page.truncate(page.trim_end().len());
        page + "\n"
    }

    /// For the terminal.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for section in &self.sections {
            text += &format!("\n{}\n\n", section.title);
            section.tables.iter().for_each(|table| text += &format!("{}\n", table.text()));
            section.notes.iter().for_each(|note| text += &format!("- {note}\n"));
        }
        text
    }

    /// Writes it to a file: JSON where its name ends so, else a page under `title`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, title: &str, path: &Path) -> Result<()> {
        let text = match path.extension() {
            Some(json) if json == "json" => serde_json::to_string_pretty(self)? + "\n",
            _ => format!("# {title}\n\n{}", self.markdown()),
        };
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }
}

/// Checks that a file can be written, so that nothing is measured for one that cannot. What is in it stays.
///
/// # Errors
/// When it cannot be written.
pub fn check_writable(path: &Path) -> Result<()> {
    let is_new = !path.exists();
    let opened = OpenOptions::new().create(true).append(true).open(path);
    opened.with_context(|| format!("write {}", path.display()))?;
    if is_new {
        std::fs::remove_file(path).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// A number with as many digits as say something.
pub fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// Seconds as milliseconds.
pub fn ms(seconds: f64) -> String {
    number(seconds * 1e3)
}

/// A share as a percentage.
pub fn percent(share: f64) -> String {
    format!("{:.1}%", share * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new("rates", &["what", "tok/s"]);
        table.row(["prompt".into(), number(123.456)]);
        table.row(["generation".into(), number(9.876)]);
        table
    }

    #[test]
    fn tables_are_aligned_in_the_terminal_and_marked_in_files() {
        assert_eq!(table().text(), "rates\n  what        tok/s\n  prompt        123\n  generation   9.88\n");
        let markdown = "**rates**\n\n| what | tok/s |\n| --- | ---: |\n| prompt | 123 |\n| generation | 9.88 |\n";
        assert_eq!(table().markdown(), markdown);
    }

    #[test]
    fn a_record_says_when_where_and_how() {
        let machine = Machine { cpu: "A CPU".into(), cores: 2, commit: "abc123".into(), ..Machine::default() };
        let section = Section { title: "T".into(), method: "M.".into(), tables: vec![table()], ..Section::default() };
        let record = Record {
            date: "2026-11-27".into(),
            command: "moesaic-loadtest x".into(),
            machine,
            sections: vec![section],
        };
        let page = record.markdown();
        for part in
            ["2026-11-27", "abc123", "2 cores of A CPU", "    moesaic-loadtest x\n", "## T\n\nM.\n", "| prompt |"]
        {
            assert!(page.contains(part), "{part}: {page}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_written_is_known_before_and_one_that_can_is_left_as_it_was() {
        let folder = tempfile::tempdir().expect("a folder");
        let [new, old, nowhere] = ["new.md", "old.md", "no/where.md"].map(|name| folder.path().join(name));
        std::fs::write(&old, "x").expect("a file");
        assert!(check_writable(&new).is_ok() && !new.exists());
        assert!(check_writable(&old).is_ok() && std::fs::read(&old).is_ok_and(|text| text == b"x"));
        assert!(check_writable(&nowhere).is_err_and(|error| error.to_string().contains("where.md")));
        assert!(check_writable(folder.path()).is_err());
    }

    #[test]
    fn numbers_have_three_digits() {
        let numbers = [0.01234, 1.2345, 12.345, 123.45, 1234.5].map(number);
        assert_eq!(numbers, ["0.012", "1.23", "12.3", "123", "1234"]);
        assert_eq!((ms(0.0123), percent(0.815)), ("12.3".into(), "81.5%".into()));
    }
}
