//! Reference outputs, and the comparison of a runner with them.
use crate::runner::{LogitsWanted, Runner, SequenceChunk};
use crate::{Error, Result};
use moesaic_types::{BLOCK_TOKENS, TokenId, WeightFormat};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::Path;

/// A `golden.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Golden {
    /// The cases.
    pub cases: Vec<Case>,
    /// The experts that one case's prompt chose.
    pub routing: Option<Routing>,
    /// Standard deviation of the logits, for the tolerance.
    pub logit_std: f32,
}

/// One prompt with its outputs.
#[derive(Clone, Debug, Deserialize)]
pub struct Case {
    /// The prompt.
    pub prompt_ids: Vec<TokenId>,
    /// Logits after the last prompt token.
    pub last_logits: Vec<f32>,
    /// Log-probability of prompt token i + 1 after tokens 0..=i.
    pub prompt_logprobs: Vec<f32>,
    /// What greedy decoding gives.
    pub greedy_ids: Vec<TokenId>,
}

/// Chosen experts.
#[derive(Clone, Debug, Deserialize)]
pub struct Routing {
    /// Which case.
    pub case: usize,
    /// `[moe layer][token] -> experts`, ascending.
    pub experts_sorted_per_layer: Vec<Vec<Vec<u32>>>,
}

/// What a comparison found. A NaN of ours is a failure, and the largest finite number where it enters a difference.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Cases compared.
    pub cases: usize,
    /// Largest difference of a logit after the prompt.
    pub max_abs_logit_diff: f32,
    /// Mean KL divergence of our distribution after the prompt from the reference's.
    pub mean_kl: f64,
    /// Share of cases whose greedy tokens are all equal.
    pub greedy_match: f32,
    /// Within tolerance.
    pub passed: bool,
    /// Largest difference of a prompt token's log-probability.
    #[serde(skip)]
    pub max_logprob_diff: f32,
    /// Share of tokens with the reference's experts; `None` where the file has none.
    #[serde(skip)]
    pub routing_match: Option<f32>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "cases               {}", self.cases)?;
        writeln!(
            f,
            "largest difference  {:.2e} logits, {:.2e} log-probability",
            self.max_abs_logit_diff, self.max_logprob_diff
        )?;
        writeln!(f, "mean KL divergence  {:.2e}", self.mean_kl)?;
        if let Some(routing) = self.routing_match {
            writeln!(f, "routing equal       {:.1} %", routing * 100.0)?;
        }
        writeln!(f, "greedy equal        {:.1} %", self.greedy_match * 100.0)?;
        f.write_str(if self.passed { "passed" } else { "NOT passed" })
    }
}

impl Golden {
    /// Reads a file.
    ///
    /// # Errors
    /// `Io` or `Corrupt`, naming the file.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        serde_json::from_slice(&bytes).map_err(|e| Error::Corrupt { path: path.to_owned(), reason: e.to_string() })
    }
}

/// Compares a fresh runner (its KV pool not allocated yet) with the reference. `weights` decides the tolerance: f32 is
/// held to the goldens' own (2e-3 · max(1, logit deviation), equal routing and greedy tokens), the others to a mean KL
/// divergence (bf16 0.01, q8 0.02, q4 0.35).
///
/// # Errors
/// What the runner says; `Text` when a case is of another vocabulary or its parts do not fit each other.
pub fn check(runner: &mut dyn Runner, golden: &Golden, weights: WeightFormat) -> Result<Report> {
    let vocab = runner.spec().vocab;
    let longest = golden.cases.iter().map(|c| c.prompt_ids.len() + c.greedy_ids.len()).max().unwrap_or(0);
    let blocks: Vec<u32> = (0..longest.div_ceil(BLOCK_TOKENS).max(1) as u32).collect();
    runner.allocate_kv(blocks.len())?;
    runner.record_routing(true);
    let (mut logit_diff, mut logprob_diff) = (0f32, 0f32);
    let (mut kl, mut greedy, mut routing_match) = (0.0, 0, None);
    let mut all_numbers = true;
    for (index, case) in golden.cases.iter().enumerate() {
        if case.last_logits.len() != vocab {
            let len = case.last_logits.len();
            return Err(Error::Text(format!("case {index} has {len} logits; the model's vocabulary is {vocab}")));
        }
        let (prompt, logprobs) = (case.prompt_ids.len(), case.prompt_logprobs.len());
        if prompt != logprobs + 1 {
            let reason = format!("case {index} has {logprobs} log-probabilities for a prompt of {prompt} tokens");
            return Err(Error::Text(reason));
        }
        let mut logits = Vec::new();
        let all = LogitsWanted::All;
        let chunk = SequenceChunk { tokens: &case.prompt_ids, start: 0, blocks: &blocks, logits: all };
        runner.forward(&[chunk], &mut logits)?;
        all_numbers &= is_numbers(&logits);
        let rows: Vec<&[f32]> = logits.chunks_exact(vocab).collect();
        if let Some(routing) = golden.routing.as_ref().filter(|r| r.case == index) {
            routing_match = Some(share_equal(runner.routing(), &routing.experts_sorted_per_layer));
        }
        for (i, want) in case.prompt_logprobs.iter().enumerate() {
            let got = log_softmax(rows[i])[case.prompt_ids[i + 1] as usize];
            logprob_diff = worst(logprob_diff, got as f32 - want);
        }
        let last = rows[rows.len() - 1];
        for (got, want) in last.iter().zip(&case.last_logits) {
            logit_diff = worst(logit_diff, got - want);
        }
        kl += divergence(&case.last_logits, last);
        let decoded = decode(runner, case, last.to_vec(), &blocks)?;
        greedy += usize::from(decoded.equal);
        all_numbers &= decoded.all_numbers;
    }
    let cases = golden.cases.len();
    let greedy_match = greedy as f32 / cases.max(1) as f32;
    let mean_kl = kl / cases.max(1) as f64;
    let exact = logit_diff <= 2e-3 * golden.logit_std.max(1.0)
        && logprob_diff <= 2e-3
        && greedy == cases
        && routing_match.is_none_or(|share| share == 1.0);
    let passed = match weights {
        WeightFormat::F32 => exact,
        WeightFormat::Bf16 => mean_kl <= 0.01,
        WeightFormat::Q8 => mean_kl <= 0.02,
        WeightFormat::Q4 { .. } => mean_kl <= 0.35,
    };
    Ok(Report {
        cases,
        max_abs_logit_diff: logit_diff,
        // JSON has no NaN
        mean_kl: if mean_kl.is_finite() { mean_kl } else { f64::MAX },
        greedy_match,
        passed: passed && all_numbers && cases > 0,
        max_logprob_diff: logprob_diff,
        routing_match,
    })
}

/// The larger magnitude; what is no finite number counts as the largest.
fn worst(so_far: f32, difference: f32) -> f32 {
    if difference.is_finite() { so_far.max(difference.abs()) } else { f32::MAX }
}

fn is_numbers(logits: &[f32]) -> bool {
    !logits.iter().any(|logit| logit.is_nan())
}

/// What greedy decoding along the reference found.
struct Decoded {
    equal: bool,
    all_numbers: bool,
}

fn decode(runner: &mut dyn Runner, case: &Case, mut logits: Vec<f32>, blocks: &[u32]) -> Result<Decoded> {
    let mut all_numbers = is_numbers(&logits);
    for (i, &want) in case.greedy_ids.iter().enumerate() {
        if moesaic_kernels::elementwise::argmax(&logits) != Some(want as usize) {
            return Ok(Decoded { equal: false, all_numbers });
        }
        logits.clear();
        let start = case.prompt_ids.len() + i;
        let chunk = SequenceChunk { tokens: &[want], start, blocks, logits: LogitsWanted::Last };
        runner.forward(&[chunk], &mut logits)?;
        all_numbers &= is_numbers(&logits);
    }
    Ok(Decoded { equal: true, all_numbers })
}

fn share_equal(got: &[Vec<Vec<u32>>], want: &[Vec<Vec<u32>>]) -> f32 {
    let total: usize = want.iter().map(Vec::len).sum();
    let layers = want.iter().enumerate().map(|(i, want)| (got.get(i), want));
    let equal: usize = layers
        .map(|(got, want)| want.iter().enumerate().filter(|(t, w)| got.and_then(|g| g.get(*t)) == Some(*w)).count())
        .sum();
    equal as f32 / total.max(1) as f32
}

/// Log-probabilities in f64.
pub fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
    logits.iter().map(|l| f64::from(l - max) - sum.ln()).collect()
}

fn divergence(reference: &[f32], ours: &[f32]) -> f64 {
    let (p, q) = (log_softmax(reference), log_softmax(ours));
    p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum()
}
