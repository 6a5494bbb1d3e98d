//! Reference outputs, and the comparison of a runner with them.
//!
//! Weights in f32 are held to the reference itself. Rounded weights (bf16, q8, q4) are not the reference's, and how far
//! they move the outputs is a property of the model: in q4 the trained demo model moves by 0.002 nats, tiny random
//! checkpoints by up to 2.7. So two things are judged that do not depend on the model: the outputs must be those of plain
//! f32 arithmetic on the same rounded weights, within the tolerance of f32; and where they are further from the reference
//! than is usual, the unrounded weights must give the reference, so that nothing but rounding lies between. A runner that
//! rounds activations too is held to the first with activations in f32, and to a bound of what rounding them may do.
use crate::runner::{LogitsWanted, Runner, SequenceChunk};
use crate::{Error, Result};
use moesaic_types::{BLOCK_TOKENS, TokenId, WeightFormat};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::Path;

/// How much a log-probability may differ in f32 arithmetic; a logit too, times the logits' deviation if that is above 1.
const LOGPROB_TOLERANCE: f32 = 2e-3;
/// How far activations in int8 may move a distribution: mean KL divergence. Trained models stay below a thousandth of it; the
/// tiny random ones of the tests send a token to another expert now and then.
const INT8_KL: f64 = 0.25;
/// The same for activations in bf16.
const BF16_KL: f64 = 0.05;

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
    /// Largest difference, of a logit after the prompt or of a prompt token's log-probability, from plain arithmetic on
    /// the same rounded weights; `None` for weights in f32.
    #[serde(skip)]
    pub max_plain_diff: Option<f32>,
    /// Mean KL divergence of our distribution from that of plain arithmetic on the same rounded weights.
    #[serde(skip)]
    pub plain_kl: Option<f64>,
    /// Whether the unrounded weights give the reference; `None` where that was not needed.
    #[serde(skip)]
    pub unrounded_passed: Option<bool>,
}

/// A model as [`check_rounded`] needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// The runner that is judged.
    Judged,
    /// The same with activations in f32.
    Exact,
    /// The same rounded weights, in f32 arithmetic that is not the judged runner's.
    Plain,
    /// The weights in f32.
    Unrounded,
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
        if let Some(difference) = self.max_plain_diff {
            writeln!(f, "plain arithmetic    {difference:.2e} largest difference, with activations in f32")?;
        }
        if let Some(kl) = self.plain_kl {
            writeln!(f, "                    {kl:.2e} mean KL divergence, with activations as they are")?;
        }
        if let Some(passed) = self.unrounded_passed {
            writeln!(f, "unrounded weights   {}", if passed { "passed" } else { "NOT passed" })?;
        }
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

    /// Allocates the KV pool of a fresh runner; its blocks.
    fn prepare(&self, runner: &mut dyn Runner) -> Result<Vec<u32>> {
        let longest = self.cases.iter().map(|c| c.prompt_ids.len() + c.greedy_ids.len()).max().unwrap_or(0);
        let blocks: Vec<u32> = (0..longest.div_ceil(BLOCK_TOKENS).max(1) as u32).collect();
        runner.allocate_kv(blocks.len())?;
        Ok(blocks)
    }

    /// Logits of a prompt's positions.
    fn run(&self, index: usize, runner: &mut dyn Runner, blocks: &[u32]) -> Result<Vec<f32>> {
        let (case, vocab) = (&self.cases[index], runner.spec().vocab);
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
        runner.forward(&[SequenceChunk { tokens: &case.prompt_ids, start: 0, blocks, logits: all }], &mut logits)?;
        Ok(logits)
    }

    /// The same prompts with what a fresh runner answers to them; without greedy tokens and routing.
    fn answered_by(&self, runner: &mut dyn Runner) -> Result<Self> {
        let (vocab, blocks) = (runner.spec().vocab, self.prepare(runner)?);
        let answer = |(index, case): (usize, &Case)| {
            let logits = self.run(index, runner, &blocks)?;
            Ok(Case {
                prompt_ids: case.prompt_ids.clone(),
                last_logits: logits[logits.len() - vocab..].to_vec(),
                prompt_logprobs: case.logprobs(&logits).collect(),
                greedy_ids: Vec::new(),
            })
        };
        let cases = self.cases.iter().enumerate().map(answer).collect::<Result<_>>()?;
        Ok(Self { cases, routing: None, logit_std: self.logit_std })
    }

    /// How much a logit may differ in f32 arithmetic.
    fn tolerance(&self) -> f32 {
        LOGPROB_TOLERANCE * self.logit_std.max(1.0)
    }
}

impl Case {
    /// Log-probabilities of the prompt's tokens after the first, from the logits of its positions.
    fn logprobs<'a>(&'a self, logits: &'a [f32]) -> impl Iterator<Item = f32> + 'a {
        let rows = logits.chunks_exact(self.last_logits.len());
        rows.zip(&self.prompt_ids[1..]).map(|(row, token)| log_softmax(row)[*token as usize] as f32)
    }

    /// The largest differences of a logit after the prompt and of a log-probability, from the logits of its positions.
    fn differences(&self, logits: &[f32]) -> (f32, f32) {
        let last = &logits[logits.len() - self.last_logits.len()..];
        let of_logits = last.iter().zip(&self.last_logits).fold(0.0, |most, (got, want)| worst(most, got - want));
        let pairs = self.logprobs(logits).zip(&self.prompt_logprobs);
        (of_logits, pairs.fold(0.0, |most, (got, want)| worst(most, got - want)))
    }
}

/// Compares a fresh runner (its KV pool not allocated yet) with the reference, in the goldens' tolerance for f32: logits
/// within 2e-3 · max(1, their deviation), log-probabilities within 2e-3, equal routing and greedy tokens.
///
/// # Errors
/// What the runner says; `Text` when a case is of another vocabulary or its parts do not fit each other.
pub fn check(runner: &mut dyn Runner, golden: &Golden) -> Result<Report> {
    compare(runner, golden, None)
}

/// Compares a runner whose weights are rounded to `weights` with the reference. It passes if its logits and
/// log-probabilities are those of [`Variant::Plain`] within the tolerance of [`check`], and if its mean KL divergence from
/// the reference is usual for the format (bf16 0.01, q8 0.02, q4 0.35) or else [`Variant::Unrounded`] passes [`check`].
/// A runner that rounds activations too (to int8 or bf16) is further off: then [`Variant::Exact`], which does not, must be
/// within the tolerance, and the mean KL divergence of both at most 0.25 (int8) or 0.05 (bf16).
/// `open` gives fresh runners, one after another.
///
/// # Errors
/// What `open` says, and as [`check`].
pub fn check_rounded<E: From<Error>>(
    golden: &Golden,
    weights: WeightFormat,
    open: impl Fn(Variant) -> Result<Box<dyn Runner>, E>,
) -> Result<Report, E> {
    let (usual_kl, activations_kl) = match weights {
        WeightFormat::F32 => (0.0, 0.0),
        WeightFormat::Bf16 => (0.01, BF16_KL),
        WeightFormat::Q8 => (0.02, INT8_KL),
        WeightFormat::Q4 { .. } => (0.35, INT8_KL),
    };
    let plain = golden.answered_by(open(Variant::Plain)?.as_mut())?;
    let mut report = compare(open(Variant::Judged)?.as_mut(), golden, Some(&plain))?;
    if !report.passed && weights != WeightFormat::F32 {
        let exact = compare(open(Variant::Exact)?.as_mut(), golden, Some(&plain))?;
        report.max_plain_diff = exact.max_plain_diff;
        report.passed = exact.passed && report.plain_kl.is_some_and(|kl| kl <= activations_kl);
    }
    if report.passed && report.mean_kl > usual_kl {
        let passed = check(open(Variant::Unrounded)?.as_mut(), golden)?.passed;
        report.unrounded_passed = Some(passed);
        report.passed = passed;
    }
    Ok(report)
}

/// Compares with the reference; what passes is decided by `plain` if it is there, else by the reference.
fn compare(runner: &mut dyn Runner, golden: &Golden, plain: Option<&Golden>) -> Result<Report> {
    let vocab = runner.spec().vocab;
    let blocks = golden.prepare(runner)?;
    runner.record_routing(true);
    let (mut logit_diff, mut logprob_diff) = (0f32, 0f32);
    let (mut plain_logit_diff, mut plain_logprob_diff) = (0f32, 0f32);
    let (mut kl, mut plain_kl, mut greedy, mut routing_match) = (0.0, 0.0, 0, None);
    let mut all_numbers = true;
    for (index, case) in golden.cases.iter().enumerate() {
        let logits = golden.run(index, runner, &blocks)?;
        all_numbers &= is_numbers(&logits);
        if let Some(routing) = golden.routing.as_ref().filter(|r| r.case == index) {
            routing_match = Some(share_equal(runner.routing(), &routing.experts_sorted_per_layer));
        }
        let (of_logits, of_logprobs) = case.differences(&logits);
        (logit_diff, logprob_diff) = (worst(logit_diff, of_logits), worst(logprob_diff, of_logprobs));
        if let Some(plain) = plain {
            let (of_logits, of_logprobs) = plain.cases[index].differences(&logits);
            plain_logit_diff = worst(plain_logit_diff, of_logits);
            plain_logprob_diff = worst(plain_logprob_diff, of_logprobs);
        }
        let last = &logits[logits.len() - vocab..];
        kl += divergence(&case.last_logits, last);
        plain_kl += plain.map_or(0.0, |plain| divergence(&plain.cases[index].last_logits, last));
        let decoded = decode(runner, case, last.to_vec(), &blocks)?;
        greedy += usize::from(decoded.equal);
        all_numbers &= decoded.all_numbers;
    }
    let cases = golden.cases.len();
    let mean = |kl: f64| kl / cases.max(1) as f64;
    let mean_kl = mean(kl);
    let within = |logit: f32, logprob: f32| logit <= golden.tolerance() && logprob <= LOGPROB_TOLERANCE;
    let passed = match plain {
        Some(_) => within(plain_logit_diff, plain_logprob_diff),
        None => {
            let routed = routing_match.is_none_or(|share| share == 1.0);
            within(logit_diff, logprob_diff) && greedy == cases && routed
        }
    };
    Ok(Report {
        cases,
        max_abs_logit_diff: logit_diff,
        // JSON has no NaN
        mean_kl: if mean_kl.is_finite() { mean_kl } else { f64::MAX },
        greedy_match: greedy as f32 / cases.max(1) as f32,
        passed: passed && all_numbers && cases > 0,
        max_logprob_diff: logprob_diff,
        routing_match,
        max_plain_diff: plain.map(|_| plain_logit_diff.max(plain_logprob_diff)),
        unrounded_passed: None,
        plain_kl: plain.map(|_| mean(plain_kl)),
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
