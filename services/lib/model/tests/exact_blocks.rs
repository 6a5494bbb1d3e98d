//! Matrices that a GGUF file holds as codes with one scale for 32 are held just so, whatever they are for.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
mod support;

use moesaic_model::backend::{Matrix, TensorSlice};
use moesaic_model::{BackendKind, LoadOptions, LogitsWanted, SequenceChunk, load};
use moesaic_types::{KvFormat, WeightFormat};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use support::gguf::{Blocks, EXPERTS, Gguf, HIDDEN, INNER, model};
use support::matrices;

const BLOCKS: [Blocks; 4] = [Blocks::Q4_0, Blocks::Q5_0, Blocks::Q8_0, Blocks::Mxfp4];
const Q4: WeightFormat = WeightFormat::Q4 { group: 32 };

fn models(blocks: Blocks) -> Vec<(&'static str, Gguf)> {
    vec![
        ("dense llama", model("llama", false, false, blocks)),
        ("stacked experts", model("llama", true, true, blocks)),
        ("an expert a tensor", model("llama", true, false, blocks)),
        ("a shared expert", model("qwen2moe", true, true, blocks)),
        ("tied", model("qwen3", false, false, blocks)),
    ]
}

/// Values and format of each matrix, by its own name.
type Taken = BTreeMap<String, (Vec<f32>, WeightFormat)>;

fn take(path: &Path, format: Option<WeightFormat>) -> Taken {
    take_slice(path, format, TensorSlice::WHOLE)
}

/// Takes every matrix; forbids that one of codes is expanded to f32.
fn take_slice(path: &Path, format: Option<WeightFormat>, slice: TensorSlice) -> Taken {
    let taken = RefCell::new(Taken::new());
    let take = |mut matrix: Matrix<'_>| {
        let (name, rows, cols, format) = (matrix.name.clone(), matrix.rows, matrix.cols, matrix.format);
        if matches!(format, WeightFormat::Q8 | Q4) {
            let tensor = matrix.tensor.clone();
            matrix.read = Box::new(move |_, _| panic!("{tensor} is expanded to f32"));
        }
        let packed = matrix.pack()?;
        let mut values = vec![0.0; rows * cols];
        values.chunks_exact_mut(cols).enumerate().for_each(|(row, out)| packed.dequantize_row(row, out));
        assert!(taken.borrow_mut().insert(name.clone(), (values, format)).is_none(), "{name} comes twice");
        Ok(())
    };
    matrices::each(path, format, slice, &take).unwrap();
    taken.into_inner()
}

/// The test's own reading of the file's matrices, under their own names.
fn expected(file: &Gguf, blocks: Blocks) -> BTreeMap<String, Vec<f32>> {
    let mut out = BTreeMap::new();
    for (name, (shape, kind, bytes)) in file.tensors.iter().filter(|(_, (_, kind, _))| *kind != 0) {
        assert!(*kind > 0);
        let values = blocks.values(bytes);
        if let [experts, rows, cols] = shape[..] {
            let stem = name.strip_suffix(".weight").unwrap();
            for expert in 0..experts {
                let part = values[expert * rows * cols..][..rows * cols].to_vec();
                out.insert(format!("{stem}.{expert}.weight"), part);
            }
        } else {
            out.insert(name.clone(), values);
        }
    }
    out
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[test]
fn every_role_keeps_the_files_values_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for blocks in BLOCKS {
        for (what, file) in models(blocks) {
            file.write(&path);
            let want = expected(&file, blocks);
            let stored = if blocks == Blocks::Q4_0 { Q4 } else { WeightFormat::Q8 };
            let taken = take(&path, None);
            for (name, want) in &want {
                let (got, format) = &taken[name];
                assert_eq!(*format, stored, "{what}: {name}");
                assert!(same_bits(got, want), "{what} of {blocks:?}: {name}");
            }
            // the rest are gates, in f32
            let gates = taken.iter().filter(|(name, _)| !want.contains_key(*name));
            assert!(gates.clone().all(|(name, (_, f))| name.contains("inp") && *f == WeightFormat::F32), "{what}");
            assert!(gates.count() <= 4);
        }
    }
}

#[test]
fn q8_that_is_asked_for_takes_the_codes_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for blocks in BLOCKS {
        let file = model("qwen2moe", true, true, blocks);
        file.write(&path);
        let taken = take(&path, Some(WeightFormat::Q8));
        for (name, want) in expected(&file, blocks) {
            if name != "token_embd.weight" {
                assert_eq!(taken[&name].1, WeightFormat::Q8);
                assert!(same_bits(&taken[&name].0, &want), "{blocks:?}: {name}");
            }
        }
    }
}

#[test]
fn logits_equal_those_of_the_expanded_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let tokens: Vec<u32> = (0..40).map(|i| i * 29 % 70).collect();
    for blocks in BLOCKS {
        for (what, file) in models(blocks) {
            file.write(&path);
            let logits = |weights, kind| {
                let options = LoadOptions {
                    weights,
                    kv: KvFormat::F32,
                    threads: 2,
                    activations: moesaic_model::Activations::F32,
                    progress: None,
                };
                let mut model = load(&path, kind, &options).unwrap();
                model.allocate_kv(1).unwrap();
                let chunk = SequenceChunk { tokens: &tokens, start: 0, blocks: &[0], logits: LogitsWanted::All };
                let mut logits = Vec::new();
                model.forward(&[chunk], &mut logits).unwrap();
                logits
            };
            for kind in [BackendKind::Native, BackendKind::Candle] {
                let (stored, expanded) = (logits(None, kind), logits(Some(WeightFormat::F32), kind));
                let size = expanded.iter().fold(0f32, |m, v| m.max(v.abs()));
                assert!(size > 0.1, "{what}: the logits say nothing");
                for (a, b) in stored.iter().zip(&expanded) {
                    assert!((a - b).abs() <= 1e-5 * size, "{what} of {blocks:?} on {kind:?}: {a} {b}");
                }
            }
        }
    }
}

#[test]
fn slices_of_experts_are_parts_of_the_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for blocks in BLOCKS {
        model("llama", true, true, blocks).write(&path);
        let whole = take(&path, None);
        // 96 inner values in groups of 32: one of the two has 32, the other 64
        for (rank, part) in [(0, 0..32), (1, 32..96)] {
            let slices = take_slice(&path, None, TensorSlice { rank, ranks: 2 });
            let slices: Vec<_> = slices.into_iter().filter(|(name, _)| name.contains("exps")).collect();
            assert_eq!(slices.len(), 2 * 3 * EXPERTS);
            for (name, (got, _)) in slices {
                let want: Vec<f32> = if name.contains("down") {
                    whole[&name].0.chunks_exact(INNER).flat_map(|row| &row[part.clone()]).copied().collect()
                } else {
                    whole[&name].0[part.start * HIDDEN..part.end * HIDDEN].to_vec()
                };
                assert!(same_bits(&got, &want), "{name}");
            }
        }
    }
}

#[test]
fn a_tensor_that_cannot_be_read_is_named_before_memory_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for name in ["token_embd.weight", "blk.1.attn_k.weight", "blk.0.ffn_up_exps.weight", "output_norm.weight"] {
        let mut file = model("llama", true, true, Blocks::Q8_0);
        let (shape, kind, bytes) = file.tensors.get_mut(name).unwrap();
        // an IQ type, of which no bytes are looked for
        (*kind, *bytes) = (17, Vec::new());
        if name == "token_embd.weight" {
            shape[0] = 1 << 50;
        }
        file.write(&path);
        let error = load(&path, BackendKind::Native, &LoadOptions::default()).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("IQ") && error.contains("model.gguf"), "{error}");
    }
}

#[test]
fn broken_bytes_of_a_model_are_errors_or_another_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let bytes = model("qwen2moe", true, true, Blocks::Mxfp4).bytes();
    let options = LoadOptions { threads: 1, ..LoadOptions::default() };
    let refused = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        load(&path, BackendKind::Native, &options).is_err()
    };
    assert!(!refused(&bytes));
    for cut in (1..40).map(|part| bytes.len() * part / 40) {
        assert!(refused(&bytes[..cut]), "cut to {cut} of {}", bytes.len());
    }
    let mut noticed = 0;
    for i in 0..400 {
        let mut bytes = bytes.clone();
        bytes[i * 7919 % 3500] ^= 1 << (i % 8);
        noticed += usize::from(refused(&bytes));
    }
    assert!(noticed > 200, "only {noticed} of 400 were noticed");
}
