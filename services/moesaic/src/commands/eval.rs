//! `moesaic eval`: answer perplexity and task accuracy over `*_eval.jsonl`, as the demo model's card measures them.
//!
//! `mixed_eval.jsonl` gives the perplexity of the reference answers; `aml_eval.jsonl`, `extract_eval.jsonl` and
//! `arith_eval.jsonl` give the share of greedy answers that are right.
use crate::{args, commands::load_runner};
use anyhow::{Context, Result, ensure};
use moesaic_model::demo;
use moesaic_model::generation_config::end_tokens;
use moesaic_model::{LogitsWanted, Runner, SequenceChunk, chat::ChatTemplate, tokenizer::Tokenizer};
use moesaic_types::BLOCK_TOKENS;
use serde::Serialize;
use serde_json::Value;
use std::path::Path;
use std::process::ExitCode;

/// Longest prompt plus answer, in tokens.
const CONTEXT: usize = 1024;

#[derive(Debug, Serialize)]
struct Report {
    answer_perplexity: f64,
    aml_risk_accuracy: f64,
    extract_title_exact: f64,
    arith_exact: f64,
    samples: usize,
    peak_rss_bytes: u64,
}

pub fn run(args: args::Eval) -> Result<ExitCode> {
    let folder = args.model.model.clone().map_or_else(demo::find, Ok)?;
    let data = args.data.clone().unwrap_or_else(|| folder.join("eval"));
    let limit = args.limit.unwrap_or(usize::MAX);
    let runner = load_runner(&args.model)?;
    let mut subject = Subject::new(runner, &folder)?;

    let (mut nll, mut count, mut samples) = (0.0, 0, 0);
    for sample in read(&data.join("mixed_eval.jsonl"), limit)? {
        let (sum, tokens) = subject.answer_nll(&sample)?;
        nll += sum;
        count += tokens;
        samples += 1;
    }
    let mut right = |file: &str, max_tokens: usize, is_right: &dyn Fn(&str, &str) -> bool| -> Result<f64> {
        let rows = read(&data.join(file), limit)?;
        ensure!(!rows.is_empty(), "{file} has no samples");
        let mut hits = 0;
        for sample in &rows {
            let want = sample["messages"][1]["content"].as_str().context("messages[1].content is no text")?;
            hits += usize::from(is_right(&subject.answer(sample, max_tokens)?, want));
        }
        samples += rows.len();
        Ok(hits as f64 / rows.len() as f64)
    };
    let same_key = |key: &'static str| {
        move |got: &str, want: &str| {
            let (Ok(got), Ok(want)) = (serde_json::from_str::<Value>(got), serde_json::from_str::<Value>(want)) else {
                return false;
            };
            !want[key].is_null() && got[key] == want[key]
        }
    };
    let aml_risk_accuracy = right("aml_eval.jsonl", 96, &same_key("risk"))?;
    let extract_title_exact = right("extract_eval.jsonl", 128, &same_key("title"))?;
    let arith_exact = right("arith_eval.jsonl", 8, &|got, want| got.trim() == want)?;
    let report = Report {
        answer_perplexity: (nll / count.max(1) as f64).exp(),
        aml_risk_accuracy,
        extract_title_exact,
        arith_exact,
        samples,
        peak_rss_bytes: super::bench::peak_rss_bytes()?,
    };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!("answer perplexity   {:.4}", report.answer_perplexity);
        println!("aml risk accuracy   {:.3}", report.aml_risk_accuracy);
        println!("extract title exact {:.3}", report.extract_title_exact);
        println!("arith exact         {:.3}", report.arith_exact);
        println!("samples {}, peak memory {:.1} MiB", report.samples, report.peak_rss_bytes as f64 / 1048576.0);
    }
    Ok(ExitCode::SUCCESS)
}

fn read(path: &Path, limit: usize) -> Result<Vec<Value>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    text.lines()
        .take(limit)
        .enumerate()
        .map(|(i, line)| serde_json::from_str(line).with_context(|| format!("{}:{}", path.display(), i + 1)))
        .collect()
}

/// The model under evaluation.
struct Subject {
    runner: Box<dyn Runner>,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    eos: Vec<u32>,
    blocks: Vec<u32>,
    logits: Vec<f32>,
}

impl Subject {
    fn new(mut runner: Box<dyn Runner>, folder: &Path) -> Result<Self> {
        let blocks: Vec<u32> = (0..(CONTEXT / BLOCK_TOKENS) as u32).collect();
        runner.allocate_kv(blocks.len())?;
        let (tokenizer, template) = (Tokenizer::open(folder)?, ChatTemplate::open(folder)?);
        let eos = end_tokens(folder, runner.spec().vocab, &tokenizer)?;
        Ok(Self { runner, tokenizer, template, eos, blocks, logits: Vec::new() })
    }

    fn prompt(&self, sample: &Value) -> Result<Vec<u32>> {
        let messages = sample["messages"].as_array().context("messages is no list")?;
        let text = self.template.render(&messages[..1], None, true, &Default::default())?;
        let ids = self.tokenizer.encode(&text, false)?;
        ensure!(ids.len() < CONTEXT, "a prompt of {} tokens; the limit is {CONTEXT}", ids.len());
        Ok(ids)
    }

    fn forward(&mut self, tokens: &[u32], start: usize, logits: LogitsWanted) -> Result<()> {
        self.logits.clear();
        let chunk = SequenceChunk { tokens, start, blocks: &self.blocks, logits };
        Ok(self.runner.forward(&[chunk], &mut self.logits)?)
    }

    /// Negative log-likelihood of the reference answer and its tokens.
    fn answer_nll(&mut self, sample: &Value) -> Result<(f64, usize)> {
        let mut ids = self.prompt(sample)?;
        let from = ids.len();
        let answer = sample["messages"][1]["content"].as_str().context("messages[1].content is no text")?;
        ids.extend(self.tokenizer.encode(&format!("{answer}<|im_end|>"), false)?);
        ensure!(ids.len() <= CONTEXT, "a sample of {} tokens; the limit is {CONTEXT}", ids.len());
        self.forward(&ids, 0, LogitsWanted::All)?;
        let vocab = self.runner.spec().vocab;
        let nll = (from..ids.len())
            .map(|i| {
                let row = &self.logits[(i - 1) * vocab..i * vocab];
                let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f64 = row.iter().map(|&l| f64::from(l - max).exp()).sum();
                sum.ln() - f64::from(row[ids[i] as usize] - max)
            })
            .sum();
        Ok((nll, ids.len() - from))
    }

    /// The greedy answer.
    fn answer(&mut self, sample: &Value, max_tokens: usize) -> Result<String> {
        let prompt = self.prompt(sample)?;
        self.forward(&prompt, 0, LogitsWanted::Last)?;
        let (mut out, mut position) = (Vec::new(), prompt.len());
        while out.len() < max_tokens && position < CONTEXT {
            let best =
                (0..self.logits.len()).max_by(|&a, &b| self.logits[a].total_cmp(&self.logits[b]).then(b.cmp(&a)));
            let next = best.context("no logits")? as u32;
            if self.eos.contains(&next) {
                break;
            }
            out.push(next);
            self.forward(&[next], position, LogitsWanted::Last)?;
            position += 1;
        }
        Ok(self.tokenizer.decode(&out, true)?)
    }
}
