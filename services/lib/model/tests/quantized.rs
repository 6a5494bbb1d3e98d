//! Rounded weights against plain arithmetic: the checkpoint is rounded here, value by value, by the formats'
//! definitions and run in f32; a runner that holds the original in such a format must have the same values and answer the
//! same. What else lies between it and the reference is rounding.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
mod support;

use half::f16;
use moesaic_model::backend::{Matrix, TensorSlice};
use moesaic_model::golden::{self, Golden, Variant};
use moesaic_model::{Activations, BackendKind, LoadOptions, LogitsWanted, Result, Runner, SequenceChunk, load};
use moesaic_types::{KvFormat, WeightFormat};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use support::matrices;
use support::safetensors::{Tensors, golden as checkpoint, golden_folder};

/// Values of one group as q8 or q4 has them.
fn round_group(values: &mut [f32], four_bits: bool) {
    let extreme = values.iter().fold(0f32, |m, v| if v.abs() > m.abs() { *v } else { m });
    let scale = f16::from_f32(if four_bits { extreme / -8.0 } else { extreme.abs() / 127.0 }).to_f32();
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let (least, most) = if four_bits { (-8.0, 7.0) } else { (-127.0, 127.0) };
    values.iter_mut().for_each(|v| *v = (*v * inverse).round().clamp(least, most) * scale);
}

fn round_rows(values: &mut [f32], cols: usize, format: WeightFormat) {
    let (group, four_bits) = match format {
        WeightFormat::Q8 => (32, false),
        WeightFormat::Q4 { group } => (usize::from(group), true),
        WeightFormat::F32 | WeightFormat::Bf16 => return,
    };
    for row in values.chunks_exact_mut(cols) {
        row.chunks_mut(group).for_each(|values| round_group(values, four_bits));
    }
}

fn turned(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let turn = |m: &[f32]| (0..cols * rows).map(|i| m[i % rows * cols + i / rows]).collect::<Vec<_>>();
    values.chunks_exact(rows * cols).flat_map(turn).collect()
}

/// Writes a reference checkpoint as it is after rounding to `format`.
fn write_rounded(folder: &Path, name: &str, format: WeightFormat) {
    let (tensors, config) = checkpoint(name);
    let mut rounded = Tensors::default();
    for (tensor, (_, shape, bytes)) in tensors.0 {
        let mut values: Vec<f32> =
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let has = |words: &[&str]| words.iter().any(|word| tensor.contains(word));
        let exact = shape.len() < 2
            || tensor.ends_with("_bias")
            || has(&["mlp.gate.", "router", "block_sparse_moe.gate.", "shared_expert_gate"])
            || has(&["embed", "kv_b_proj"]);
        let format = match format {
            WeightFormat::Q4 { .. } if has(&["lm_head"]) => WeightFormat::Q8,
            format => format,
        };
        let (rows, cols) = (shape[shape.len().saturating_sub(2)], shape[shape.len() - 1]);
        if !exact && has(&["gate_up_proj", "experts.down_proj"]) && shape.len() == 3 {
            let mut outputs = turned(&values, rows, cols);
            round_rows(&mut outputs, rows, format);
            values = turned(&outputs, cols, rows);
        } else if !exact {
            round_rows(&mut values, cols, format);
        }
        rounded.f32(&tensor, &shape, &values);
    }
    rounded.write(folder, &config);
}

fn names() -> Vec<String> {
    let entries = std::fs::read_dir(golden_folder("")).unwrap().map(|entry| entry.unwrap().file_name());
    let names = entries.map(|name| name.into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| golden_folder(name).join("golden.json").exists()).collect();
    names.sort();
    assert!(names.len() >= 15, "{names:?}");
    names
}

fn reference(name: &str) -> (PathBuf, Golden) {
    let path = golden_folder(name);
    let golden = Golden::read(&path.join("golden.json")).unwrap();
    (path, golden)
}

const FORMATS: [WeightFormat; 5] = [
    WeightFormat::Bf16,
    WeightFormat::Q8,
    WeightFormat::Q4 { group: 32 },
    WeightFormat::Q4 { group: 64 },
    WeightFormat::Q4 { group: 128 },
];

/// Each matrix's values, by name.
fn values(folder: &Path, format: WeightFormat) -> BTreeMap<String, Vec<f32>> {
    let found = RefCell::new(BTreeMap::new());
    let take = |matrix: Matrix<'_>| {
        found.borrow_mut().insert(matrix.name.clone(), matrix.to_f32()?);
        Ok(())
    };
    matrices::each(folder, Some(format), TensorSlice::WHOLE, &take).unwrap();
    found.into_inner()
}

fn open(path: &Path, kind: BackendKind, weights: WeightFormat) -> Result<Box<dyn Runner>> {
    open_with(path, kind, weights, Activations::F32)
}

fn open_with(
    path: &Path,
    kind: BackendKind,
    weights: WeightFormat,
    activations: Activations,
) -> Result<Box<dyn Runner>> {
    let weights = Some(weights);
    load(path, kind, &LoadOptions { weights, kv: KvFormat::F32, threads: 2, activations, progress: None })
}

/// Logits of all positions, and the experts of each token.
fn logits(path: &Path, kind: BackendKind, weights: WeightFormat, tokens: &[u32]) -> (Vec<f32>, Vec<Vec<Vec<u32>>>) {
    let mut model = open(path, kind, weights).unwrap();
    model.allocate_kv(3).unwrap();
    model.record_routing(true);
    let chunk = SequenceChunk { tokens, start: 0, blocks: &[1, 0, 2], logits: LogitsWanted::All };
    let mut logits = Vec::new();
    model.forward(&[chunk], &mut logits).unwrap();
    (logits, model.routing().to_vec())
}

#[test]
fn weights_are_rounded_by_the_definitions_and_nothing_else_is() {
    for name in names() {
        let (path, golden) = reference(&name);
        let tolerance = 2e-3 * golden.logit_std.max(1.0);
        for format in FORMATS {
            let folder = tempfile::tempdir().unwrap();
            write_rounded(folder.path(), &name, format);
            let (ours, plain) = (values(&path, format), values(folder.path(), WeightFormat::F32));
            assert!(ours.keys().eq(plain.keys()), "{name} in {format}");
            for (matrix, values) in &ours {
                let same = values.iter().zip(&plain[matrix]).all(|(a, b)| a == b);
                assert!(same && values.len() == plain[matrix].len(), "{name} in {format}: {matrix}");
            }
            let tokens = &golden.cases[3].prompt_ids;
            let (want, routing) = logits(folder.path(), BackendKind::Candle, WeightFormat::F32, tokens);
            for kind in [BackendKind::Native, BackendKind::Candle] {
                let (got, got_routing) = logits(&path, kind, format, tokens);
                let near = got.iter().zip(&want).all(|(a, b)| (a - b).abs() <= tolerance);
                assert!(near && got.len() == want.len(), "{name} in {format} on {kind:?}");
                assert_eq!(got_routing, routing, "{name} in {format} on {kind:?}");
            }
        }
    }
}

fn check(path: &Path, golden: &Golden, kind: BackendKind, format: WeightFormat) -> golden::Report {
    let other = if kind == BackendKind::Native { BackendKind::Candle } else { BackendKind::Native };
    let report = golden::check_rounded(golden, format, |variant| match variant {
        Variant::Judged => open_with(path, kind, format, Activations::Int8),
        Variant::Exact => open(path, kind, format),
        Variant::Plain => open(path, other, format),
        Variant::Unrounded => open(path, kind, WeightFormat::F32),
    });
    report.unwrap()
}

#[test]
fn every_reference_passes_in_every_format() {
    let q4 = FORMATS[2];
    let judged = FORMATS[..3].iter().map(|format| (BackendKind::Native, *format)).chain([(BackendKind::Candle, q4)]);
    for name in names() {
        let (path, golden) = reference(&name);
        for (kind, format) in judged.clone() {
            let report = check(&path, &golden, kind, format);
            assert!(report.passed, "{name} in {format} on {kind:?}: {report}");
        }
    }
}

#[test]
fn another_models_reference_does_not_pass_however_far_the_format_rounds() {
    let (path, _) = reference("mixtral");
    for name in ["olmoe", "gpt_oss"] {
        for format in FORMATS {
            let report = check(&path, &reference(name).1, BackendKind::Native, format);
            // where activations in bf16 are too far off already, the unrounded weights are not asked
            let is_unasked = format == WeightFormat::Bf16 && report.unrounded_passed.is_none();
            assert!(!report.passed, "{name} in {format}: {report}");
            assert!(is_unasked || report.unrounded_passed == Some(false), "{name} in {format}: {report}");
        }
    }
}
