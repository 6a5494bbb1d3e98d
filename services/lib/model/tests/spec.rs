//! Reading configurations: both forms, every option's bounds, and errors that name the file and the key.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
use moesaic_model::source;
use moesaic_model::spec::{
    self, Attention, Ffn, GatePolicy, ModelSpec, Position, RopeScaling, alibi_slopes, from_config,
};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn golden(name: &str) -> Value {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../tests/goldens");
    let root = std::env::var_os("MOESAIC_GOLDENS").map_or(path, PathBuf::from);
    serde_json::from_slice(&std::fs::read(root.join(name).join("config.json")).unwrap()).unwrap()
}

fn with(name: &str, changes: Value) -> Value {
    let mut config = golden(name);
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn read(config: &Value) -> moesaic_model::Result<ModelSpec> {
    from_config(Path::new("model/config.json"), config)
}

fn scaling(spec: &ModelSpec) -> RopeScaling {
    match &spec.layers[0].attention {
        Attention::Gqa(gqa) => match &gqa.position {
            Position::Rope(rope) => rope.scaling,
            Position::Alibi => panic!("no rope"),
        },
        Attention::Mla(mla) => mla.rope.scaling,
    }
}

/// LongRoPE of a model that was trained with 256 tokens and goes to 2048.
fn longrope(short: Value, long: Value) -> Value {
    let factors = json!({"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long,
        "original_max_position_embeddings": 256});
    json!({"rope_parameters": factors})
}

#[test]
fn wrong_values_name_the_file_and_the_key() {
    for (family, changes, key) in [
        ("qwen3_moe", json!({"model_type": "gpt2"}), "model_type"),
        ("qwen3_moe", json!({"model_type": null}), "model_type"),
        ("qwen3_moe", json!({"hidden_size": 0}), "hidden_size"),
        ("qwen3_moe", json!({"hidden_size": -64}), "hidden_size"),
        ("qwen3_moe", json!({"hidden_size": 18446744073709551615u64}), "hidden_size"),
        ("qwen3_moe", json!({"vocab_size": 1e30}), "vocab_size"),
        ("qwen3_moe", json!({"num_hidden_layers": 60000000}), "num_hidden_layers"),
        ("qwen3_moe", json!({"num_local_experts": 60000000}), "num_local_experts"),
        ("qwen3_moe", json!({"num_experts_per_tok": 129}), "num_experts_per_tok"),
        ("qwen3_moe", json!({"num_key_value_heads": 3}), "num_key_value_heads"),
        ("qwen3_moe", json!({"head_dim": 15}), "head_dim"),
        ("qwen3_moe", json!({"rms_norm_eps": "small"}), "rms_norm_eps"),
        ("qwen3_moe", json!({"decoder_sparse_step": 0}), "decoder_sparse_step"),
        ("qwen3_moe", json!({"hidden_act": "tanhish"}), "hidden_act"),
        ("qwen3_moe", json!({"moe_gate": "magic"}), "moe_gate"),
        ("qwen3_moe", json!({"moe_gate": "dynamic_top_p", "moe_top_p": 1.5}), "moe_top_p"),
        ("qwen3_moe", json!({"quantization_config": {"quant_method": "gptq"}}), "quantization_config"),
        ("llama_dense", json!({"rope_parameters": {"rope_type": "dynamic"}}), "factor"),
        ("llama_dense", json!({"rope_parameters": {"rope_type": "longrope"}}), "short_factor"),
        ("llama_dense", longrope(json!(vec![1.0; 8]), json!(null)), "long_factor"),
        ("llama_dense", longrope(json!(vec![1.0; 8]), json!(vec![1.0; 7])), "long_factor"),
        ("llama_dense", longrope(json!(vec![1.0; 8]), json!([1.0, 2.0, 3.0, 0.0, 1.0, 1.0, 1.0, 1.0])), "long_factor"),
        ("llama_dense", longrope(json!(vec![1.0; 8]), json!("long")), "long_factor"),
        ("llama_dense", json!({"rope_parameters": {"rope_type": "spiral"}}), "rope_type"),
        ("llama_dense", json!({"rope_parameters": {"rope_type": "linear"}}), "factor"),
        ("llama_dense", json!({"rope_parameters": {"rope_type": "linear", "factor": 0.0}}), "factor"),
        ("llama_dense", json!({"rope_parameters": {"rope_theta": 0.5}}), "rope_theta"),
        ("llama_dense", json!({"rope_parameters": 3}), "rope_parameters"),
        ("gpt_oss", json!({"layer_types": ["sliding_attention"]}), "layer_types"),
        ("deepseek_v3", json!({"n_group": 5}), "n_group"),
        ("deepseek_v3", json!({"topk_group": 9}), "topk_group"),
        ("deepseek_v2", json!({"topk_method": "noaux"}), "topk_method"),
        ("bloom_alibi", json!({"n_head": 7}), "n_head"),
    ] {
        let error = read(&with(family, changes.clone())).map(|_| ()).expect_err(&changes.to_string()).to_string();
        assert!(error.contains("config.json") && error.contains(&format!("'{key}'")), "{changes}: {error}");
    }
    assert!(read(&json!([1])).unwrap_err().to_string().contains("config.json"));
}

#[test]
fn the_older_form_says_the_same_as_the_new_one() {
    for family in ["deepseek_v3", "gpt_oss", "llama_rope_yarn", "llama_rope_linear", "glm4_moe"] {
        let new = golden(family);
        for key in ["type", "rope_type"] {
            let mut old = new.clone();
            let mut parameters = old.as_object_mut().unwrap().remove("rope_parameters").unwrap();
            let parameters = parameters.as_object_mut().unwrap();
            old["rope_theta"] = parameters.remove("rope_theta").unwrap();
            if let Some(partial) = parameters.remove("partial_rotary_factor") {
                old["partial_rotary_factor"] = partial;
            }
            let kind = parameters.remove("rope_type").unwrap();
            old["rope_scaling"] = if kind == "default" {
                Value::Null
            } else {
                parameters.insert(key.into(), kind);
                Value::Object(parameters.clone())
            };
            assert_eq!(read(&old).unwrap(), read(&new).unwrap(), "{family} with {key}");
        }
    }
}

#[test]
fn options_are_read() {
    let experts = |config: &Value| -> Vec<bool> {
        read(config).unwrap().layers.iter().map(|layer| matches!(layer.ffn, Ffn::Moe(_))).collect()
    };
    let four = json!({"num_hidden_layers": 4, "mlp_only_layers": [3], "decoder_sparse_step": 2});
    assert_eq!(experts(&with("qwen3_moe", four)), [false, true, false, false]);
    assert_eq!(experts(&with("deepseek_v3", json!({"first_k_dense_replace": 2}))), [false, false, true]);
    let windows = |config: &Value| -> Vec<Option<usize>> {
        let window = |layer: &moesaic_model::spec::LayerSpec| match &layer.attention {
            Attention::Gqa(gqa) => gqa.window,
            Attention::Mla(_) => None,
        };
        read(config).unwrap().layers.iter().map(window).collect()
    };
    assert_eq!(windows(&golden("gpt_oss")), [Some(64), None, Some(64), None]);
    assert_eq!(windows(&with("gpt_oss", json!({"layer_types": null}))), [Some(64), None, Some(64), None]);
    assert_eq!(windows(&with("mixtral", json!({"sliding_window": 48}))), [Some(48); 3]);
    assert_eq!(windows(&with("qwen3_moe", json!({"sliding_window": 48}))), [None; 2]);
    let top_p = json!({"moe_gate": "dynamic_top_p", "moe_top_p": 0.8, "moe_max_active": 30});
    let spec = read(&with("qwen3_moe", top_p)).unwrap();
    assert_eq!(spec.moe(0).unwrap().gate, GatePolicy::DynamicTopP { p: 0.8, max_active: 30 });
    let attention = json!({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "attention_factor": 2.5});
    let spec = read(&with("llama_dense", json!({"rope_parameters": attention}))).unwrap();
    assert!(matches!(scaling(&spec), RopeScaling::Yarn { attention_factor: 2.5, original_context: 2048.0, .. }));
}

fn rope(config: &Value) -> moesaic_model::spec::Rope {
    match &read(config).unwrap().layers[0].attention {
        Attention::Gqa(gqa) => match &gqa.position {
            Position::Rope(rope) => rope.clone(),
            Position::Alibi => panic!("no rope"),
        },
        Attention::Mla(mla) => mla.rope.clone(),
    }
}

#[test]
fn longrope_divides_each_frequency_by_the_factor_for_the_longest_context() {
    let short: Vec<f64> = (0..8).map(|pair| 1.0 + f64::from(pair) / 100.0).collect();
    let long: Vec<f64> = (0..8).map(|pair| 1.0 + f64::from(pair) * 1.5).collect();
    let changes = longrope(json!(short), json!(long));
    // the formula of transformers' `_compute_longrope_parameters`
    let is = |rope: &moesaic_model::spec::Rope, factors: &[f64], attention_factor: f64| {
        for (pair, (got, factor)) in rope.frequencies().iter().zip(factors).enumerate() {
            let want = 1.0 / (factor * 1e4f64.powf(2.0 * pair as f64 / 16.0));
            assert!((f64::from(*got) / want - 1.0).abs() < 1e-6, "pair {pair}: {got}, not {want}");
        }
        assert!((f64::from(rope.attention_factor()) - attention_factor).abs() < 1e-6, "{}", rope.attention_factor());
    };
    let config = with("llama_dense", changes.clone());
    let usual = (1.0 + 8f64.ln() / 256f64.ln()).sqrt();
    is(&rope(&config), &long, usual);
    // the older form
    let mut older = config.clone();
    let mut parameters = older.as_object_mut().unwrap().remove("rope_parameters").unwrap();
    for (key, value) in [("original_max_position_embeddings", json!(256)), ("rope_theta", json!(1e4))] {
        parameters.as_object_mut().unwrap().remove(key).unwrap();
        older[key] = value;
    }
    parameters.as_object_mut().unwrap().remove("rope_type").unwrap();
    for kind in ["su", "longrope"] {
        parameters["type"] = json!(kind);
        older["rope_scaling"] = parameters.clone();
        assert_eq!(read(&older).unwrap(), read(&config).unwrap(), "{kind}");
    }
    // a model that is cut to the length of its training
    let mut cut = config.clone();
    cut["max_position_embeddings"] = json!(256);
    is(&rope(&cut), &short, 1.0);
    cut["rope_parameters"]["factor"] = json!(8.0);
    is(&rope(&cut), &short, usual);
    cut["rope_parameters"]["attention_factor"] = json!(1.25);
    is(&rope(&cut), &short, 1.25);
}

#[test]
fn dynamic_scaling_leaves_contexts_as_long_as_the_trainings_alone() {
    let parameters = json!({"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4});
    let config = with("llama_dense", json!({"rope_parameters": parameters}));
    let plain = rope(&golden("llama_dense"));
    assert_eq!(rope(&config).frequencies(), plain.frequencies());
    assert_eq!((rope(&config).attention_factor(), read(&config).unwrap().max_context), (1.0, 2048));
    // DeepSeek scales its scores by the factor of any scaling
    let scale = |parameters: Value| match &read(&with("deepseek_v3", json!({"rope_parameters": parameters}))) {
        Ok(spec) => spec.layers[0].attention.scale(),
        Err(error) => panic!("{error}"),
    };
    let unscaled = scale(json!({"rope_type": "default", "mscale_all_dim": 1.0}));
    let scaled = scale(json!({"rope_type": "dynamic", "factor": 4.0, "mscale_all_dim": 1.0}));
    assert!((scaled / unscaled - (0.1 * 4f32.ln() + 1.0).powi(2)).abs() < 1e-5, "{scaled} {unscaled}");
}

#[test]
fn slopes_of_six_heads_are_those_of_four_and_every_second_of_eight() {
    let expected = [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125];
    assert_eq!(alibi_slopes(6), expected);
    assert_eq!(alibi_slopes(1), [1.0 / 256.0]);
}

#[test]
fn the_text_side_needs_no_weights_and_its_digest_follows_tokenizer_and_configuration() {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../deploy/models/demo-moe");
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json"] {
        std::fs::copy(from.join(name), folder.path().join(name)).unwrap();
    }
    let whole = spec::read(&from, &*source::open(&from).unwrap()).unwrap();
    assert_eq!(spec::read_text_side(folder.path()).unwrap(), whole);
    let digest = source::text_digest(&from).unwrap();
    assert_eq!(source::text_digest(folder.path()).unwrap(), digest);
    for name in ["config.json", "tokenizer.json"] {
        let text = std::fs::read_to_string(from.join(name)).unwrap();
        std::fs::write(folder.path().join(name), format!("{text} ")).unwrap();
        assert_ne!(source::text_digest(folder.path()).unwrap(), digest, "{name}");
        std::fs::write(folder.path().join(name), text).unwrap();
    }
}
