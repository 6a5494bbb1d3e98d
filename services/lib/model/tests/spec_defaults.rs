//! Keys that a `config.json` leaves out mean what they mean to Hugging Face transformers.
//!
//! `data/config_defaults.json` pairs what a configuration class of transformers 5.24 was given with all that it then
//! said (`to_dict`, less what has no part in the architecture), one pair a line.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
use moesaic_model::spec::huggingface::FAMILIES;
use moesaic_model::spec::{ModelSpec, from_config};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;

fn read(config: &Value) -> moesaic_model::Result<ModelSpec> {
    from_config(Path::new("model/config.json"), config)
}

#[test]
fn absent_keys_are_the_configuration_classes_defaults() {
    let pairs: Vec<Value> = serde_json::from_str(include_str!("data/config_defaults.json")).unwrap();
    let mut families = BTreeSet::new();
    for pair in &pairs {
        let (given, full) = (&pair["given"], &pair["full"]);
        families.insert(given["model_type"].as_str().unwrap());
        let ours = read(given).unwrap_or_else(|error| panic!("{given}: {error}"));
        let theirs = read(full).unwrap_or_else(|error| panic!("{full}: {error}"));
        assert!(ours == theirs, "{given}\nis read as {ours:?}\nbut means {theirs:?}");
    }
    assert_eq!(families, BTreeSet::from(FAMILIES), "every family has a pair");
}

#[test]
fn the_experts_have_one_count_under_any_of_its_names() {
    for name in ["num_experts", "num_local_experts", "n_routed_experts"] {
        for family in ["qwen3_moe", "mixtral", "glm4_moe"] {
            let spec = read(&json!({"model_type": family, name: 24, "num_attention_heads": 32})).unwrap();
            let layer = spec.moe_layers().next().unwrap();
            assert_eq!(spec.moe(layer).unwrap().experts, 24, "{family}: {name}");
        }
    }
}

#[test]
fn what_is_not_supported_names_the_key() {
    let nested = json!({"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}});
    for (family, key, value) in [
        ("deepseek_v3", "scoring_func", json!("softmax")),
        ("deepseek_v3", "topk_method", json!("greedy")),
        ("deepseek_v2", "scoring_func", json!("sigmoid")),
        ("glm4_moe", "scoring_func", json!("softmax")),
        ("llama", "partial_rotary_factor", json!(0.5)),
        ("bloom", "quantization_config", json!({"quant_method": "gptq"})),
        ("deepseek_v2", "num_experts_per_tok", Value::Null),
        ("qwen3", "hidden_size", Value::Null),
    ] {
        let mut config = json!({"model_type": family, "num_attention_heads": 32, "num_experts_per_tok": 4});
        config[key] = value;
        let error = read(&config).unwrap_err().to_string();
        assert!(error.contains(&format!("'{key}'")), "{family}: {error}");
    }
    let error = read(&json!({"model_type": "gpt_oss", "rope_parameters": nested})).unwrap_err().to_string();
    assert!(error.contains("'full_attention'"), "{error}");
}
