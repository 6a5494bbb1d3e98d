//! The load generator: open and closed loops, drawn or replayed requests, any server of the OpenAI API.
pub mod args;
pub mod arrivals;
pub mod drive;
pub mod lengths;
pub mod measured;
pub mod mooncake;
pub mod plot;
pub mod slo;
pub mod target;
pub mod workload;

pub use args::Load;

use crate::report::{self, Section, Table, ms, number, percent};
use anyhow::{Context, Result, ensure};
use drive::{Progress, Run};
use indicatif::{ProgressBar, ProgressStyle};
use measured::Measured;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Between two lines of progress where there is no terminal.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// The share of failed requests above which percentiles of the others say too little.
const NOTED_FAILURES: f64 = 0.01;

/// Progress on stderr: a bar, or a line now and then where nobody looks at it as it changes.
fn progress(requests: Option<usize>) -> Result<(ProgressBar, Box<Progress>)> {
    let bar = requests.map_or_else(ProgressBar::new_spinner, |count| ProgressBar::new(count as u64));
    let template = if requests.is_some() { "[{wide_bar}] {pos}/{len} {msg} {eta}" } else { "{spinner} {pos} {msg}" };
    bar.set_style(ProgressStyle::with_template(template)?.progress_chars("=> "));
    let (shown, told) = (bar.clone(), Mutex::new(Instant::now()));
    let tell = move |done: usize, failed: usize| {
        shown.set_position(done as u64);
        if failed > 0 {
            shown.set_message(format!("{failed} failed"));
        }
        // one that is being told elsewhere is enough
        let Ok(mut told) = told.try_lock() else { return };
        if shown.is_hidden() && told.elapsed() >= TELL_EVERY {
            *told = Instant::now();
            let of = requests.map_or_else(String::new, |count| format!(" of {count}"));
            crate::tell(&format!("{done}{of} requests, {failed} failed"));
        }
    };
    Ok((bar, Box::new(tell)))
}

/// Loads the server and measures.
///
/// # Errors
/// When flags do not fit together, the plot cannot be written, the server takes no request at all, or no request was answered.
pub async fn run(args: &Load) -> Result<Section> {
    args.validate()?;
    if let Some(path) = &args.plot {
        report::check_writable(path).context("--plot")?;
    }
    let (vocabulary, writer) = args.words()?;
    let mut target = args.target(writer.clone())?;
    let workload = args.workload(vocabulary)?;
    if target.model.is_none() {
        target.model = target.served_model().await?;
    }
    target.choose(args.prompts, writer, vocabulary).await?;
    let as_text = target.writer.is_some();
    let limits = args.limits();
    let count = [limits.requests, workload.len()].into_iter().flatten().min();
    let (bar, tell) = progress(count)?;
    let pacing = args.pacing(&workload);
    let run = drive::run(target, workload, pacing, limits, tell).await?;
    bar.finish_and_clear();
    let slo = args.slo.clone().unwrap_or_default();
    let measured = Measured::of(&run, args.warm_up, args.duration, &slo, args.is_open());
    if let Some(path) = &args.plot {
        let text = plot::svg(&run, &slo, &args.describe())?;
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    ensure!(
        measured.answered > 0,
        "no counted request was answered; {}",
        measured.first_errors.values().next().map_or("none was sent after the warm-up", String::as_str)
    );
    Ok(section(args, &run, &measured, as_text))
}

/// The tables of a run's numbers.
pub fn tables(measured: &Measured) -> Vec<Table> {
    let mut times = Table::new("Times", &["ms", "p50", "p90", "p99", "mean", "largest"]);
    let rows = [
        ("time to first token", &measured.ttft_s),
        ("inter-token latency", &measured.itl_s),
        ("time per output token", &measured.tpot_s),
        ("end to end", &measured.e2e_s),
    ];
    for (name, summary) in rows.into_iter().filter(|(_, summary)| summary.count > 0) {
        let cells = [summary.p50, summary.p90, summary.p99, summary.mean, summary.max].map(ms);
        times.row(std::iter::once(name.to_owned()).chain(cells));
    }
    let mut rates = Table::new("Rates", &["what", "value"]);
    let mut row = |what: &str, value: String| rates.row([what.to_owned(), value]);
    row("generation, all clients, tok/s", number(measured.generation_tok_s));
    row("prompts, tok/s", number(measured.prompt_tok_s));
    row("of prompt tokens from a cache", percent(measured.cached_share));
    row("requests offered / s", number(measured.offered_requests_s));
    row("requests answered / s", number(measured.answered_requests_s));
    if let Some(goodput) = &measured.goodput {
        row(&format!("goodput ({}) / s", goodput.slo), number(goodput.requests_s));
        row("good, of all counted", percent(goodput.share));
        for (objective, missed) in &goodput.missed {
            row(&format!("answers that missed {}", objective.name()), missed.to_string());
        }
    }
    row("requests counted", measured.requests.to_string());
    row("requests to warm up", measured.warm_up_requests.to_string());
    row("prompt tokens, mean", number(measured.prompt_tokens.mean));
    row("answer tokens, mean", number(measured.answer_tokens.mean));
    let mut tables = vec![times, rates];
    if !measured.errors.is_empty() {
        let mut errors = Table::new("Errors", &["kind", "requests", "the first"]);
        for (kind, count) in &measured.errors {
            let first = measured.first_errors.get(kind).map_or("", String::as_str).replace(['\n', '|'], " ");
            errors.row([kind.clone(), count.to_string(), first]);
        }
        tables.push(errors);
    }
    tables
}

/// What must be known to read a run's numbers.
pub fn notes(measured: &Measured, as_text: bool) -> Vec<String> {
    let mut notes = Vec::new();
    if !measured.kept_schedule {
        notes.push(format!(
            "**The schedule was not kept**: 1 in 100 requests was sent {} ms or more after its time, since this program \
             had no core or no place for it. Times count from the schedule all the same, but the load was another one.",
            ms(measured.late_s.p99)
        ));
    }
    if !measured.kept_up {
        notes.push(format!(
            "**The server did not keep up**: {} requests were in flight at the half and {} at the end of the sending, so \
             the times depend on how long the run was.",
            measured.in_flight[0], measured.in_flight[1]
        ));
    }
    let failed = measured.requests - measured.answered;
    if failed as f64 > measured.requests as f64 * NOTED_FAILURES {
        notes.push(format!(
            "**{failed} of {} counted requests failed**: times are of those that were answered.",
            measured.requests
        ));
    }
    if !measured.told_usage {
        notes.push(
            "The server did not tell the numbers of tokens of every answer: tokens are counted as events of the stream, \
             and prompts as they were made."
                .into(),
        );
    }
    if measured.tokens_an_event > 1.05 {
        notes.push(format!(
            "An event has {} tokens on average: gaps are between events.",
            number(measured.tokens_an_event)
        ));
    }
    if measured.short_answers > 0 {
        notes.push(format!("{} answers are shorter than was asked for.", measured.short_answers));
    }
    if as_text {
        notes.push("Prompts were sent as text: their lengths in tokens are about what was asked for.".into());
    }
    notes
}

fn section(args: &Load, run: &Run, measured: &Measured, as_text: bool) -> Section {
    let last = run.samples.iter().filter_map(|sample| sample.outcome.as_ref().ok()).map(|answer| answer.ended).max();
    let seconds = last.map_or(0.0, |last| (last - run.begun).as_secs_f64());
    let values = serde_json::to_value(measured).unwrap_or_default();
    Section {
        title: "Load".into(),
        method: format!("{} It took {} s.", args.describe(), number(seconds)),
        tables: tables(measured),
        notes: notes(measured, as_text),
        values,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_one_failure_in_a_hundred_is_noted() {
        let note = |answered: usize| {
            let measured = Measured {
                requests: 1000,
                answered,
                kept_schedule: true,
                kept_up: true,
                told_usage: true,
                ..Measured::default()
            };
            notes(&measured, false)
        };
        assert!(note(990).is_empty(), "{:?}", note(990));
        assert!(note(989)[0].contains("11 of 1000 counted requests failed"), "{:?}", note(989));
    }
}
