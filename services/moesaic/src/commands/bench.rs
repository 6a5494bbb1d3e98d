//! `moesaic bench`: prompt processing (pp) and token generation (tg) rates, as llama-bench reports them.
use crate::{args, commands::load_runner};
use anyhow::{Context, Result, ensure};
use moesaic_model::{LogitsWanted, Runner, SequenceChunk};
use moesaic_types::BLOCK_TOKENS;
use serde::Serialize;
use std::process::ExitCode;
use std::time::Instant;

/// Tokens of one prefill chunk.
const CHUNK: usize = 512;

#[derive(Debug, Serialize)]
struct Row {
    test: String,
    depth: usize,
    threads: usize,
    tok_s_median: f64,
    tok_s_min: f64,
    tok_s_max: f64,
    peak_rss_bytes: u64,
    load_s: f64,
}

pub fn run(args: args::Bench) -> Result<ExitCode> {
    ensure!(args.runs > 0, "--runs must be 1 or more");
    let started = Instant::now();
    let threads = args.model.threads.filter(|n| *n > 0).unwrap_or_else(crate::commands::default_threads);
    let mut runner = load_runner(&args.model)?;
    let load_s = started.elapsed().as_secs_f64();

    let longest_test = args.pp.iter().chain(&args.tg).copied().max().unwrap_or(1);
    let longest_depth = args.depth.iter().copied().max().unwrap_or(0);
    let longest = longest_depth + longest_test;
    let max_context = runner.spec().max_context;
    ensure!(longest <= max_context, "depth + test is {longest} tokens; the model's context is {max_context}");
    let blocks: Vec<u32> = (0..longest.div_ceil(BLOCK_TOKENS) as u32).collect();
    runner.allocate_kv(blocks.len())?;
    let vocab = runner.spec().vocab as u32;
    let tokens: Vec<u32> = (0..longest as u32).map(|i| i.wrapping_mul(2_654_435_761) % vocab).collect();

    let mut rows = Vec::new();
    for &depth in &args.depth {
        prefill(runner.as_mut(), &tokens[..depth], 0, &blocks)?;
        for (name, lengths, step) in [("pp", &args.pp, CHUNK), ("tg", &args.tg, 1)] {
            for &length in lengths.iter().filter(|&&length| length > 0) {
                let part = &tokens[depth..depth + length];
                run_once(runner.as_mut(), part, depth, &blocks, step)?;
                let mut rates = Vec::with_capacity(args.runs);
                for _ in 0..args.runs {
                    let started = Instant::now();
                    run_once(runner.as_mut(), part, depth, &blocks, step)?;
                    rates.push(length as f64 / started.elapsed().as_secs_f64());
                }
                rates.sort_by(f64::total_cmp);
                rows.push(Row {
                    test: format!("{name}{length}"),
                    depth,
                    threads,
                    tok_s_median: rates[rates.len() / 2],
                    tok_s_min: rates[0],
                    tok_s_max: rates[rates.len() - 1],
                    peak_rss_bytes: peak_rss_bytes().context("read the peak memory")?,
                    load_s,
                });
            }
        }
    }
    if args.json {
        println!("{}", serde_json::to_string(&rows)?);
    } else {
        print_table(&rows);
    }
    Ok(ExitCode::SUCCESS)
}

fn prefill(runner: &mut dyn Runner, tokens: &[u32], start: usize, blocks: &[u32]) -> Result<()> {
    run_once(runner, tokens, start, blocks, CHUNK)
}

/// Runs `tokens` from position `start` in steps of `step` tokens, with logits after each step.
fn run_once(runner: &mut dyn Runner, tokens: &[u32], start: usize, blocks: &[u32], step: usize) -> Result<()> {
    let mut logits = Vec::new();
    for (i, part) in tokens.chunks(step).enumerate() {
        logits.clear();
        let chunk = SequenceChunk { tokens: part, start: start + i * step, blocks, logits: LogitsWanted::Last };
        runner.forward(&[chunk], &mut logits)?;
    }
    Ok(())
}

/// The process's largest resident set, as Linux tells it; 0 elsewhere.
pub fn peak_rss_bytes() -> Result<u64> {
    if !cfg!(target_os = "linux") {
        return Ok(0);
    }
    Ok(moesaic_model::memory::peak_rss_bytes("self")?)
}

fn print_table(rows: &[Row]) {
    println!("{:<8} {:>7} {:>8} {:>12} {:>12} {:>12}", "test", "depth", "threads", "tok/s", "min", "max");
    for row in rows {
        println!(
            "{:<8} {:>7} {:>8} {:>12.1} {:>12.1} {:>12.1}",
            row.test, row.depth, row.threads, row.tok_s_median, row.tok_s_min, row.tok_s_max
        );
    }
    if let Some(row) = rows.last() {
        println!("load {:.2} s, peak memory {:.1} MiB", row.load_s, row.peak_rss_bytes as f64 / 1048576.0);
    }
}
