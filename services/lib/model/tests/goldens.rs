//! Every reference checkpoint of `tests/goldens` on both backends, and the promises of exactness and determinism.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
use moesaic_model::backend::BackendKind;
use moesaic_model::decoder::{LoadOptions, load};
use moesaic_model::{LogitsWanted, Runner, SequenceChunk};
use moesaic_types::{BLOCK_TOKENS, KvFormat, WeightFormat};
use serde::Deserialize;
use serde_json::json;
use std::path::PathBuf;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
    routing: Option<RoutingGolden>,
    logit_std: f32,
}

#[derive(Deserialize)]
struct Case {
    prompt_ids: Vec<u32>,
    last_logits: Vec<f32>,
    prompt_logprobs: Vec<f32>,
    greedy_ids: Vec<u32>,
}

#[derive(Deserialize)]
struct RoutingGolden {
    case: usize,
    experts_sorted_per_layer: Vec<Vec<Vec<u32>>>,
}

const BLOCKS: usize = 64;

/// A checkpoint of `tests/goldens`, or of the folder that `MOESAIC_GOLDENS` names.
fn folder(name: &str) -> PathBuf {
    let default = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../tests/goldens");
    std::env::var_os("MOESAIC_GOLDENS").map_or_else(default, PathBuf::from).join(name)
}

fn goldens() -> Vec<PathBuf> {
    let mut folders: Vec<_> = std::fs::read_dir(folder(""))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("golden.json").exists())
        .collect();
    folders.sort();
    assert!(!folders.is_empty());
    folders
}

fn read(path: &std::path::Path) -> Golden {
    serde_json::from_slice(&std::fs::read(path.join("golden.json")).unwrap()).unwrap()
}

fn open(path: &std::path::Path, kind: BackendKind, weights: WeightFormat, kv: KvFormat) -> Box<dyn Runner> {
    let options = LoadOptions {
        weights: Some(weights),
        kv,
        threads: 2,
        activations: moesaic_model::Activations::F32,
        progress: None,
    };
    let mut model = load(path, kind, &options).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    model.allocate_kv(BLOCKS).unwrap();
    model
}

/// One sequence in chunks of `size`; all logits.
fn run(model: &mut dyn Runner, tokens: &[u32], size: usize, blocks: &[u32]) -> Vec<f32> {
    let mut logits = Vec::new();
    for (index, chunk) in tokens.chunks(size).enumerate() {
        let chunk = SequenceChunk { tokens: chunk, start: index * size, blocks, logits: LogitsWanted::All };
        model.forward(&[chunk], &mut logits).unwrap();
    }
    logits
}

fn logprob(row: &[f32], token: u32) -> f32 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&x| f64::from(x - max).exp()).sum();
    row[token as usize] - max - sum.ln() as f32
}

fn argmax(row: &[f32]) -> u32 {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a))).unwrap() as u32
}

fn kl(p: &[f32], q: &[f32]) -> f32 {
    (0..p.len() as u32).map(|t| logprob(p, t).exp() * (logprob(p, t) - logprob(q, t))).sum()
}

/// The largest difference; a NaN on either side is infinitely far from everything.
fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let difference = |(a, b): (&f32, &f32)| if a.is_nan() || b.is_nan() { f32::INFINITY } else { (a - b).abs() };
    a.iter().zip(b).map(difference).fold(0.0, f32::max)
}

fn check(path: &std::path::Path, kind: BackendKind) {
    let name = format!("{} on {kind:?}", path.file_name().unwrap().to_string_lossy());
    let golden = read(path);
    let mut model = open(path, kind, WeightFormat::F32, KvFormat::F32);
    let model = &mut *model;
    let vocab = model.spec().vocab;
    let tolerance = 2e-3 * golden.logit_std.max(1.0);
    // Scattered and unordered, as a pool gives them.
    let blocks: Vec<u32> = (0..8).map(|n| (n * 37 + 11) % BLOCKS as u32).collect();
    model.record_routing(true);
    for (index, case) in golden.cases.iter().enumerate() {
        for size in [case.prompt_ids.len(), 5, 64] {
            let logits = run(model, &case.prompt_ids, size, &blocks);
            let rows: Vec<&[f32]> = logits.chunks_exact(vocab).collect();
            assert_eq!(rows.len(), case.prompt_ids.len());
            let worst = worst(rows.last().unwrap(), &case.last_logits);
            assert!(worst <= tolerance, "{name}, case {index}, chunks of {size}: logits differ by {worst}");
            for (position, expected) in case.prompt_logprobs.iter().enumerate() {
                let difference = (logprob(rows[position], case.prompt_ids[position + 1]) - expected).abs();
                assert!(difference <= 2e-3, "{name}, case {index}: log-probability {position} differs by {difference}");
            }
            match &golden.routing {
                Some(routing) if routing.case == index && size == case.prompt_ids.len() => {
                    assert_eq!(model.routing(), routing.experts_sorted_per_layer, "{name}: routing");
                }
                _ => {}
            }
            let (mut next, mut greedy) = (argmax(rows.last().unwrap()), Vec::new());
            for step in 0..case.greedy_ids.len() {
                greedy.push(next);
                let chunk = SequenceChunk {
                    tokens: &[next],
                    start: case.prompt_ids.len() + step,
                    blocks: &blocks,
                    logits: LogitsWanted::Last,
                };
                let mut logits = Vec::new();
                model.forward(&[chunk], &mut logits).unwrap();
                assert!(!logits.iter().any(|logit| logit.is_nan()), "{name}, case {index}: greedy step {step}");
                next = argmax(&logits);
            }
            assert_eq!(greedy, case.greedy_ids, "{name}, case {index}, chunks of {size}: greedy");
        }
    }
}

#[test]
fn native_matches_every_reference() {
    goldens().iter().for_each(|path| check(path, BackendKind::Native));
}

#[test]
fn candle_matches_every_reference() {
    goldens().iter().for_each(|path| check(path, BackendKind::Candle));
}

/// A reference checkpoint with other `rope_parameters`.
fn with_rope(name: &str, parameters: serde_json::Value) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for file in ["model.safetensors", "golden.json"] {
        std::fs::copy(folder(name).join(file), copy.path().join(file)).unwrap();
    }
    let config = std::fs::read(folder(name).join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    config["rope_parameters"] = parameters;
    std::fs::write(copy.path().join("config.json"), config.to_string()).unwrap();
    copy
}

#[test]
fn scalings_that_depend_on_the_length_match_the_references_that_they_equal() {
    // up to the length of training, dynamic scaling is none
    let dynamic = with_rope("llama_dense", json!({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}));
    // with one factor for all frequencies, LongRoPE is linear scaling
    let factors = json!({
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": vec![1.0; 8], "long_factor": vec![2.0; 8],
        "attention_factor": 1.0, "original_max_position_embeddings": 64,
    });
    let long = with_rope("llama_rope_linear", factors);
    for kind in [BackendKind::Native, BackendKind::Candle] {
        check(dynamic.path(), kind);
        check(long.path(), kind);
    }
}

#[test]
fn native_logits_do_not_depend_on_chunks_or_on_the_batch() {
    for path in goldens() {
        let golden = read(&path);
        for (weights, kv) in [(WeightFormat::F32, KvFormat::F32), (WeightFormat::Q4 { group: 32 }, KvFormat::Bf16)] {
            let mut model = open(&path, BackendKind::Native, weights, kv);
            let model = &mut *model;
            let vocab = model.spec().vocab;
            let blocks = |case: usize| -> Vec<u32> { (0..4).map(|n| (case * 4 + n) as u32).collect() };
            let alone: Vec<Vec<f32>> = golden
                .cases
                .iter()
                .enumerate()
                .map(|(case, c)| run(model, &c.prompt_ids, c.prompt_ids.len(), &blocks(case)))
                .collect();
            for (case, c) in golden.cases.iter().enumerate() {
                for size in [1, 2, 3, 7, 33, 64, 65] {
                    let chunked = run(model, &c.prompt_ids, size, &blocks(case));
                    assert!(chunked == alone[case], "{}: case {case}, chunks of {size}, {weights}", path.display());
                }
            }
            // All in one batch: the long ones' tails beside the short ones' whole prompts.
            let cut = |tokens: &[u32]| if tokens.len() > 20 { tokens.len() / 2 } else { 0 };
            let all_blocks: Vec<Vec<u32>> = (0..golden.cases.len()).map(blocks).collect();
            let heads: Vec<_> = (0..golden.cases.len())
                .filter(|&case| cut(&golden.cases[case].prompt_ids) > 0)
                .map(|case| SequenceChunk {
                    tokens: &golden.cases[case].prompt_ids[..cut(&golden.cases[case].prompt_ids)],
                    start: 0,
                    blocks: &all_blocks[case],
                    logits: LogitsWanted::None,
                })
                .collect();
            let mut logits = Vec::new();
            model.forward(&heads, &mut logits).unwrap();
            assert!(logits.is_empty());
            let tails: Vec<_> = (0..golden.cases.len())
                .map(|case| SequenceChunk {
                    tokens: &golden.cases[case].prompt_ids[cut(&golden.cases[case].prompt_ids)..],
                    start: cut(&golden.cases[case].prompt_ids),
                    blocks: &all_blocks[case],
                    logits: LogitsWanted::Last,
                })
                .collect();
            model.forward(&tails, &mut logits).unwrap();
            for (case, row) in logits.chunks_exact(vocab).enumerate() {
                let last = &alone[case][alone[case].len() - vocab..];
                assert!(row == last, "{}: case {case} in a batch, {weights}", path.display());
            }
        }
    }
}

#[test]
fn exported_blocks_continue_a_sequence_elsewhere() {
    for kind in [BackendKind::Native, BackendKind::Candle] {
        for (name, kv) in [("qwen3_moe", KvFormat::F32), ("deepseek_v3", KvFormat::Bf16), ("gpt_oss", KvFormat::Bf16)] {
            let path = folder(name);
            let tokens = read(&path).cases[3].prompt_ids.clone();
            let mut first = open(&path, kind, WeightFormat::F32, kv);
            let whole = run(&mut *first, &tokens, tokens.len(), &[5, 6, 7]);
            let mut second = open(&path, kind, WeightFormat::F32, kv);
            for (from, to) in [(5, 20), (6, 9)] {
                let bytes = first.export_block(from).unwrap();
                assert_eq!(bytes.len(), first.kv_block_bytes());
                second.import_block(to, &bytes).unwrap();
            }
            assert!(second.import_block(0, &[0; 3]).is_err());
            let start = 2 * BLOCK_TOKENS;
            let mut logits = Vec::new();
            let chunk =
                SequenceChunk { tokens: &tokens[start..], start, blocks: &[20, 9, 1], logits: LogitsWanted::All };
            second.forward(&[chunk], &mut logits).unwrap();
            let expected = &whole[start * first.spec().vocab..];
            match kind {
                BackendKind::Native => assert!(logits == expected, "{name}"),
                BackendKind::Candle => {
                    assert!(worst(&logits, expected) < 1e-3, "{name}");
                }
            }
        }
    }
}

#[test]
fn rounded_weights_stay_close_and_alike_on_both_backends() {
    for name in ["qwen3_moe", "gpt_oss", "deepseek_v2", "bloom_alibi"] {
        let path = folder(name);
        let tokens = read(&path).cases[2].prompt_ids.clone();
        let logits = |kind, format, kv| {
            let mut model = open(&path, kind, format, kv);
            (run(&mut *model, &tokens, tokens.len(), &[3, 1]), model.spec().vocab)
        };
        let mean_kl = |p: &[f32], q: &[f32], vocab: usize| {
            p.chunks_exact(vocab).zip(q.chunks_exact(vocab)).map(|(p, q)| kl(p, q)).sum::<f32>() / tokens.len() as f32
        };
        let (exact, vocab) = logits(BackendKind::Native, WeightFormat::F32, KvFormat::F32);
        // Tiny random models: rounding moves tokens to other experts, so the limits are wide.
        let formats = [(WeightFormat::Bf16, 0.02), (WeightFormat::Q8, 0.2), (WeightFormat::Q4 { group: 32 }, 3.0)];
        for (format, limit) in formats {
            let (native, _) = logits(BackendKind::Native, format, KvFormat::Bf16);
            let (candle, _) = logits(BackendKind::Candle, format, KvFormat::Bf16);
            let error = mean_kl(&exact, &native, vocab);
            assert!(error < limit, "{name} in {format}: mean KL {error}");
            let between = mean_kl(&native, &candle, vocab);
            // native attention rounds queries and weights to bf16, where the CPU multiplies pairs of those
            assert!(between < 5e-2, "{name} in {format}: mean KL {between} between the backends");
        }
        let (int8, _) = logits(BackendKind::Native, WeightFormat::F32, KvFormat::Int8);
        let error = mean_kl(&exact, &int8, vocab);
        assert!(error < 0.2, "{name} with keys and values in int8: mean KL {error}");
    }
}

#[test]
fn impossible_chunks_are_errors() {
    let mut model = open(&folder("qwen3_moe"), BackendKind::Native, WeightFormat::F32, KvFormat::F32);
    let mut logits = Vec::new();
    let chunk = |tokens, start, blocks| SequenceChunk { tokens, start, blocks, logits: LogitsWanted::Last };
    for (bad, word) in [
        (chunk(&[], 0, &[0]), "no tokens"),
        (chunk(&[512], 0, &[0]), "vocabulary"),
        (chunk(&[1], 64, &[0]), "positions"),
        (chunk(&[1], 0, &[64]), "pool"),
    ] {
        let error = model.forward(&[bad], &mut logits).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    assert!(logits.is_empty());
}
