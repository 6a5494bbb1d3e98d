//! Generating a token allocates no memory once the buffers of a model with all its layers and experts here have grown,
//! whatever its attention.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
use moesaic_model::backend::BackendKind;
use moesaic_model::decoder::{LoadOptions, load};
use moesaic_model::{LogitsWanted, SequenceChunk};
use moesaic_types::{BLOCK_TOKENS, KvFormat, WeightFormat};
use std::path::Path;

const PROMPT: usize = 5;

#[test]
fn a_step_of_generation_allocates_nothing() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../tests/goldens");
    for (model, weights, kv) in [
        ("qwen3_moe", Some(WeightFormat::Q4 { group: 32 }), KvFormat::Bf16),
        ("qwen3_moe", Some(WeightFormat::Bf16), KvFormat::Int8),
        ("mixtral", None, KvFormat::F32),
        ("gpt_oss", Some(WeightFormat::Q8), KvFormat::Bf16),
        ("deepseek_v3", None, KvFormat::Bf16),
    ] {
        // what runs on other threads would not be counted
        let options = LoadOptions { weights, kv, threads: 1, ..LoadOptions::default() };
        let mut runner = load(&goldens.join(model), BackendKind::Native, &options).unwrap();
        runner.allocate_kv(6).unwrap();
        let blocks: [[u32; 2]; 3] = [[0, 1], [2, 3], [4, 5]];
        let tokens: Vec<u32> = (5..5 + BLOCK_TOKENS as u32 * 2).collect();
        let mut logits = Vec::new();
        let mut step = |start: usize, count: usize| {
            logits.clear();
            let chunk = |blocks| SequenceChunk {
                tokens: &tokens[start..start + count],
                start,
                blocks,
                logits: LogitsWanted::Last,
            };
            let batch = [chunk(&blocks[0][..]), chunk(&blocks[1][..]), chunk(&blocks[2][..])];
            runner.forward(&batch, &mut logits).unwrap();
            runner.forward(&batch[..1], &mut logits).unwrap();
        };
        step(0, PROMPT);
        step(PROMPT, 1);
        let end = BLOCK_TOKENS + PROMPT;
        for start in PROMPT + 1..end {
            let counted = allocation_counter::measure(|| step(start, 1));
            assert_eq!(counted.count_total, 0, "{model} {weights:?} {kv:?}: at position {start}");
        }
    }
}
