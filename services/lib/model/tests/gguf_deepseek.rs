//! GGUF files of DeepSeek-V2 and V3, from their reference checkpoints.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
mod support;

use moesaic_model::spec::{Attention, GatePolicy, Groups, ModelSpec, RopeScaling};
use moesaic_model::{BackendKind, LogitsWanted, SequenceChunk, load};
use std::path::Path;
use support::converted::{Conversion, check, check_missing, options};
use support::gguf::{Blocks, Gguf};
use support::normal;

/// Where the latent's up projection is.
#[derive(Clone, Copy, PartialEq)]
enum Up {
    /// `attn_kv_b`, as Hugging Face has it.
    Whole,
    /// `attn_k_b` and `attn_v_b`.
    ByHead,
}

fn metadata(file: &mut Conversion, up: Up) {
    file.sizes(&[
        ("block_count", "num_hidden_layers"),
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.kv_lora_rank", "kv_lora_rank"),
        ("rope.dimension_count", "qk_rope_head_dim"),
        ("leading_dense_block_count", "first_k_dense_replace"),
        ("expert_count", "n_routed_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_shared_count", "n_shared_experts"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_group_count", "n_group"),
        ("expert_group_used_count", "topk_group"),
    ]);
    if file.config["q_lora_rank"].is_u64() {
        file.sizes(&[("attention.q_lora_rank", "q_lora_rank")]);
    }
    let (rank, rope) = (file.size("kv_lora_rank"), file.size("qk_rope_head_dim"));
    let (key, value) = (file.size("qk_nope_head_dim") + rope, file.size("v_head_dim"));
    match up {
        Up::Whole => {
            file.sizes(&[("attention.head_count_kv", "num_attention_heads")]);
            file.number("attention.key_length", key);
            file.number("attention.value_length", value);
        }
        Up::ByHead => {
            file.number("attention.head_count_kv", 1);
            file.number("attention.key_length", rank + rope);
            file.number("attention.value_length", rank);
            file.number("attention.key_length_mla", key);
            file.number("attention.value_length_mla", value);
        }
    }
    for (key, from) in
        [("attention.layer_norm_rms_epsilon", "rms_norm_eps"), ("expert_weights_scale", "routed_scaling_factor")]
    {
        let value = file.config[from].clone();
        file.float(key, &value);
    }
    let rope = file.config["rope_parameters"].clone();
    file.float("rope.freq_base", &rope["rope_theta"]);
    if rope["rope_type"] == "yarn" {
        file.text("rope.scaling.type", "yarn");
        file.float("rope.scaling.factor", &rope["factor"]);
        let original = rope["original_max_position_embeddings"].as_u64().unwrap();
        file.number("rope.scaling.original_context_length", original as usize);
        file.float("rope.scaling.yarn_beta_fast", &rope["beta_fast"]);
        file.float("rope.scaling.yarn_beta_slow", &rope["beta_slow"]);
        let tenth = 0.1 * rope["mscale_all_dim"].as_f64().unwrap();
        file.float("rope.scaling.yarn_log_multiplier", &tenth.into());
    }
}

/// The experts' matrices in one.
fn stack(file: &mut Conversion, layer: usize) {
    for part in ["gate", "up", "down"] {
        let mut all = Vec::new();
        let mut shape = vec![file.size("n_routed_experts")];
        for expert in 0..shape[0] {
            let (one, values) = file.take(&format!("model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"));
            shape.truncate(1);
            shape.extend(one);
            all.extend(values);
        }
        file.file.plain(&format!("blk.{layer}.ffn_{part}_exps.weight"), &shape, &all);
    }
}

/// `[heads, nope + v, rank]` as the keys' `[heads, rank, nope]` and the values' `[heads, v, rank]`.
fn split(file: &mut Conversion, layer: usize, name: &str) {
    let (heads, rank) = (file.size("num_attention_heads"), file.size("kv_lora_rank"));
    let (nope, v) = (file.size("qk_nope_head_dim"), file.size("v_head_dim"));
    let (_, both) = file.take(name);
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for head in both.chunks_exact((nope + v) * rank) {
        keys.extend((0..rank * nope).map(|i| head[i % nope * rank + i / nope]));
        values.extend(&head[nope * rank..]);
    }
    file.file.plain(&format!("blk.{layer}.attn_k_b.weight"), &[heads, rank, nope], &keys);
    file.file.plain(&format!("blk.{layer}.attn_v_b.weight"), &[heads, v, rank], &values);
}

fn deepseek(golden: &str, up: Up) -> Conversion {
    let mut file = Conversion::of(golden, "deepseek2");
    metadata(&mut file, up);
    for (from, to) in [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
    ] {
        file.rename(from, to);
    }
    for layer in 0..file.size("num_hidden_layers") {
        for (from, to) in [
            ("input_layernorm.weight", "attn_norm.weight"),
            ("post_attention_layernorm.weight", "ffn_norm.weight"),
            ("self_attn.q_proj.weight", "attn_q.weight"),
            ("self_attn.q_a_proj.weight", "attn_q_a.weight"),
            ("self_attn.q_a_layernorm.weight", "attn_q_a_norm.weight"),
            ("self_attn.q_b_proj.weight", "attn_q_b.weight"),
            ("self_attn.kv_a_proj_with_mqa.weight", "attn_kv_a_mqa.weight"),
            ("self_attn.kv_a_layernorm.weight", "attn_kv_a_norm.weight"),
            ("self_attn.o_proj.weight", "attn_output.weight"),
            ("mlp.gate.weight", "ffn_gate_inp.weight"),
            ("mlp.gate.e_score_correction_bias", "exp_probs_b.bias"),
            ("mlp.gate_proj.weight", "ffn_gate.weight"),
            ("mlp.up_proj.weight", "ffn_up.weight"),
            ("mlp.down_proj.weight", "ffn_down.weight"),
            ("mlp.shared_experts.gate_proj.weight", "ffn_gate_shexp.weight"),
            ("mlp.shared_experts.up_proj.weight", "ffn_up_shexp.weight"),
            ("mlp.shared_experts.down_proj.weight", "ffn_down_shexp.weight"),
        ] {
            if file.left.contains_key(&format!("model.layers.{layer}.{from}")) {
                file.rename_in("model.layers", layer, &[(from, to)]);
            }
        }
        if layer >= file.size("first_k_dense_replace") {
            stack(&mut file, layer);
        }
        let kv_up = format!("model.layers.{layer}.self_attn.kv_b_proj.weight");
        match up {
            Up::Whole => file.rename(&kv_up, &format!("blk.{layer}.attn_kv_b.weight")),
            Up::ByHead => split(&mut file, layer, &kv_up),
        }
    }
    file
}

/// V3's file also says how its gate weighs.
fn v3(up: Up) -> Conversion {
    let mut file = deepseek("deepseek_v3", up);
    file.number("expert_gating_func", 2);
    file.file.flag("deepseek2.expert_weights_norm", true);
    file
}

#[test]
fn v2_equals_the_reference_in_both_layouts() {
    for (up, tensors) in [(Up::Whole, 14), (Up::ByHead, 15)] {
        let file = deepseek("deepseek_v2", up);
        check(&file, "deepseek_v2");
        check_missing(&file, 2, tensors);
    }
}

#[test]
fn v3_equals_the_reference_in_both_layouts() {
    for up in [Up::Whole, Up::ByHead] {
        check(&v3(up), "deepseek_v3");
    }
}

#[test]
fn a_file_with_the_whole_projection_beside_its_halves_is_read_by_the_whole_one() {
    let mut file = v3(Up::Whole);
    for layer in 0..3 {
        // the halves of files that were made by hand before the layout was settled
        file.file.plain(&format!("blk.{layer}.attn_k_b.weight"), &[32 * 4, 16], &[0.0; 32 * 4 * 16]);
    }
    check(&file, "deepseek_v3");
}

#[test]
fn scores_and_rotation_follow_yarns_keys() {
    let mla = |spec: ModelSpec| match spec.layers[1].attention.clone() {
        Attention::Mla(mla) => {
            let RopeScaling::Yarn { attention_factor, .. } = mla.rope.scaling else { panic!("{:?}", mla.rope.scaling) };
            (mla.scale, attention_factor)
        }
        Attention::Gqa(_) => panic!("DeepSeek has latents"),
    };
    let file = v3(Up::ByHead);
    let temperature = 0.1 * 4f64.ln() + 1.0;
    let near = |got: f64, want: f64| assert!((got - want).abs() < 1e-6, "{got} is not {want}");
    let plain = 1.0 / 32f64.sqrt();
    let key = "deepseek2.rope.scaling.yarn_log_multiplier";
    for (tenth, scale, factor) in [
        (0.1, plain * temperature.powi(2), 1.0),
        (0.0707, plain * (0.0707 * 4f64.ln() + 1.0).powi(2), 1.0),
        (0.0, plain, temperature),
    ] {
        let (got_scale, got_factor) = mla(file.read(|file| file.float(key, tenth)).unwrap());
        near(got_scale.into(), scale);
        near(got_factor, factor);
    }
    let error = file.refusal(|file| file.float(key, -0.1));
    assert!(error.contains(key) && error.contains("above 0"), "{error}");
}

#[test]
fn gates_follow_the_metadata() {
    let file = v3(Up::Whole);
    let gate = |change: fn(&mut Gguf)| file.read(change).unwrap().moe(1).unwrap().clone();
    let groups = Some(Groups { count: 4, keep: 2 });
    let whole = gate(|_| {});
    assert_eq!(whole.gate, GatePolicy::Sigmoid { top_k: 4, normalize: true, groups, scale: 2.5 });
    assert!(whole.choice_bias);
    let ungrouped = gate(|file| {
        file.number("deepseek2.expert_group_count", 0);
        file.number("deepseek2.expert_group_used_count", 0);
        file.float("deepseek2.expert_weights_scale", 0.0);
    });
    assert_eq!(ungrouped.gate, GatePolicy::Sigmoid { top_k: 4, normalize: true, groups: None, scale: 1.0 });
    // no key: softmax
    let v2 = deepseek("deepseek_v2", Up::Whole).read(|_| {}).unwrap();
    let softmax = GatePolicy::SoftmaxTopK { top_k: 3, normalize: false, groups: None, scale: 1.0 };
    assert_eq!(v2.moe(1).unwrap().gate, softmax);
    assert_eq!(v2.moe_layers().collect::<Vec<_>>(), [1, 2]);
    assert_eq!(v2.moe(1).unwrap().shared.unwrap().form.intermediate, 32);
    let dense = file.read(|file| file.number("deepseek2.leading_dense_block_count", 3)).unwrap();
    assert_eq!(dense.moe_layers().count(), 0);
}

#[test]
fn what_is_not_supported_is_refused_by_its_key() {
    let file = v3(Up::Whole);
    for (key, value, reason) in [
        ("expert_gating_func", 3, "softmax"),
        // with the bias of the choice
        ("expert_gating_func", 1, "sigmoid only"),
        ("expert_group_count", 5, "does not divide"),
        ("expert_group_used_count", 5, "cannot give"),
        ("rope.dimension_count", 15, "odd"),
        ("rope.dimension_count", 32, "not below"),
    ] {
        let key = format!("deepseek2.{key}");
        let error = file.refusal(|file| file.number(&key, value));
        assert!(error.contains(&key) && error.contains(reason), "{key} {value}: {error}");
    }
    let key = "deepseek2.attention.temperature_scale";
    let error = file.refusal(|file| file.float(key, 0.1));
    assert!(error.contains(key), "{error}");
}

/// A dense layer whose heads' matrices are in blocks, or in f32 with the blocks' values.
fn blocked(blocks: Blocks, expanded: bool) -> Gguf {
    const HIDDEN: usize = 64;
    let mut file = Gguf::default();
    file.text("general.architecture", "deepseek2");
    for (key, value) in [
        ("block_count", 1),
        ("embedding_length", HIDDEN as u32),
        ("feed_forward_length", 96),
        ("attention.head_count", 3),
        ("attention.kv_lora_rank", 64),
        ("attention.key_length", 64 + 16),
        ("attention.value_length", 64),
        ("attention.key_length_mla", 32 + 16),
        ("attention.value_length_mla", 40),
        ("rope.dimension_count", 16),
    ] {
        file.number(&format!("deepseek2.{key}"), value);
    }
    file.plain("token_embd.weight", &[70, HIDDEN], &normal(1, 70 * HIDDEN));
    file.plain("output_norm.weight", &[HIDDEN], &[1.0; HIDDEN]);
    for (name, len) in [("attn_norm", HIDDEN), ("ffn_norm", HIDDEN), ("attn_kv_a_norm", 64)] {
        file.plain(&format!("blk.0.{name}.weight"), &[len], &[1.0; HIDDEN]);
    }
    for (seed, (name, rows, cols)) in [
        ("attn_q", 3 * 48, HIDDEN),
        ("attn_kv_a_mqa", 64 + 16, HIDDEN),
        ("attn_output", HIDDEN, 3 * 40),
        ("ffn_gate", 96, HIDDEN),
        ("ffn_up", 96, HIDDEN),
        ("ffn_down", HIDDEN, 96),
    ]
    .into_iter()
    .enumerate()
    {
        let values: Vec<f32> = normal(seed as u64 + 2, rows * cols).iter().map(|value| value / 8.0).collect();
        file.plain(&format!("blk.0.{name}.weight"), &[rows, cols], &values);
    }
    for (name, shape) in [("attn_k_b", [3, 64, 32]), ("attn_v_b", [3, 40, 64])] {
        let name = format!("blk.0.{name}.weight");
        file.random(&name, &shape, blocks);
        if expanded {
            let values = blocks.values(&file.tensors[&name].2);
            file.plain(&name, &shape, &values);
        }
    }
    file
}

fn logits(path: &Path, kind: BackendKind) -> Vec<f32> {
    let mut model = load(path, kind, &options(None)).unwrap();
    model.allocate_kv(1).unwrap();
    let tokens: Vec<u32> = (0..40).map(|i| i * 37 % 70).collect();
    let chunk = SequenceChunk { tokens: &tokens, start: 0, blocks: &[0], logits: LogitsWanted::All };
    let mut logits = Vec::new();
    model.forward(&[chunk], &mut logits).unwrap();
    logits
}

#[test]
fn heads_in_blocks_answer_as_their_values_do() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for blocks in [Blocks::Q4_0, Blocks::Q8_0] {
        for kind in [BackendKind::Native, BackendKind::Candle] {
            blocked(blocks, true).write(&path);
            let expected = logits(&path, kind);
            blocked(blocks, false).write(&path);
            let got = logits(&path, kind);
            let size = expected.iter().fold(0f32, |size, logit| size.max(logit.abs()));
            let differences = got.iter().zip(&expected).map(|(got, want)| (got - want).abs());
            assert!(size > 0.1 && got.len() == expected.len() && got.iter().all(|logit| logit.is_finite()));
            let worst = differences.fold(0.0, f32::max);
            assert!(worst <= 1e-5 * size, "{blocks:?} on {kind:?}: {worst} of {size}");
        }
    }
}
