//! GPT-OSS as llama.cpp's converter writes it, in f32 and with experts in MXFP4.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
mod support;

use moesaic_model::backend::{Matrix, TensorSlice};
use moesaic_model::golden::{self, Golden};
use moesaic_model::spec::{self, Attention, Gqa, Position, RopeScaling};
use moesaic_model::{BackendKind, LoadOptions, LogitsWanted, SequenceChunk, load, source};
use moesaic_types::{KvFormat, WeightFormat};
use serde_json::Value;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use support::gguf::{Blocks, Gguf};
use support::gpt_oss::gpt_oss;
use support::matrices;
use support::safetensors::{Tensors, golden as checkpoint, golden_folder};

/// The metadata that the converter writes, with their values from `config.json`.
fn metadata(config: &Value) -> Gguf {
    let mut file = Gguf::default();
    file.text("general.architecture", "gpt-oss");
    let number = |key: &str| config[key].as_u64().unwrap() as u32;
    for (key, from) in [
        ("block_count", "num_hidden_layers"),
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
        ("attention.value_length", "head_dim"),
        ("attention.sliding_window", "sliding_window"),
        ("expert_count", "num_local_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_feed_forward_length", "intermediate_size"),
    ] {
        file.number(&format!("gpt-oss.{key}"), number(from));
    }
    let rope = &config["rope_parameters"];
    file.float("gpt-oss.attention.layer_norm_rms_epsilon", config["rms_norm_eps"].as_f64().unwrap() as f32);
    file.float("gpt-oss.rope.freq_base", rope["rope_theta"].as_f64().unwrap() as f32);
    file.text("gpt-oss.rope.scaling.type", "yarn");
    file.float("gpt-oss.rope.scaling.factor", rope["factor"].as_f64().unwrap() as f32);
    let original = rope["original_max_position_embeddings"].as_u64().unwrap() as u32;
    file.number("gpt-oss.rope.scaling.original_context_length", original);
    file
}

fn plain(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Parts `first`, `first + 2`, ... of parts of `size`.
fn every_second<T: Copy>(values: &[T], size: usize, first: usize) -> Vec<T> {
    values.chunks_exact(size).skip(first).step_by(2).flatten().copied().collect()
}

/// `[experts, inputs, outputs]` with outputs as rows.
fn turned(values: &[f32], inputs: usize, outputs: usize) -> Vec<f32> {
    let turn = |expert: &[f32]| (0..outputs * inputs).map(|i| expert[i % inputs * outputs + i / inputs]).collect();
    values.chunks_exact(inputs * outputs).flat_map::<Vec<f32>, _>(turn).collect()
}

/// Blocks of 17 bytes: the scale, then codes `i` and `i + 16` in one byte, of codes `2i` and `2i + 1` in one.
fn repacked(scales: &[u8], codes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for (scale, codes) in scales.iter().zip(codes.chunks_exact(16)) {
        let code = |i: usize| if i.is_multiple_of(2) { codes[i / 2] & 15 } else { codes[i / 2] >> 4 };
        out.push(*scale);
        out.extend((0..16).map(|i| code(i) | code(i + 16) << 4));
    }
    out
}

/// A layer's tensor: its name, and its bytes and shape.
fn put(file: &mut Gguf, layer: &str, part: &str, shape: &[usize], bytes: &[u8], all: &Tensors, prefix: &str) {
    let at = |name: &str| format!("blk.{layer}.{name}");
    let halves = [("gate", 0), ("up", 1)];
    match (part, shape) {
        ("mlp.experts.gate_up_proj", &[experts, hidden, both]) => {
            let rows = turned(&plain(bytes), hidden, both);
            for (half, first) in halves {
                let shape = [experts, both / 2, hidden];
                file.plain(&at(&format!("ffn_{half}_exps.weight")), &shape, &every_second(&rows, hidden, first));
            }
        }
        ("mlp.experts.down_proj", &[experts, inner, hidden]) => {
            let rows = turned(&plain(bytes), inner, hidden);
            file.plain(&at("ffn_down_exps.weight"), &[experts, hidden, inner], &rows);
        }
        ("mlp.experts.gate_up_proj_bias", &[experts, both]) => {
            for (half, first) in halves {
                let values = every_second(&plain(bytes), 1, first);
                file.plain(&at(&format!("ffn_{half}_exps.bias")), &[experts, both / 2], &values);
            }
        }
        ("mlp.experts.down_proj_bias", _) => file.plain(&at("ffn_down_exps.bias"), shape, &plain(bytes)),
        ("mlp.experts.gate_up_proj_blocks", &[experts, both, groups, 16]) => {
            let scales = &all.0[&format!("{prefix}mlp.experts.gate_up_proj_scales")].2;
            for (half, first) in halves {
                let scales = every_second(scales, groups, first);
                let codes = every_second(bytes, groups * 16, first);
                let shape = [experts, both / 2, groups * 32];
                let name = at(&format!("ffn_{half}_exps.weight"));
                file.blocks(&name, &shape, Blocks::Mxfp4, repacked(&scales, &codes));
            }
        }
        ("mlp.experts.down_proj_blocks", &[experts, hidden, groups, 16]) => {
            let scales = &all.0[&format!("{prefix}mlp.experts.down_proj_scales")].2;
            let shape = [experts, hidden, groups * 32];
            file.blocks(&at("ffn_down_exps.weight"), &shape, Blocks::Mxfp4, repacked(scales, bytes));
        }
        ("mlp.experts.gate_up_proj_scales" | "mlp.experts.down_proj_scales", _) => {}
        _ => {
            let (stem, suffix) =
                if part == "self_attn.sinks" { (part, "weight") } else { part.rsplit_once('.').unwrap() };
            let stem = match stem {
                "input_layernorm" => "attn_norm",
                "post_attention_layernorm" => "post_attention_norm",
                "self_attn.q_proj" => "attn_q",
                "self_attn.k_proj" => "attn_k",
                "self_attn.v_proj" => "attn_v",
                "self_attn.o_proj" => "attn_output",
                "self_attn.sinks" => "attn_sinks",
                "mlp.router" => "ffn_gate_inp",
                other => panic!("{other}"),
            };
            file.plain(&at(&format!("{stem}.{suffix}")), shape, &plain(bytes));
        }
    }
}

/// A checkpoint of Hugging Face's names and layouts as llama.cpp names, splits and turns it.
fn to_gguf(tensors: &Tensors, config: &Value) -> Gguf {
    let mut file = metadata(config);
    for (name, (_, shape, bytes)) in &tensors.0 {
        match name.as_str() {
            "model.embed_tokens.weight" => file.plain("token_embd.weight", shape, &plain(bytes)),
            "model.norm.weight" => file.plain("output_norm.weight", shape, &plain(bytes)),
            "lm_head.weight" => file.plain("output.weight", shape, &plain(bytes)),
            _ => {
                let (layer, part) = name.strip_prefix("model.layers.").unwrap().split_once('.').unwrap();
                put(&mut file, layer, part, shape, bytes, tensors, &format!("model.layers.{layer}."));
            }
        }
    }
    file
}

fn options(weights: Option<WeightFormat>) -> LoadOptions<'static> {
    LoadOptions { weights, kv: KvFormat::F32, threads: 2, activations: moesaic_model::Activations::F32, progress: None }
}

fn logits(path: &Path, weights: Option<WeightFormat>, kind: BackendKind) -> Vec<f32> {
    let mut model = load(path, kind, &options(weights)).unwrap();
    model.allocate_kv(2).unwrap();
    // beyond the sliding window of 64
    let tokens: Vec<u32> = (0..100).map(|i| i * 37 % 512).collect();
    let chunk = SequenceChunk { tokens: &tokens, start: 0, blocks: &[1, 0], logits: LogitsWanted::All };
    let mut logits = Vec::new();
    model.forward(&[chunk], &mut logits).unwrap();
    logits
}

/// The largest difference; a NaN on either side is infinitely far from everything.
fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let difference = |(a, b): (&f32, &f32)| if a.is_nan() || b.is_nan() { f32::INFINITY } else { (a - b).abs() };
    a.iter().zip(b).map(difference).fold(0.0, f32::max)
}

#[test]
fn a_file_of_the_golden_is_the_same_model_on_both_backends() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let (tensors, config) = checkpoint("gpt_oss");
    to_gguf(&tensors, &config).write(&path);
    let golden = Golden::read(&golden_folder("gpt_oss").join("golden.json")).unwrap();
    for kind in [BackendKind::Native, BackendKind::Candle] {
        let mut model = load(&path, kind, &options(Some(WeightFormat::F32))).unwrap();
        let report = golden::check(model.as_mut(), &golden).unwrap();
        assert!(report.passed && report.routing_match == Some(1.0), "{kind:?}: {report}");
        let folder = logits(&golden_folder("gpt_oss"), Some(WeightFormat::F32), kind);
        assert_eq!(worst(&logits(&path, Some(WeightFormat::F32), kind), &folder), 0.0, "{kind:?}");
    }
}

#[test]
fn experts_in_mxfp4_are_held_exactly_and_answer_as_the_expanded_ones() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let (tensors, config) = gpt_oss(folder.path(), |i| (120 + i % 4) as u8);
    let file = to_gguf(&tensors, &config);
    file.write(&path);
    let taken = RefCell::new(BTreeMap::new());
    let take = |matrix: Matrix<'_>| {
        let (name, format) = (matrix.name.clone(), matrix.format);
        taken.borrow_mut().insert(name, (format, matrix.to_f32()?));
        Ok(())
    };
    matrices::each(&path, None, TensorSlice::WHOLE, &take).unwrap();
    let taken = taken.into_inner();
    let mut experts = 0;
    for (name, (shape, _, bytes)) in file.tensors.iter().filter(|(name, _)| name.ends_with("exps.weight")) {
        let values = Blocks::Mxfp4.values(bytes);
        for (expert, want) in values.chunks_exact(shape[1] * shape[2]).enumerate() {
            let (format, got) = &taken[&name.replace(".weight", &format!(".{expert}.weight"))];
            assert_eq!((*format, got.as_slice()), (WeightFormat::Q8, want), "{name} {expert}");
            experts += 1;
        }
    }
    assert_eq!(experts, 4 * 3 * 16);
    for kind in [BackendKind::Native, BackendKind::Candle] {
        let expanded = logits(&folder.path().join("plain"), Some(WeightFormat::F32), kind);
        let size = expanded.iter().fold(0f32, |size, logit| size.max(logit.abs()));
        for weights in [None, Some(WeightFormat::F32)] {
            let worst = worst(&logits(&path, weights, kind), &expanded);
            assert!(size > 0.1 && worst <= 1e-5 * size, "{kind:?} in {weights:?}: {worst} of {size}");
        }
        let published = logits(&folder.path().join("mxfp4"), None, kind);
        assert_eq!(worst(&logits(&path, None, kind), &published), 0.0, "{kind:?}");
    }
}

/// The layers' attention and the model's scaling of a file with more metadata.
fn read(add: impl FnOnce(&mut Gguf)) -> moesaic_model::Result<Vec<Gqa>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let (tensors, config) = checkpoint("gpt_oss");
    let mut file = to_gguf(&tensors, &config);
    add(&mut file);
    file.write(&path);
    let spec = spec::read(&path, &*source::open(&path)?)?;
    let attention = |layer: &spec::LayerSpec| match &layer.attention {
        Attention::Gqa(gqa) => gqa.clone(),
        Attention::Mla(_) => panic!("GPT-OSS has no latents"),
    };
    Ok(spec.layers.iter().map(attention).collect())
}

#[test]
fn windows_and_scaling_follow_the_metadata() {
    let windows = |period: Option<u32>| -> Vec<bool> {
        let add = |file: &mut Gguf| {
            if let Some(period) = period {
                file.number("gpt-oss.attention.sliding_window_pattern", period);
            }
        };
        read(add).unwrap().iter().map(|gqa| gqa.window == Some(64)).collect()
    };
    assert_eq!(windows(None), [true, false, true, false]);
    assert_eq!(windows(Some(0)), [true; 4]);
    assert_eq!(windows(Some(1)), [false; 4]);
    assert_eq!(windows(Some(3)), [true, true, false, true]);
    let layers = read(|file| {
        file.float("gpt-oss.rope.scaling.yarn_beta_fast", 16.0);
        file.float("gpt-oss.rope.scaling.yarn_beta_slow", 2.0);
        file.float("gpt-oss.rope.scaling.yarn_attn_factor", 0.5);
    });
    let Position::Rope(rope) = layers.unwrap()[3].position.clone() else { panic!("no rotation") };
    let RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context, truncate, attention_factor } = rope.scaling
    else {
        panic!("{:?}", rope.scaling)
    };
    assert_eq!((factor, beta_fast, beta_slow, original_context, truncate), (8.0, 16.0, 2.0, 256.0, false));
    assert!((attention_factor - 0.5 * (0.1 * 8f64.ln() + 1.0)).abs() < 1e-12, "{attention_factor}");
}

#[test]
fn a_missing_part_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let (tensors, config) = checkpoint("gpt_oss");
    let whole = to_gguf(&tensors, &config);
    for name in whole.tensors.keys().filter(|name| name.starts_with("blk.2.")) {
        let mut file = whole.clone();
        file.tensors.remove(name);
        file.write(&path);
        let error = load(&path, BackendKind::Native, &options(None)).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("is missing"), "{name}: {error}");
    }
    let names: Vec<_> = whole.tensors.keys().filter(|name| name.starts_with("blk.2.")).collect();
    assert_eq!(names.len(), 2 + 8 + 1 + 2 + 6, "{names:?}");
    let error = read(|file| file.number("gpt-oss.attention.sliding_window_pattern", u32::MAX)).unwrap_err().to_string();
    assert!(error.contains("gpt-oss.attention.sliding_window_pattern"), "{error}");
}
