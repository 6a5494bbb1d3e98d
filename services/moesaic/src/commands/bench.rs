//! `moesaic bench`: prompt processing (pp) and token generation (tg) rates, as llama-bench reports them.
use crate::{args, commands::load_runner};
use anyhow::{Context, Result, ensure};
use moesaic_model::{LogitsWanted, Profile, Runner, SequenceChunk, StepPart};
use moesaic_scheduler::sampler;
use moesaic_types::{BLOCK_TOKENS, SamplingParams};
use serde::Serialize;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Tokens of one prefill chunk.
const CHUNK: usize = 512;

#[derive(Debug, Serialize)]
struct Row {
    test: String,
    depth: usize,
    /// Sequences at a time; the rates are of all of them.
    batch: usize,
    threads: usize,
    tok_s_median: f64,
    tok_s_min: f64,
    tok_s_max: f64,
    /// Milliseconds of a step by its parts, on average; `other` is what belongs to none.
    step_ms: BTreeMap<&'static str, f64>,
    /// Milliseconds that a server adds to a step for choosing its tokens: greedily, and by drawing at temperature 1.
    sampling_ms: [f64; 2],
    peak_rss_bytes: u64,
    load_s: f64,
}

/// One sequence of a test.
struct Sequence {
    tokens: Vec<u32>,
    blocks: Vec<u32>,
}

impl Sequence {
    fn chunk(&self, start: usize, len: usize) -> SequenceChunk<'_> {
        let tokens = &self.tokens[start..start + len];
        SequenceChunk { tokens, start, blocks: &self.blocks, logits: LogitsWanted::Last }
    }
}

pub fn run(args: args::Bench) -> Result<ExitCode> {
    ensure!(args.runs > 0, "--runs must be 1 or more");
    ensure!(args.batch.iter().all(|batch| (1..=1024).contains(batch)), "--batch must be 1 to 1024");
    let started = Instant::now();
    let threads = args.model.threads.filter(|n| *n > 0).unwrap_or_else(crate::commands::default_threads);
    let mut runner = load_runner(&args.model)?;
    let load_s = started.elapsed().as_secs_f64();

    let most = |numbers: &[usize]| numbers.iter().copied().max().unwrap_or(0);
    let longest = most(&args.depth) + most(&args.pp).max(most(&args.tg)).max(1);
    let max_context = runner.spec().max_context;
    ensure!(longest <= max_context, "depth + test is {longest} tokens; the model's context is {max_context}");
    let sequences = sequences(most(&args.batch).max(1), longest, runner.spec().vocab as u32);
    runner.allocate_kv(sequences.iter().map(|sequence| sequence.blocks.len()).sum())?;

    let mut rows = Vec::new();
    for &depth in &args.depth {
        for sequence in &sequences {
            run_once(runner.as_mut(), std::slice::from_ref(sequence), depth, 0, CHUNK)?;
        }
        let prompts = args.pp.iter().map(|&length| ("pp", length, 1, CHUNK));
        let generated =
            args.batch.iter().flat_map(|&batch| args.tg.iter().map(move |&length| ("tg", length, batch, 1)));
        for (name, length, batch, step) in prompts.chain(generated).filter(|&(_, length, ..)| length > 0) {
            let sequences = &sequences[..batch];
            let logits = run_once(runner.as_mut(), sequences, length, depth, step)?;
            let (before, began) = (runner.profile(), Instant::now());
            let mut rates = Vec::with_capacity(args.runs);
            for _ in 0..args.runs {
                let started = Instant::now();
                run_once(runner.as_mut(), sequences, length, depth, step)?;
                rates.push((length * batch) as f64 / started.elapsed().as_secs_f64());
            }
            rates.sort_by(f64::total_cmp);
            let steps = args.runs * length.div_ceil(step);
            let profile = before.zip(runner.profile()).map(|(before, after)| after.since(&before));
            rows.push(Row {
                test: format!("{name}{length}"),
                depth,
                batch,
                threads,
                tok_s_median: rates[rates.len() / 2],
                tok_s_min: rates[0],
                tok_s_max: rates[rates.len() - 1],
                step_ms: profile.map(|profile| step_ms(&profile, began.elapsed(), steps)).unwrap_or_default(),
                sampling_ms: sampling_ms(&logits, runner.spec().vocab)?,
                peak_rss_bytes: peak_rss_bytes().context("read the peak memory")?,
                load_s,
            });
        }
    }
    if args.json {
        println!("{}", serde_json::to_string(&rows)?);
        return Ok(ExitCode::SUCCESS);
    }
    print_table(&rows);
    if args.profile {
        print_profile(&rows);
    }
    Ok(ExitCode::SUCCESS)
}

/// Sequences of `length` tokens, each others.
fn sequences(count: usize, length: usize, vocab: u32) -> Vec<Sequence> {
    let blocks = length.div_ceil(BLOCK_TOKENS) as u32;
    let sequence = |index: u32| {
        let token = |i: u32| (index * length as u32 + i).wrapping_mul(2_654_435_761) % vocab;
        Sequence {
            tokens: (0..length as u32).map(token).collect(),
            blocks: (index * blocks..(index + 1) * blocks).collect(),
        }
    };
    (0..count as u32).map(sequence).collect()
}

/// Runs `length` tokens of each sequence from position `start` in steps of `step` tokens, with logits after each step;
/// those of the last.
fn run_once(
    runner: &mut dyn Runner,
    sequences: &[Sequence],
    length: usize,
    start: usize,
    step: usize,
) -> Result<Vec<f32>> {
    let mut logits = Vec::new();
    for done in (0..length).step_by(step) {
        logits.clear();
        let len = step.min(length - done);
        let batch: Vec<_> = sequences.iter().map(|sequence| sequence.chunk(start + done, len)).collect();
        runner.forward(&batch, &mut logits)?;
    }
    Ok(logits)
}

/// Choosing a token of each row, the mean of some times.
fn sampling_ms(logits: &[f32], vocab: usize) -> Result<[f64; 2]> {
    const TIMES: usize = 16;
    let (mut row, mut scratch) = (Vec::new(), sampler::Scratch::default());
    let mut means = [0.0; 2];
    for (mean, params) in means.iter_mut().zip([SamplingParams::greedy(), SamplingParams::default()]) {
        let started = Instant::now();
        for position in 0..TIMES {
            for logits in logits.chunks_exact(vocab) {
                row.clear();
                row.extend_from_slice(logits);
                sampler::check(&row).map_err(anyhow::Error::msg)?;
                sampler::sample(&mut row, &params, None, sampler::Allowed::default(), position, &mut scratch)?;
            }
        }
        *mean = started.elapsed().as_secs_f64() * 1e3 / TIMES as f64;
    }
    Ok(means)
}

/// The parts of an average step.
fn step_ms(profile: &Profile, all: Duration, steps: usize) -> BTreeMap<&'static str, f64> {
    let ms = |time: Duration| time.as_secs_f64() * 1e3 / steps as f64;
    let mut parts: BTreeMap<_, _> = StepPart::ALL.map(|part| (part.name(), ms(profile.of(part)))).into();
    let told = parts.values().sum::<f64>();
    parts.insert(OTHER, (ms(all) - told).max(0.0));
    parts
}

/// What belongs to no part of a step.
const OTHER: &str = "other";

/// The process's largest resident set, as Linux tells it; 0 elsewhere.
pub fn peak_rss_bytes() -> Result<u64> {
    if !cfg!(target_os = "linux") {
        return Ok(0);
    }
    Ok(moesaic_model::memory::peak_rss_bytes("self")?)
}

fn print_table(rows: &[Row]) {
    println!(
        "{:<8} {:>7} {:>6} {:>8} {:>12} {:>12} {:>12}",
        "test", "depth", "batch", "threads", "tok/s", "min", "max"
    );
    for row in rows {
        println!(
            "{:<8} {:>7} {:>6} {:>8} {:>12.1} {:>12.1} {:>12.1}",
            row.test, row.depth, row.batch, row.threads, row.tok_s_median, row.tok_s_min, row.tok_s_max
        );
    }
    if let Some(row) = rows.last() {
        println!("load {:.2} s, peak memory {:.1} MiB", row.load_s, row.peak_rss_bytes as f64 / 1048576.0);
    }
}

/// Milliseconds of a step by its parts, and their share of it.
fn print_profile(rows: &[Row]) {
    println!();
    println!("a step, ms (share)");
    print!("{:<12}", "");
    for row in rows {
        print!(" {:>20}", format!("{} b{} d{}", row.test, row.batch, row.depth));
    }
    println!();
    for name in StepPart::ALL.map(StepPart::name).into_iter().chain([OTHER]) {
        print!("{name:<12}");
        for row in rows {
            let (all, part) = (row.step_ms.values().sum::<f64>(), row.step_ms.get(name).copied().unwrap_or_default());
            print!(" {:>20}", format!("{part:.3} ({:.1} %)", 100.0 * part / all.max(f64::MIN_POSITIVE)));
        }
        println!();
    }
    for (way, name) in ["greedy", "drawn"].into_iter().enumerate() {
        print!("{:<12}", format!("+ {name}"));
        for row in rows {
            print!(" {:>20}", format!("{:.3}", row.sampling_ms[way]));
        }
        println!();
    }
    println!("+ greedy, + drawn: what a server adds for choosing a step's tokens");
}
