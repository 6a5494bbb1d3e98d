//! Where the time of a run went, from what processes and the kernel counted.
use crate::cluster::Counted;
use crate::report::{Table, number, percent};
use crate::scrape::Scrape;
use crate::stats::median;

/// What was used in one run.
pub struct Use<'a> {
    /// What was counted, by process.
    pub counted: &'a [(String, Counted)],
    /// The run's length.
    pub seconds: f64,
    /// Tokens that the model computed.
    pub tokens: f64,
}

/// Threads that do one kind of work, by process and thread name.
const KINDS: [(&str, &[&str], &[&str]); 6] = [
    ("attention, gate, sampling (and all maths of embedded)", &["embedded", "scheduler"], &["engine", "kernel"]),
    ("experts' maths at the shards", &["shard"], &["experts", "kernel"]),
    ("messages at the scheduler", &["scheduler"], &["tokio-rt-worker"]),
    ("messages at the shards", &["shard"], &["tokio-rt-worker"]),
    ("gateway and router (embedded: all but the maths)", &["gateway", "router", "embedded"], &["tokio-rt-worker"]),
    ("everything else of these processes", &[], &[]),
];

/// The kind of a thread, as a place in [`KINDS`].
fn kind(process: &str, thread: &str) -> usize {
    let is_of = |names: &[&str], name: &str| names.iter().any(|of| name.starts_with(of));
    let found = KINDS.iter().position(|(_, processes, threads)| is_of(processes, process) && is_of(threads, thread));
    found.unwrap_or(KINDS.len() - 1)
}

impl Use<'_> {
    /// Seconds on a core and ready without one, by kind.
    fn by_kind(&self) -> [(f64, f64); KINDS.len()] {
        let mut sums = [(0.0, 0.0); KINDS.len()];
        for (process, counted) in self.counted {
            for (thread, cpu) in &counted.threads.0 {
                let (ran, waited) = &mut sums[kind(process, thread)];
                *ran += cpu.ran;
                *waited += cpu.waited;
            }
        }
        sums
    }

    /// Milliseconds of cores that all threads ran for each token.
    fn core_ms(&self) -> f64 {
        self.by_kind().iter().map(|(ran, _)| ran).sum::<f64>() * 1e3 / self.tokens.max(1.0)
    }

    /// The metrics of the processes whose name begins so.
    fn metrics(&self, process: &str) -> Scrape {
        let of = self.counted.iter().filter(|(name, _)| name.starts_with(process));
        of.fold(Scrape::default(), |sum, (_, counted)| sum.plus(&counted.metrics))
    }
}

fn median_of(uses: &[Use<'_>], value: impl Fn(&Use<'_>) -> f64) -> f64 {
    median(&uses.iter().map(value).collect::<Vec<_>>())
}

/// Milliseconds of cores that all threads ran for each token, the median of the runs.
pub fn core_ms(uses: &[Use<'_>]) -> f64 {
    median_of(uses, |used| used.core_ms())
}

/// Milliseconds of one core for each token, on both sides.
pub fn cores(title: &str, embedded: &[Use<'_>], cluster: &[Use<'_>], cores: usize) -> Table {
    let columns = ["core ms a token", "embedded", "cluster", "of the cluster's", "cluster: ready, no core free"];
    let mut table = Table::new(title, &columns);
    let per_token = |used: &Use<'_>, seconds: f64| seconds * 1e3 / used.tokens.max(1.0);
    let all = |uses: &[Use<'_>]| median_of(uses, |used| per_token(used, used.seconds * cores as f64));
    let whole = all(cluster);
    for (at, (name, ..)) in KINDS.iter().enumerate() {
        let ran = |uses: &[Use<'_>]| median_of(uses, |used| per_token(used, used.by_kind()[at].0));
        let waited = median_of(cluster, |used| per_token(used, used.by_kind()[at].1));
        let share = percent(ran(cluster) / whole);
        table.row([(*name).to_owned(), number(ran(embedded)), number(ran(cluster)), share, number(waited)]);
    }
    let (ran_embedded, ran_cluster) = (core_ms(embedded), core_ms(cluster));
    let together = [number(ran_embedded), number(ran_cluster), percent(ran_cluster / whole)];
    table.row(std::iter::once("together".to_owned()).chain(together).chain([String::new()]));
    let idle = |uses: &[Use<'_>]| median_of(uses, |used| per_token(used, used.seconds * cores as f64) - used.core_ms());
    let rest = ["idle, or other programs".to_owned(), number(idle(embedded)), number(idle(cluster))];
    table.row(rest.into_iter().chain([percent(idle(cluster) / whole), String::new()]));
    table.row(["all cores".to_owned(), number(all(embedded)), number(whole), percent(1.0), String::new()]);
    table
}

/// Bytes of activations that travel for each token, in all layers: to the shards, and back.
pub fn wire_bytes(cluster: &[Use<'_>]) -> (f64, f64) {
    let bytes = |name: &str| median_of(cluster, |used| used.metrics("scheduler").sum(name) / used.tokens.max(1.0));
    (bytes("moesaic_expert_sent_bytes_total"), bytes("moesaic_expert_received_bytes_total"))
}

/// What a layer's experts take in a cluster, and what travels for them.
pub fn layers(title: &str, cluster: &[Use<'_>]) -> Table {
    let mut table = Table::new(title, &["what", "value"]);
    let mean = |process: &str, name: &str| {
        median_of(cluster, |used| {
            let (count, sum) = used.metrics(process).histogram(name);
            sum / count.max(1.0)
        })
    };
    let (trip, computed) =
        (mean("scheduler", "moesaic_expert_round_trip_seconds"), mean("shard", "moesaic_expert_dispatch_seconds"));
    let (sent, received) = wire_bytes(cluster);
    let (step, tokens) = (mean("scheduler", "moesaic_step_seconds"), mean("scheduler", "moesaic_step_tokens"));
    let rows = [
        ("a step", format!("{} ms for {} tokens", number(step * 1e3), number(tokens))),
        ("a layer's round trip, from sending to the sum", format!("{} ms", number(trip * 1e3))),
        ("of it, one shard computes", format!("{} ms", number(computed * 1e3))),
        (
            "the rest: messages, and waiting for the other micro-batch",
            format!("{} ms", number((trip - computed) * 1e3)),
        ),
        ("sent for each token, all layers", format!("{} KiB", number(sent / 1024.0))),
        ("received for each token, all layers", format!("{} KiB", number(received / 1024.0))),
    ];
    rows.into_iter().for_each(|(what, value)| table.row([what.to_owned(), value]));
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scrape::{Cpu, Threads};

    fn counted(threads: &[(&str, f64)]) -> Counted {
        let threads = threads.iter().map(|(name, ran)| ((*name).to_owned(), Cpu { ran: *ran, waited: 0.5 }));
        Counted { threads: Threads(threads.collect()), ..Counted::default() }
    }

    #[test]
    fn every_thread_has_one_kind_and_the_table_adds_up() {
        let cluster = [
            (
                "scheduler-0".to_owned(),
                counted(&[("engine-scheduler", 2.0), ("tokio-rt-worker", 1.0), ("other", 0.25)]),
            ),
            ("shard-0".to_owned(), counted(&[("experts", 3.0), ("tokio-rt-worker", 0.5)])),
            ("gateway".to_owned(), counted(&[("tokio-rt-worker", 0.25)])),
        ];
        let embedded = [("embedded".to_owned(), counted(&[("engine", 4.0), ("kernel", 4.0)]))];
        let used = |counted| [Use { counted, seconds: 5.0, tokens: 1000.0 }];
        let table = cores("t", &used(&embedded), &used(&cluster), 2);
        let column = |at: usize| -> Vec<f64> { table.rows.iter().filter_map(|row| row[at].parse().ok()).collect() };
        assert_eq!(column(1), [8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 8.0, 2.0, 10.0]);
        assert_eq!(column(2), [2.0, 3.0, 1.0, 0.5, 0.25, 0.25, 7.0, 3.0, 10.0]);
    }
}
