//! Traces of requests as Mooncake publishes them: JSON lines of when a request came, how long its prompt and its answer
//! were, and what its prompt's blocks of 512 tokens are, by numbers that are the same where the text up to there was.
//!
//! Format: <https://github.com/kvcache-ai/Mooncake/tree/main/FAST25-release/traces>
use super::lengths::LONGEST;
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::Duration;

/// Tokens of a block.
pub const BLOCK: usize = 512;

/// Longest line that is read: the ids of the longest prompt, several times over.
const LONGEST_LINE: u64 = 1 << 20;

/// Most requests of a trace.
const MOST_ENTRIES: usize = 10_000_000;

/// One request of a trace.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Entry {
    /// When it came, in milliseconds from the trace's start.
    pub timestamp: f64,
    /// Tokens of the prompt.
    pub input_length: usize,
    /// Tokens of the answer.
    pub output_length: usize,
    /// The prompt's blocks, the last of which may be shorter. Where there are fewer than the prompt's length needs, the
    /// rest is this request's own.
    #[serde(default)]
    pub hash_ids: Vec<u64>,
}

/// How a trace is changed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// Factor of the times between arrivals: at 0.5 they come twice as fast.
    pub time: f64,
    /// Factor of all lengths, blocks included: at 0.1 prompts and answers are a tenth as long, and share as much.
    pub length: f64,
}

impl Scale {
    /// The trace as it is.
    pub const NONE: Self = Self { time: 1.0, length: 1.0 };

    /// Tokens of a block.
    pub fn block(self) -> usize {
        self.tokens(BLOCK)
    }

    fn tokens(self, count: usize) -> usize {
        ((count as f64 * self.length).round() as usize).max(1)
    }

    /// A trace's requests after that, and when they come after the first.
    ///
    /// # Errors
    /// Names the length that becomes too long.
    pub fn apply(self, entries: &[Entry]) -> Result<Vec<(Duration, Entry)>> {
        let first = entries.first().map_or(0.0, |entry| entry.timestamp);
        let scaled = |entry: &Entry| {
            let after = Duration::from_secs_f64((entry.timestamp - first) * self.time / 1e3);
            let [input_length, output_length] =
                [("input_length", entry.input_length), ("output_length", entry.output_length)].map(|(name, length)| {
                    let scaled = self.tokens(length);
                    let (factor, at) = (self.length, entry.timestamp);
                    ensure!(
                        scaled <= LONGEST,
                        "{name} {length} of the request at {at} ms, times {factor}, is {scaled}; {LONGEST} is the most"
                    );
                    Ok(scaled)
                });
            Ok((after, Entry { input_length: input_length?, output_length: output_length?, ..entry.clone() }))
        };
        entries.iter().map(scaled).collect()
    }
}

fn entry(line: &str) -> Result<Entry> {
    let entry: Entry = serde_json::from_str(line)?;
    let Entry { timestamp, input_length, output_length, .. } = &entry;
    // a thousand years
    ensure!((0.0..=3.2e13).contains(timestamp), "timestamp is {timestamp}; use milliseconds from 0");
    for (name, length) in [("input_length", input_length), ("output_length", output_length)] {
        ensure!((1..=LONGEST).contains(length), "{name} is {length}; use 1 to {LONGEST}");
    }
    Ok(entry)
}

/// Reads a trace; in the order of its times.
///
/// # Errors
/// When it cannot be read or is empty, and names the first line that is no request.
pub fn read(path: &Path) -> Result<Vec<Entry>> {
    let file = File::open(path).with_context(|| format!("open the trace {}", path.display()))?;
    parse(BufReader::new(file)).with_context(|| format!("read the trace {}", path.display()))
}

/// The same of lines.
///
/// # Errors
/// As [`read`].
pub fn parse(mut lines: impl BufRead) -> Result<Vec<Entry>> {
    use std::io::Read;
    let mut entries = Vec::new();
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let count = lines.by_ref().take(LONGEST_LINE + 1).read_until(b'\n', &mut line)?;
        if count == 0 {
            break;
        }
        ensure!(count as u64 <= LONGEST_LINE, "line {number} is longer than {LONGEST_LINE} bytes");
        let text = std::str::from_utf8(&line).with_context(|| format!("line {number}"))?.trim();
        if text.is_empty() {
            continue;
        }
        ensure!(entries.len() < MOST_ENTRIES, "line {number}: there are more than {MOST_ENTRIES} requests");
        entries.push(entry(text).with_context(|| format!("line {number}"))?);
    }
    if entries.is_empty() {
        bail!("there is no request in it");
    }
    // a stable sort: requests of one time stay in their order
    entries.sort_by(|a: &Entry, b| a.timestamp.total_cmp(&b.timestamp));
    Ok(entries)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    // the first lines of the published conversation trace have this form
    const TRACE: &str = r#"
{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]}
{"timestamp": 3000, "input_length": 7322, "output_length": 490, "hash_ids": [0, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27]}

{"timestamp": 2000, "input_length": 1, "output_length": 1}"#;

    #[test]
    fn lines_are_requests_in_the_order_of_their_times() {
        let entries = parse(TRACE.as_bytes()).unwrap();
        assert_eq!(entries.iter().map(|entry| entry.input_length).collect::<Vec<_>>(), [6758, 1, 7322]);
        assert_eq!((entries[0].hash_ids.len(), entries[2].hash_ids[..2].to_vec()), (14, vec![0, 14]));
        assert!(entries[1].hash_ids.is_empty());
    }

    #[test]
    fn times_and_lengths_are_scaled_and_begin_at_the_first() {
        let entries = parse(TRACE.as_bytes()).unwrap();
        let scale = Scale { time: 0.5, length: 0.01 };
        let scaled = scale.apply(&entries[1..]).unwrap();
        assert_eq!(scaled.iter().map(|(after, _)| after.as_millis()).collect::<Vec<_>>(), [0, 500]);
        assert_eq!((scaled[0].1.input_length, scaled[1].1.input_length, scaled[1].1.output_length), (1, 73, 5));
        assert_eq!((scale.block(), Scale::NONE.block()), (5, 512));
        assert_eq!(Scale::NONE.apply(&entries).unwrap()[2].1, entries[2]);
    }

    #[test]
    fn a_length_that_becomes_too_long_is_named() {
        let entries = parse(TRACE.as_bytes()).unwrap();
        let error = Scale { time: 1.0, length: 150.0 }.apply(&entries).unwrap_err().to_string();
        // 6758 times 150 is below it
        assert!(error.contains("input_length 7322 of the request at 3000 ms") && error.contains("1048576"), "{error}");
    }

    #[test]
    fn a_broken_line_is_named() {
        let good = r#"{"timestamp":0,"input_length":1,"output_length":1,"hash_ids":[1]}"#;
        let cases = [
            ("{", "line 2"),
            (r#"{"timestamp":0,"input_length":1}"#, "output_length"),
            (r#"{"timestamp":-1,"input_length":1,"output_length":1}"#, "timestamp is -1"),
            (r#"{"timestamp":0,"input_length":0,"output_length":1}"#, "input_length is 0; use 1 to"),
            (r#"{"timestamp":0,"input_length":1,"output_length":-4}"#, "line 2"),
            (r#"{"timestamp":0,"input_length":1,"output_length":99999999}"#, "output_length is 99999999"),
            (r#"{"timestamp":0,"input_length":1,"output_length":1,"hash_ids":["a"]}"#, "line 2"),
        ];
        for (line, part) in cases {
            let error = format!("{:#}", parse(format!("{good}\n{line}\n").as_bytes()).unwrap_err());
            assert!(error.contains(part) && error.contains("line 2"), "{line}: {error}");
        }
        assert!(parse("\n\n".as_bytes()).unwrap_err().to_string().contains("no request"));
        let long = vec![b' '; LONGEST_LINE as usize + 5];
        assert!(parse(long.as_slice()).unwrap_err().to_string().contains("line 1 is longer"));
        assert!(parse([b'"', 0xff, b'"'].as_slice()).is_err());
    }
}
