//! GGUF files of Granite-MoE, Bloom and Llama with linear scaling, from their reference checkpoints.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
mod support;

use moesaic_model::spec::{Attention, Ffn, ModelSpec, Position, RopeScaling};
use support::converted::{Conversion, check, check_missing};

const NORMS: [(&str, &str); 2] =
    [("input_layernorm.weight", "attn_norm.weight"), ("post_attention_layernorm.weight", "ffn_norm.weight")];

const LLAMA_SIZES: [(&str, &str); 6] = [
    ("block_count", "num_hidden_layers"),
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
];

/// What Llama's and Granite's files share.
fn like_llama(golden: &str, architecture: &'static str) -> Conversion {
    let mut file = Conversion::of(golden, architecture);
    file.sizes(&LLAMA_SIZES);
    let epsilon = file.config["rms_norm_eps"].clone();
    file.float("attention.layer_norm_rms_epsilon", &epsilon);
    let theta = file.config["rope_parameters"]["rope_theta"].clone();
    file.float("rope.freq_base", &theta);
    let head_dim = file.size("hidden_size") / file.size("num_attention_heads");
    file.number("rope.dimension_count", head_dim);
    file.rename("model.embed_tokens.weight", "token_embd.weight");
    file.rename("model.norm.weight", "output_norm.weight");
    for layer in 0..file.size("num_hidden_layers") {
        file.permute_qk(layer);
        file.rename_in("model.layers", layer, &NORMS);
        let attention =
            [("self_attn.v_proj.weight", "attn_v.weight"), ("self_attn.o_proj.weight", "attn_output.weight")];
        file.rename_in("model.layers", layer, &attention);
    }
    file
}

fn granite() -> Conversion {
    let mut file = like_llama("granite_moe", "granitemoe");
    file.sizes(&[("expert_count", "num_local_experts"), ("expert_used_count", "num_experts_per_tok")]);
    for (key, from) in [
        ("attention.scale", "attention_multiplier"),
        ("embedding_scale", "embedding_multiplier"),
        ("residual_scale", "residual_multiplier"),
        ("logit_scale", "logits_scaling"),
    ] {
        let value = file.config[from].clone();
        file.float(key, &value);
    }
    for layer in 0..file.size("num_hidden_layers") {
        let experts = [
            ("block_sparse_moe.router.layer.weight", "ffn_gate_inp.weight"),
            ("block_sparse_moe.output_linear.weight", "ffn_down_exps.weight"),
        ];
        file.rename_in("model.layers", layer, &experts);
        let (shape, both) = file.take(&format!("model.layers.{layer}.block_sparse_moe.input_linear.weight"));
        let half = shape[1] / 2 * shape[2];
        for (part, first) in [("gate", 0), ("up", 1)] {
            let values: Vec<f32> = both.chunks_exact(half).skip(first).step_by(2).flatten().copied().collect();
            let name = format!("blk.{layer}.ffn_{part}_exps.weight");
            file.file.plain(&name, &[shape[0], shape[1] / 2, shape[2]], &values);
        }
    }
    file
}

#[test]
fn granite_equals_the_reference() {
    let file = granite();
    check(&file, "granite_moe");
    check_missing(&file, 2, 10);
}

#[test]
fn granite_has_a_shared_expert_and_scales_where_its_file_says_so() {
    let file = granite();
    let shared = |spec: ModelSpec| spec.moe(0).unwrap().shared.map(|shared| (shared.form.intermediate, shared.gated));
    assert_eq!(shared(file.read(|_| {}).unwrap()), None);
    let key = "granitemoe.expert_shared_feed_forward_length";
    assert_eq!(shared(file.read(|file| file.number(key, 0)).unwrap()), None);
    assert_eq!(shared(file.read(|file| file.number(key, 48)).unwrap()), Some((48, false)));
    let absent = ["embedding_scale", "residual_scale", "logit_scale", "attention.scale"];
    let zero = |file: &mut support::gguf::Gguf| {
        absent.iter().for_each(|key| file.float(&format!("granitemoe.{key}"), 0.0));
    };
    let plain = file.read(zero).unwrap();
    assert_eq!((plain.embedding_scale, plain.logits_scale, plain.layers[0].residual_scale), (1.0, 1.0, 1.0));
    assert_eq!(plain.layers[0].attention.scale(), 0.25);
    let error = file.refusal(|file| file.flag("granitemoe.rope.scaling.finetuned", false));
    assert!(error.contains("granitemoe.rope.scaling.finetuned") && error.contains("no rotation"), "{error}");
    file.read(|file| file.flag("granitemoe.rope.scaling.finetuned", true)).unwrap();
}

fn bloom() -> Conversion {
    let mut file = Conversion::of("bloom_alibi", "bloom");
    let (hidden, heads) = (file.size("hidden_size"), file.size("n_head"));
    file.sizes(&[("embedding_length", "hidden_size"), ("block_count", "n_layer")]);
    file.sizes(&[("attention.head_count", "n_head"), ("attention.head_count_kv", "n_head")]);
    file.number("context_length", 2048);
    file.number("feed_forward_length", 4 * hidden);
    let epsilon = file.config["layer_norm_epsilon"].clone();
    file.float("attention.layer_norm_epsilon", &epsilon);
    file.rename("transformer.word_embeddings.weight", "token_embd.weight");
    for part in ["weight", "bias"] {
        file.rename(&format!("transformer.word_embeddings_layernorm.{part}"), &format!("token_embd_norm.{part}"));
        file.rename(&format!("transformer.ln_f.{part}"), &format!("output_norm.{part}"));
        for layer in 0..file.size("n_layer") {
            for (from, to) in [
                ("input_layernorm", "attn_norm"),
                ("post_attention_layernorm", "ffn_norm"),
                ("self_attention.dense", "attn_output"),
                ("mlp.dense_h_to_4h", "ffn_up"),
                ("mlp.dense_4h_to_h", "ffn_down"),
            ] {
                file.rename(&format!("transformer.h.{layer}.{from}.{part}"), &format!("blk.{layer}.{to}.{part}"));
            }
            // `[heads, 3, width]` as `[3, heads, width]`
            let width = hidden / heads;
            let of_row = |row: usize| (row % hidden / width * 3 + row / hidden) * width + row % width;
            let order: Vec<usize> = (0..3 * hidden).map(of_row).collect();
            let from = format!("transformer.h.{layer}.self_attention.query_key_value.{part}");
            file.reorder(&from, &format!("blk.{layer}.attn_qkv.{part}"), &order);
        }
    }
    file
}

#[test]
fn bloom_equals_the_reference() {
    let file = bloom();
    check(&file, "bloom_alibi");
    check_missing(&file, 2, 12);
}

#[test]
fn heads_that_bloom_cannot_have_are_refused() {
    let file = bloom();
    for (key, value) in [("bloom.attention.head_count_kv", 2), ("bloom.attention.head_count", 5)] {
        let error = file.refusal(|file| file.number(key, value));
        assert!(error.contains("bloom.attention.head_count"), "{error}");
    }
}

fn llama_linear() -> Conversion {
    let mut file = like_llama("llama_rope_linear", "llama");
    if file.left.contains_key("lm_head.weight") {
        file.rename("lm_head.weight", "output.weight");
    }
    for layer in 0..file.size("num_hidden_layers") {
        let network = [
            ("mlp.gate_proj.weight", "ffn_gate.weight"),
            ("mlp.up_proj.weight", "ffn_up.weight"),
            ("mlp.down_proj.weight", "ffn_down.weight"),
        ];
        file.rename_in("model.layers", layer, &network);
    }
    file
}

#[test]
fn linear_scaling_by_its_older_and_its_newer_keys_equals_the_reference() {
    let mut older = llama_linear();
    let factor = older.config["rope_parameters"]["factor"].clone();
    older.float("rope.scale_linear", &factor);
    check(&older, "llama_rope_linear");
    let mut newer = llama_linear();
    newer.text("rope.scaling.type", "linear");
    newer.float("rope.scaling.factor", &factor);
    check(&newer, "llama_rope_linear");
}

#[test]
fn the_newer_key_of_linear_scaling_wins_and_none_is_none() {
    let file = llama_linear();
    let scaling = |keys: &[(&str, f32)], kind: Option<&str>| {
        let spec = file.read(|file| {
            keys.iter().for_each(|(key, value)| file.float(key, *value));
            kind.iter().for_each(|kind| file.text("llama.rope.scaling.type", kind));
        });
        match &spec.unwrap().layers[0].attention {
            Attention::Gqa(gqa) => match &gqa.position {
                Position::Rope(rope) => rope.scaling,
                Position::Alibi => panic!("Llama turns"),
            },
            Attention::Mla(_) => panic!("Llama has no latents"),
        }
    };
    let (older, newer) = (("llama.rope.scale_linear", 4.0), ("llama.rope.scaling.factor", 2.0));
    assert_eq!(scaling(&[], None), RopeScaling::None);
    assert_eq!(scaling(&[older], None), RopeScaling::Linear { factor: 4.0 });
    assert_eq!(scaling(&[older, newer], None), RopeScaling::Linear { factor: 2.0 });
    assert_eq!(scaling(&[newer], None), RopeScaling::Linear { factor: 2.0 });
    assert_eq!(scaling(&[older, newer], Some("none")), RopeScaling::None);
    assert_eq!(scaling(&[("llama.rope.scaling.factor", 0.0)], Some("linear")), RopeScaling::None);
    let error = file.refusal(|file| file.float("llama.rope.scale_linear", -1.0));
    assert!(error.contains("llama.rope.scale_linear") && error.contains("above 0"), "{error}");
    assert!(matches!(file.read(|_| {}).unwrap().layers[0].ffn, Ffn::Dense(_)));
}
