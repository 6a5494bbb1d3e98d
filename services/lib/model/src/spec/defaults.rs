//! What `config.json` means by leaving a key out: the defaults of each family's configuration class in Hugging Face
//! transformers (5.24). A key that is there and null keeps its null, which means "none" where there is such a thing.
use serde_json::{Map, Value, json};

/// Names of the same value; one of them is enough.
const ALIASES: [&[&str]; 5] = [
    &["num_experts", "num_local_experts", "n_routed_experts"],
    &["num_hidden_layers", "n_layer"],
    &["num_attention_heads", "n_head"],
    &["hidden_size", "n_embed"],
    &["rope_parameters", "rope_scaling"],
];

/// The configuration with its family's defaults filled in.
pub(super) fn fill(family: &str, config: &Map<String, Value>) -> Map<String, Value> {
    let mut full = config.clone();
    let there = |name: &str| match name {
        // null means the default here
        "rope_parameters" | "rope_scaling" => config.get(name).is_some_and(|value| !value.is_null()),
        name => config.contains_key(name),
    };
    let Value::Object(defaults) = of_family(family) else { unreachable!("defaults are objects") };
    for (key, value) in defaults {
        let names = ALIASES.iter().find(|names| names.contains(&key.as_str()));
        if !names.map_or_else(|| there(&key), |names| names.iter().any(|name| there(name))) {
            full.insert(key, value);
        }
    }
    full
}

fn of_family(family: &str) -> Value {
    match family {
        "qwen3_moe" => json!({
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
            "num_attention_heads": 32, "num_key_value_heads": 4, "hidden_act": "silu",
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "use_sliding_window": false,
            "sliding_window": 4096, "decoder_sparse_step": 1, "moe_intermediate_size": 768, "num_experts_per_tok": 8,
            "num_experts": 128,
        }),
        "qwen2_moe" => json!({
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
            "num_attention_heads": 16, "num_key_value_heads": 16, "hidden_act": "silu",
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "use_sliding_window": false,
            "sliding_window": 4096, "max_window_layers": 28, "decoder_sparse_step": 1, "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60, "qkv_bias": true,
        }),
        "olmoe" => json!({
            "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16,
            "num_attention_heads": 16, "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "rope_theta": 1e4, "num_experts_per_tok": 8, "num_experts": 64,
        }),
        "mixtral" => json!({
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu",
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_experts_per_tok": 2,
            "num_local_experts": 8,
        }),
        "deepseek_v2" => json!({
            "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
            "rope_theta": 1e4, "first_k_dense_replace": 0, "kv_lora_rank": 512, "q_lora_rank": 1536,
            "n_routed_experts": 64, "n_shared_experts": 2, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "routed_scaling_factor": 1.0, "topk_method": "greedy", "v_head_dim": 128, "moe_intermediate_size": 1407,
        }),
        "deepseek_v3" => json!({
            "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
            "num_hidden_layers": 61, "num_attention_heads": 128, "hidden_act": "silu",
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "n_shared_experts": 1,
            "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536,
            "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4,
            "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": true, "rope_interleave": true,
        }),
        "gpt_oss" => json!({
            "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128,
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1.5e5, "num_experts_per_tok": 4,
            "num_local_experts": 128, "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "attention_bias": true,
            "rope_parameters": {
                "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
                "original_max_position_embeddings": 4096,
            },
        }),
        "granitemoe" => json!({
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
            "rope_theta": 1e4, "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0,
            "attention_multiplier": 1.0, "num_local_experts": 8, "num_experts_per_tok": 2,
        }),
        "glm4_moe" => json!({
            "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46,
            "num_attention_heads": 96, "num_key_value_heads": 8, "hidden_act": "silu",
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "partial_rotary_factor": 0.5,
            "moe_intermediate_size": 1408, "num_experts_per_tok": 8, "n_shared_experts": 1, "n_routed_experts": 128,
            "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
            "norm_topk_prob": true,
        }),
        "qwen3" => json!({
            "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "hidden_act": "silu",
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "use_sliding_window": false,
            "sliding_window": 4096, "max_window_layers": 28,
        }),
        "llama" => json!({
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
            "rope_theta": 1e4,
        }),
        "bloom" => json!({
            "vocab_size": 250880, "hidden_size": 64, "n_layer": 2, "n_head": 8, "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": true,
        }),
        // every other key is absent, false or none by default
        _ => json!({}),
    }
}
