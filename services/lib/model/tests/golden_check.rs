//! The comparison of `moesaic check`: what is not a number is never equal, in any place and any weight format.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
use bytes::Bytes;
use moesaic_model::golden::{Case, Golden, Report, check};
use moesaic_model::runner::BlockIndex;
use moesaic_model::spec::{ModelSpec, from_config};
use moesaic_model::{LogitsWanted, Result, Runner, SequenceChunk};
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
    fn export_block(&self, _: BlockIndex) -> Result<Bytes> {
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

fn run(golden: &Golden, replaced: Option<(usize, usize, f32)>, weights: WeightFormat) -> Result<Report> {
    let spec = from_config(Path::new("config.json"), &json!({"model_type": "llama", "vocab_size": VOCAB})).unwrap();
    check(&mut Fake { spec, replaced }, golden, weights)
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

#[test]
fn cases_that_contradict_themselves_are_errors() {
    let mut other = golden();
    other.cases[0].last_logits.push(0.0);
    assert!(run(&other, None, WeightFormat::F32).unwrap_err().to_string().contains("5 logits"));
    let mut other = golden();
    other.cases[0].prompt_logprobs.push(0.0);
    assert!(run(&other, None, WeightFormat::F32).unwrap_err().to_string().contains("3 log-probabilities"));
}
