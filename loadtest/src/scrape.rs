//! What a process says of itself: its metrics, and what its threads did.
use crate::client::Connection;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// A process's counters at one moment, or between two.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scrape {
    /// By name and labels as they are printed.
    samples: BTreeMap<String, f64>,
}

impl Scrape {
    /// Asks a process.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn of(address: SocketAddr) -> Result<Self> {
        let text = Connection::open(address).await?.get("/metrics").await;
        text.map(|text| Self::read(&text)).with_context(|| format!("metrics of {address}"))
    }

    fn read(text: &str) -> Self {
        let sample = |line: &str| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        };
        Self { samples: text.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect() }
    }

    /// A counter or gauge, over all its labels; 0 where it is not there.
    pub fn sum(&self, name: &str) -> f64 {
        let is_of =
            |sample: &str| sample.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('{'));
        self.samples.iter().filter(|(sample, _)| is_of(sample)).map(|(_, value)| value).sum()
    }

    /// A histogram's number of values and their sum.
    pub fn histogram(&self, name: &str) -> (f64, f64) {
        (self.sum(&format!("{name}_count")), self.sum(&format!("{name}_sum")))
    }

    /// What was added since.
    pub fn since(&self, before: &Self) -> Self {
        let added = |(name, value): (&String, &f64)| (name.clone(), value - before.samples.get(name).unwrap_or(&0.0));
        Self { samples: self.samples.iter().map(added).collect() }
    }

    /// Both together: the sum over several processes.
    pub fn plus(mut self, other: &Self) -> Self {
        for (name, value) in &other.samples {
            *self.samples.entry(name.clone()).or_default() += value;
        }
        self
    }
}

/// Seconds that threads of one name ran, and waited for a core.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cpu {
    /// On a core.
    pub ran: f64,
    /// Ready to run, but no core was free.
    pub waited: f64,
}

/// What a process's threads did, by their name without its number.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Threads(pub BTreeMap<String, Cpu>);

impl Threads {
    /// Reads what the kernel counts. Threads that ended are not counted any more.
    ///
    /// # Errors
    /// When there is no such process, or the kernel counts nothing.
    pub fn of(pid: u32) -> Result<Self> {
        let mut threads = Self::default();
        let folder = format!("/proc/{pid}/task");
        for task in std::fs::read_dir(&folder).with_context(|| folder.clone())? {
            let task = task?.path();
            let read = |name: &str| std::fs::read_to_string(task.join(name));
            // a thread that ends meanwhile
            let (Ok(name), Ok(times)) = (read("comm"), read("schedstat")) else { continue };
            let mut times = times.split_whitespace().filter_map(|time| time.parse::<f64>().ok());
            let (Some(ran), Some(waited)) = (times.next(), times.next()) else { continue };
            let of_name = threads.0.entry(group(name.trim()).to_owned()).or_default();
            of_name.ran += ran / 1e9;
            of_name.waited += waited / 1e9;
        }
        Ok(threads)
    }

    /// What was added since.
    pub fn since(&self, before: &Self) -> Self {
        let added = |(name, cpu): (&String, &Cpu)| {
            let Cpu { ran, waited } = before.0.get(name).copied().unwrap_or_default();
            // a thread that ended takes its time along
            (name.clone(), Cpu { ran: (cpu.ran - ran).max(0.0), waited: (cpu.waited - waited).max(0.0) })
        };
        Self(self.0.iter().map(added).collect())
    }

    /// Seconds on a core, over all threads.
    pub fn ran(&self) -> f64 {
        self.0.values().map(|cpu| cpu.ran).sum()
    }

    /// Seconds ready to run without a core, over all threads.
    pub fn waited(&self) -> f64 {
        self.0.values().map(|cpu| cpu.waited).sum()
    }
}

/// `kernel-1` and `kernel-2` are one group.
fn group(name: &str) -> &str {
    name.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches(['-', ' ', ':', '/'])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    #[test]
    fn counters_are_summed_over_labels_and_histograms_read() {
        let text = "# HELP a b\n# TYPE a counter\na{layer=\"0\"} 2\na{layer=\"1\"} 3\nab 100\n\
                    h_bucket{le=\"1\"} 1\nh_sum 0.5\nh_count 4\n";
        let before = Scrape::read(text);
        assert_eq!((before.sum("a"), before.sum("b"), before.histogram("h")), (5.0, 0.0, (4.0, 0.5)));
        let after = Scrape::read("a{layer=\"0\"} 2\na{layer=\"1\"} 7\na{layer=\"2\"} 1\nab 100\n");
        let added = after.since(&before);
        assert_eq!((added.sum("a"), added.sum("ab")), (5.0, 0.0));
        assert_eq!(added.clone().plus(&added).sum("a"), 10.0);
    }

    #[test]
    fn threads_of_one_kind_are_one_group() {
        for (name, expected) in
            [("kernel-1", "kernel"), ("kernel-12", "kernel"), ("tokio-rt-worker", "tokio-rt-worker")]
        {
            assert_eq!(group(name), expected);
        }
    }

    #[test]
    fn this_process_s_threads_run() {
        let before = Threads::of(std::process::id()).unwrap();
        let begun = std::time::Instant::now();
        while begun.elapsed().as_millis() < 60 {
            std::hint::black_box(begun.elapsed());
        }
        let ran = Threads::of(std::process::id()).unwrap().since(&before).ran();
        assert!(ran > 0.0, "{ran}");
    }
}
