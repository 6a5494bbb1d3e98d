//! The comparison of `moesaic check`: what is not a number is never equal, in any place and any weight format.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
use bytes::Bytes;
use moesaic_model::golden::{Case, Golden, Report, Variant, check, check_rounded};
use moesaic_model::runner::BlockIndex;
use moesaic_model::spec::{ModelSpec, from_config};
use moesaic_model::{Error, LogitsWanted, Result, Runner, SequenceChunk};
use moesaic_types::{KvFormat, WeightFormat};
use serde_json::json;
use std::path::Path;

const VOCAB: usize = 4;

/// A model whose best next token is the last one plus one, and whose logit at one position and token is replaced.
struct Fake {
    spec: ModelSpec,
    replaced: Option<(usize, usize, f32)>,
}

impl Fake {
    fn row(&self, position: usize, token: u32) -> [f32; VOCAB] {
        let mut row = [0.0; VOCAB];
        row[(token as usize + 1) % VOCAB] = 1.0;
        if let Some((at, token, value)) = self.replaced
            && at == position
        {
            row[token] = value;
        }
        row
    }
}

impl Runner for Fake {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }
    fn kv_block_bytes(&self) -> usize {
        0
    }
    fn kv_format(&self) -> KvFormat {
        KvFormat::F32
    }
    fn allocate_kv(&mut self, _: usize) -> Result<()> {
        Ok(())
    }
    fn forward(&mut self, batch: &[SequenceChunk<'_>], logits: &mut Vec<f32>) -> Result<()> {
        for chunk in batch {
            let first = if chunk.logits == LogitsWanted::All { 0 } else { chunk.tokens.len() - 1 };
            for (i, token) in chunk.tokens.iter().enumerate().skip(first) {
                logits.extend(self.row(chunk.start + i, *token));
            }
        }
        Ok(())
    }
    fn routing(&self) -> &[Vec<Vec<u32>>] {
        &[]
    }
    fn record_routing(&mut self, _: bool) {}
    fn export_block(&mut self, _: BlockIndex) -> Result<Bytes> {
        Ok(Bytes::new())
    }
    fn import_block(&mut self, _: BlockIndex, _: &[u8]) -> Result<()> {
        Ok(())
    }
}

fn golden() -> Golden {
    let sum = 1f32.exp() + 3.0;
    let case = Case {
        prompt_ids: vec![0, 1, 3],
        last_logits: vec![1.0, 0.0, 0.0, 0.0],
        prompt_logprobs: vec![1.0 - sum.ln(), -sum.ln()],
        greedy_ids: vec![0, 1, 2],
    };
    Golden { cases: vec![case], routing: None, logit_std: 1.0 }
}

type Replaced = Option<(usize, usize, f32)>;

fn fake(replaced: Replaced) -> Fake {
    let spec = from_config(Path::new("config.json"), &json!({"model_type": "llama", "vocab_size": VOCAB})).unwrap();
    Fake { spec, replaced }
}

/// The report on a model with `replaced`; in f32, or rounded where the plain and the unrounded model are the reference's.
fn run(golden: &Golden, replaced: Replaced, weights: WeightFormat) -> Result<Report> {
    if weights == WeightFormat::F32 {
        return check(&mut fake(replaced), golden);
    }
    run_rounded(golden, weights, replaced, None, None)
}

fn run_rounded(
    golden: &Golden,
    weights: WeightFormat,
    judged: Replaced,
    plain: Replaced,
    unrounded: Replaced,
) -> Result<Report> {
    run_variants(golden, weights, |variant| match variant {
        Variant::Judged | Variant::Exact => judged,
        Variant::Plain => plain,
        Variant::Unrounded => unrounded,
    })
}

fn run_variants(golden: &Golden, weights: WeightFormat, of: impl Fn(Variant) -> Replaced) -> Result<Report> {
    check_rounded(golden, weights, |variant| Ok::<Box<dyn Runner>, Error>(Box::new(fake(of(variant)))))
}

#[test]
fn equal_outputs_pass_and_a_nan_anywhere_does_not() {
    for weights in [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Q8, WeightFormat::Q4 { group: 32 }] {
        let report = run(&golden(), None, weights).unwrap();
        assert!(report.passed && report.greedy_match == 1.0 && report.max_abs_logit_diff < 1e-6, "{report}");
        // in the prompt, after it, and while decoding; beside the best token, so that it is still the best
        for position in 0..6 {
            let report = run(&golden(), Some((position, 3, f32::NAN)), weights).unwrap();
            assert!(!report.passed, "{weights}, position {position}: {report}");
            let json = serde_json::to_value(&report).unwrap();
            assert!(json["max_abs_logit_diff"].is_number() && json["mean_kl"].is_number(), "{json}");
        }
    }
}

#[test]
fn a_difference_beyond_the_tolerance_does_not_pass() {
    for position in 0..5 {
        let report = run(&golden(), Some((position, 3, 2.0)), WeightFormat::F32).unwrap();
        assert!(!report.passed, "position {position}: {report}");
    }
}

const ROUNDED: [WeightFormat; 3] = [WeightFormat::Bf16, WeightFormat::Q8, WeightFormat::Q4 { group: 32 }];

#[test]
fn rounded_activations_may_move_the_outputs_as_far_as_is_usual() {
    for (weights, passes) in ROUNDED.into_iter().zip([0.5, 1.0, 1.0]) {
        // beyond the tolerance, with activations as they are within it
        let judged_by = |by: f32| {
            let of = |variant| (variant == Variant::Judged).then_some((2, 3, by));
            run_variants(&golden(), weights, of).unwrap()
        };
        let near = judged_by(passes);
        assert!(near.passed && near.plain_kl.unwrap() > 1e-4, "{weights}: {near}");
        let far = judged_by(8.0);
        assert!(!far.passed && far.plain_kl.unwrap() > 0.25, "{weights}: {far}");
        if weights == WeightFormat::Bf16 {
            let far_for_bf16 = judged_by(1.2);
            assert!(!far_for_bf16.passed && far_for_bf16.plain_kl.unwrap() < 0.25, "{far_for_bf16}");
        }
    }
}

#[test]
fn rounded_weights_must_answer_as_plain_arithmetic_does() {
    for weights in ROUNDED {
        // after the prompt and inside it; the mean KL divergence is far below what is usual
        for position in [1, 2] {
            let moved = |by: f32| Some((position, 3, by));
            let report = run_rounded(&golden(), weights, moved(0.01), None, None).unwrap();
            assert!(!report.passed && report.mean_kl < 1e-3, "{weights}, position {position}: {report}");
            assert!(report.max_plain_diff.unwrap() > 2e-3, "{report}");
            let report = run_rounded(&golden(), weights, None, moved(0.01), None).unwrap();
            assert!(!report.passed, "{weights}, position {position}: {report}");
            let report = run_rounded(&golden(), weights, moved(0.01), moved(0.011), None).unwrap();
            assert!(report.passed && report.unrounded_passed.is_none(), "{weights}, position {position}: {report}");
            let report = run_rounded(&golden(), weights, moved(f32::NAN), moved(f32::NAN), None).unwrap();
            assert!(!report.passed, "{weights}, position {position}: {report}");
        }
    }
}

#[test]
fn beyond_the_usual_divergence_the_unrounded_weights_must_be_the_references() {
    for weights in ROUNDED {
        // plain arithmetic agrees that the rounded weights are far from the reference
        let far = Some((2, 1, 4.0));
        let report = run_rounded(&golden(), weights, far, far, None).unwrap();
        assert!(report.passed && report.unrounded_passed == Some(true), "{weights}: {report}");
        assert!(report.mean_kl > 0.35 && report.greedy_match == 0.0, "{weights}: {report}");
        for unrounded in [far, Some((0, 3, 0.1)), Some((4, 0, 4.0)), Some((4, 3, f32::NAN))] {
            let report = run_rounded(&golden(), weights, far, far, unrounded).unwrap();
            assert!(!report.passed && report.unrounded_passed == Some(false), "{weights}: {report}");
        }
    }
}

#[test]
fn cases_that_contradict_themselves_are_errors() {
    let mut other = golden();
    other.cases[0].last_logits.push(0.0);
    for weights in [WeightFormat::F32, WeightFormat::Q8] {
        assert!(run(&other, None, weights).unwrap_err().to_string().contains("5 logits"));
    }
    let mut other = golden();
    other.cases[0].prompt_logprobs.push(0.0);
    assert!(run(&other, None, WeightFormat::F32).unwrap_err().to_string().contains("3 log-probabilities"));
}
