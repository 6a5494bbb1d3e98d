//! Reads `config.json` of the families that are supported.
//!
//! Any MoE family's gate can be replaced by dynamic top-p with `"moe_gate": "dynamic_top_p"`, `"moe_top_p"` (the
//! probability mass, in (0, 1]) and `"moe_max_active"` (the cap on experts per token).
use super::config::Config;
use super::names::{self, Names};
use super::rope::RopeConfig;
use super::{
    Activation, Attention, Dense, Ffn, GatePolicy, Gqa, Groups, LayerSpec, Mla, ModelSpec, Moe, Norm, NormKind,
    Position, QkNorm, Shared,
};
use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// Values of `model_type` that can be loaded.
pub const FAMILIES: [&str; 11] = [
    "qwen3_moe",
    "qwen2_moe",
    "olmoe",
    "mixtral",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "glm4_moe",
    "qwen3",
    "llama",
];
const MAX_LAYERS: usize = 4096;
const MAX_EXPERTS: usize = 65_536;

/// Reads a Hugging Face folder's `config.json`, and the end tokens of its `generation_config.json` where there is one.
pub fn read_folder(folder: &Path) -> Result<ModelSpec> {
    let path = folder.join("config.json");
    let mut spec = from_config(&path, &read_json(&path)?)?;
    let generation = folder.join("generation_config.json");
    if generation.exists() {
        let value = read_json(&generation)?;
        let eos = Config::new(&generation, &value)?.counts("eos_token_id")?;
        if !eos.is_empty() {
            spec.eos = eos;
        }
    }
    Ok(spec)
}

fn read_json(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::Corrupt { path: path.to_owned(), reason: format!("is not JSON: {error}") })
}

/// The architecture that a `config.json` describes; `path` is for messages.
pub fn from_config(path: &Path, config: &Value) -> Result<ModelSpec> {
    let config = Config::new(path, config)?;
    let family = config.text("model_type")?.ok_or_else(|| config.error("model_type", "is missing".into()))?;
    if family == "bloom" {
        return bloom(&config);
    }
    let Some(&family) = FAMILIES.iter().find(|&&known| known == family) else {
        let known = FAMILIES.join(", ");
        return Err(config.error("model_type", format!("'{family}' is not supported; supported are {known}, bloom")));
    };
    Reader::new(config, family)?.model()
}

/// What layers of all families but Bloom need.
struct Reader<'a> {
    config: Config<'a>,
    family: &'static str,
    hidden: usize,
    layers: usize,
    norm: Norm,
    rope: RopeConfig<'a>,
    activation: Activation,
}

impl<'a> Reader<'a> {
    fn new(config: Config<'a>, family: &'static str) -> Result<Self> {
        let hidden = config.size("hidden_size", None)?;
        let eps = config.positive("rms_norm_eps", Some(1e-6))? as f32;
        let partial = if family == "glm4_moe" { 0.5 } else { 1.0 };
        let rope = RopeConfig::read(&config, config.size("max_position_embeddings", Some(2048))?, partial)?;
        let activation = if family == "gpt_oss" {
            Activation::ClampedSwiGlu {
                alpha: config.number("swiglu_alpha", Some(1.702))? as f32,
                limit: config.positive("swiglu_limit", Some(7.0))? as f32,
            }
        } else {
            activation(&config, "hidden_act")?
        };
        let layers = layer_count(&config, "num_hidden_layers")?;
        Ok(Self { config, family, hidden, layers, norm: Norm { kind: NormKind::Rms, eps }, rope, activation })
    }

    fn model(&self) -> Result<ModelSpec> {
        let config = &self.config;
        if config.has("quantization_config") {
            return Err(config.error(
                "quantization_config",
                "weights quantized by other tools are not supported; load the unquantized checkpoint and use \
                 --weights q8 or q4"
                    .into(),
            ));
        }
        let granite = self.family == "granitemoe";
        let multiplier = |key| if granite { config.number(key, Some(1.0)) } else { Ok(1.0) };
        let layers = (0..self.layers)
            .map(|index| {
                Ok(LayerSpec {
                    attention_norm: self.norm,
                    attention: self.attention(index)?,
                    ffn_norm: self.norm,
                    ffn: self.ffn(index)?,
                    residual_scale: multiplier("residual_multiplier")? as f32,
                    residual_after_norm: false,
                })
            })
            .collect::<Result<_>>()?;
        let logits_scaling = if granite { config.positive("logits_scaling", Some(1.0))? } else { 1.0 };
        Ok(ModelSpec {
            architecture: self.family.to_owned(),
            vocab: config.size("vocab_size", None)?,
            hidden: self.hidden,
            max_context: config.size("max_position_embeddings", Some(2048))?,
            eos: config.counts("eos_token_id")?,
            embedding_scale: multiplier("embedding_multiplier")? as f32,
            embedding_norm: None,
            layers,
            final_norm: self.norm,
            logits_scale: (1.0 / logits_scaling) as f32,
            tied: config.flag("tie_word_embeddings", granite)?,
            names: self.names(),
        })
    }

    fn names(&self) -> Names {
        match self.family {
            "qwen2_moe" => names::QWEN2_MOE,
            "mixtral" => names::MIXTRAL,
            "granitemoe" => names::GRANITE_MOE,
            "gpt_oss" => names::GPT_OSS,
            _ => names::LLAMA,
        }
    }

    fn attention(&self, layer: usize) -> Result<Attention> {
        let config = &self.config;
        let heads = config.size("num_attention_heads", None)?;
        if matches!(self.family, "deepseek_v2" | "deepseek_v3") {
            return self.mla(heads);
        }
        let kv_heads = config.size("num_key_value_heads", Some(heads))?;
        if !heads.is_multiple_of(kv_heads) {
            return Err(config.error("num_key_value_heads", format!("{kv_heads} does not divide {heads} heads")));
        }
        let head_dim = match config.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None if self.hidden.is_multiple_of(heads) => self.hidden / heads,
            None => return Err(config.error("num_attention_heads", format!("does not divide {}", self.hidden))),
        };
        let scale = match self.family {
            "granitemoe" => config.number("attention_multiplier", Some(1.0))? as f32,
            _ => (1.0 / (head_dim as f64).sqrt()) as f32,
        };
        let qkv_bias = match self.family {
            "qwen2_moe" => config.flag("qkv_bias", true)?,
            "gpt_oss" => config.flag("attention_bias", true)?,
            "mixtral" => false,
            _ => config.flag("attention_bias", false)?,
        };
        let qk_norm = match self.family {
            "qwen3" | "qwen3_moe" => QkNorm::Head(self.norm),
            "glm4_moe" if config.flag("use_qk_norm", false)? => QkNorm::Head(self.norm),
            "olmoe" => QkNorm::Full(self.norm),
            _ => QkNorm::None,
        };
        Ok(Attention::Gqa(Gqa {
            heads,
            kv_heads,
            head_dim,
            scale,
            position: Position::Rope(self.rope.rope(config, head_dim, false)?),
            window: self.window(layer)?,
            sinks: self.family == "gpt_oss",
            qkv_bias,
            output_bias: qkv_bias && !matches!(self.family, "qwen2_moe" | "glm4_moe"),
            qk_norm,
            clip: match self.family {
                "olmoe" if config.has("clip_qkv") => Some(config.positive("clip_qkv", None)? as f32),
                _ => None,
            },
        }))
    }

    /// The sliding window of a layer: by `layer_types` where there are any, else by each family's own rule.
    fn window(&self, layer: usize) -> Result<Option<usize>> {
        let config = &self.config;
        let used = match self.family {
            "qwen2_moe" | "qwen3_moe" | "qwen3" => config.flag("use_sliding_window", false)?,
            "mixtral" | "gpt_oss" => true,
            _ => false,
        };
        let window = match config.count("sliding_window", Some(0))? {
            0 => return Ok(None),
            window if used => window,
            _ => return Ok(None),
        };
        let sliding = match config.list("layer_types")? {
            Some(types) => match types.get(layer).and_then(Value::as_str) {
                Some("sliding_attention") => true,
                Some("full_attention") => false,
                other => {
                    let reason = format!("layer {layer} is {other:?}, not 'sliding_attention' or 'full_attention'");
                    return Err(config.error("layer_types", reason));
                }
            },
            None => match self.family {
                "gpt_oss" => layer.is_multiple_of(2),
                "qwen2_moe" | "qwen3" => layer >= config.count("max_window_layers", Some(28))?,
                _ => true,
            },
        };
        Ok(sliding.then_some(window))
    }

    fn mla(&self, heads: usize) -> Result<Attention> {
        let config = &self.config;
        let nope_dim = config.size("qk_nope_head_dim", None)?;
        let rope_dim = config.size("qk_rope_head_dim", None)?;
        let interleaved = self.family == "deepseek_v2" || config.flag("rope_interleave", true)?;
        let scale = self.rope.mla_scale()? / ((nope_dim + rope_dim) as f64).sqrt();
        Ok(Attention::Mla(Mla {
            heads,
            q_rank: config.optional_size("q_lora_rank")?,
            kv_rank: config.size("kv_lora_rank", None)?,
            nope_dim,
            rope_dim,
            v_dim: config.size("v_head_dim", None)?,
            scale: scale as f32,
            rope: self.rope.rope(config, rope_dim, interleaved)?,
            // The latents' norms keep their default, whatever the model's is.
            norm: Norm { kind: NormKind::Rms, eps: 1e-6 },
            bias: config.flag("attention_bias", false)?,
        }))
    }

    fn ffn(&self, layer: usize) -> Result<Ffn> {
        let config = &self.config;
        let moe = match self.family {
            "qwen3" | "llama" => false,
            "qwen2_moe" | "qwen3_moe" => {
                let dense = config.counts("mlp_only_layers")?.contains(&(layer as u32));
                !dense && (layer + 1).is_multiple_of(config.size("decoder_sparse_step", Some(1))?)
            }
            "deepseek_v2" | "deepseek_v3" | "glm4_moe" => match config.list("mlp_layer_types")? {
                Some(types) => types.get(layer).and_then(Value::as_str) == Some("sparse"),
                None => {
                    let every = config.size("moe_layer_freq", Some(1))?;
                    layer >= config.count("first_k_dense_replace", Some(0))? && layer.is_multiple_of(every)
                }
            },
            _ => true,
        };
        if moe {
            return self.moe().map(Ffn::Moe);
        }
        let bias = self.family == "llama" && config.flag("mlp_bias", false)?;
        Ok(Ffn::Dense(Dense { bias, ..self.network(config.size("intermediate_size", None)?) }))
    }

    fn network(&self, intermediate: usize) -> Dense {
        Dense { intermediate, activation: self.activation, gated: true, bias: false }
    }

    fn moe(&self) -> Result<Moe> {
        let config = &self.config;
        let experts_key = config.first_of(&["num_experts", "num_local_experts", "n_routed_experts"]);
        let experts = config.size(experts_key, None)?;
        let top_k = config.size("num_experts_per_tok", None)?;
        if experts > MAX_EXPERTS {
            return Err(config.error(experts_key, format!("{experts} is above {MAX_EXPERTS}")));
        }
        if top_k > experts {
            return Err(config.error("num_experts_per_tok", format!("{top_k} is above {experts} experts")));
        }
        let intermediate_key = match self.family {
            "olmoe" | "mixtral" | "granitemoe" | "gpt_oss" => "intermediate_size",
            _ => "moe_intermediate_size",
        };
        let intermediate = config.size(intermediate_key, None)?;
        let shared = match self.family {
            "qwen2_moe" => {
                let form = self.network(config.size("shared_expert_intermediate_size", None)?);
                Some(Shared { form, gated: true })
            }
            "deepseek_v2" | "deepseek_v3" | "glm4_moe" => match config.count("n_shared_experts", Some(0))? {
                0 => None,
                count => Some(Shared { form: self.network(intermediate * count), gated: false }),
            },
            _ => None,
        };
        Ok(Moe {
            experts,
            expert: Dense { bias: self.family == "gpt_oss", ..self.network(intermediate) },
            gate: self.gate(experts, top_k)?,
            gate_bias: self.family == "gpt_oss",
            choice_bias: matches!(self.family, "deepseek_v3" | "glm4_moe"),
            shared,
        })
    }

    fn gate(&self, experts: usize, top_k: usize) -> Result<GatePolicy> {
        let config = &self.config;
        match config.text("moe_gate")? {
            None => {}
            Some("dynamic_top_p") => {
                let p = config.positive("moe_top_p", None)? as f32;
                if p > 1.0 {
                    return Err(config.error("moe_top_p", format!("{p} is above 1")));
                }
                let max_active = config.size("moe_max_active", Some(top_k))?.min(experts);
                return Ok(GatePolicy::DynamicTopP { p, max_active });
            }
            Some(other) => {
                let reason = format!("'{other}' is not supported; leave it out or use 'dynamic_top_p'");
                return Err(config.error("moe_gate", reason));
            }
        }
        let scale = config.number("routed_scaling_factor", Some(1.0))? as f32;
        let normalize = |default| config.flag("norm_topk_prob", default);
        Ok(match self.family {
            "mixtral" => GatePolicy::SoftmaxTopK { top_k, normalize: true, groups: None, scale: 1.0 },
            "gpt_oss" | "granitemoe" => GatePolicy::TopKSoftmax { top_k },
            "deepseek_v3" | "glm4_moe" => {
                GatePolicy::Sigmoid { top_k, normalize: normalize(true)?, groups: self.groups(experts, top_k)?, scale }
            }
            "deepseek_v2" => {
                let groups = match config.text("topk_method")?.unwrap_or("greedy") {
                    "greedy" => None,
                    "group_limited_greedy" => self.groups(experts, top_k)?,
                    other => {
                        let reason = format!("'{other}' is not 'greedy' or 'group_limited_greedy'");
                        return Err(config.error("topk_method", reason));
                    }
                };
                // The weights are never normalized, whatever `norm_topk_prob` says.
                GatePolicy::SoftmaxTopK { top_k, normalize: false, groups, scale }
            }
            _ => GatePolicy::SoftmaxTopK { top_k, normalize: normalize(false)?, groups: None, scale: 1.0 },
        })
    }

    fn groups(&self, experts: usize, top_k: usize) -> Result<Option<Groups>> {
        let config = &self.config;
        let count = config.size("n_group", Some(1))?;
        let keep = config.size("topk_group", Some(count))?;
        if !experts.is_multiple_of(count) {
            return Err(config.error("n_group", format!("{count} does not divide {experts} experts")));
        }
        if keep > count || experts / count * keep < top_k {
            return Err(config.error("topk_group", format!("{keep} of {count} groups cannot give {top_k} experts")));
        }
        Ok((keep < count).then_some(Groups { count, keep }))
    }
}

fn bloom(config: &Config<'_>) -> Result<ModelSpec> {
    let hidden_key = config.first_of(&["hidden_size", "n_embed"]);
    let hidden = config.size(hidden_key, None)?;
    let heads_key = config.first_of(&["n_head", "num_attention_heads"]);
    let heads = config.size(heads_key, None)?;
    if !hidden.is_multiple_of(heads) {
        return Err(config.error(heads_key, format!("{heads} does not divide {hidden}")));
    }
    let norm = Norm { kind: NormKind::Layer, eps: config.positive("layer_norm_epsilon", Some(1e-5))? as f32 };
    let head_dim = hidden / heads;
    let layer = LayerSpec {
        attention_norm: norm,
        attention: Attention::Gqa(Gqa {
            heads,
            kv_heads: heads,
            head_dim,
            scale: (1.0 / (head_dim as f64).sqrt()) as f32,
            position: Position::Alibi,
            window: None,
            sinks: false,
            qkv_bias: true,
            output_bias: true,
            qk_norm: QkNorm::None,
            clip: None,
        }),
        ffn_norm: norm,
        ffn: Ffn::Dense(Dense { intermediate: 4 * hidden, activation: Activation::GeluTanh, gated: false, bias: true }),
        residual_scale: 1.0,
        residual_after_norm: config.flag("apply_residual_connection_post_layernorm", false)?,
    };
    let layers = layer_count(config, config.first_of(&["n_layer", "num_hidden_layers"]))?;
    Ok(ModelSpec {
        architecture: "bloom".into(),
        vocab: config.size("vocab_size", None)?,
        hidden,
        max_context: config.size("seq_length", Some(2048))?,
        eos: config.counts("eos_token_id")?,
        embedding_scale: 1.0,
        embedding_norm: Some(norm),
        layers: vec![layer; layers],
        final_norm: norm,
        logits_scale: 1.0,
        tied: config.flag("tie_word_embeddings", true)?,
        names: names::BLOOM,
    })
}

fn layer_count(config: &Config<'_>, key: &str) -> Result<usize> {
    match config.size(key, None)? {
        layers if layers > MAX_LAYERS => Err(config.error(key, format!("{layers} is above {MAX_LAYERS}"))),
        layers => Ok(layers),
    }
}

fn activation(config: &Config<'_>, key: &str) -> Result<Activation> {
    Ok(match config.text(key)?.unwrap_or("silu") {
        "silu" | "swish" => Activation::Silu,
        "gelu" => Activation::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
        "relu" => Activation::Relu,
        other => {
            return Err(config.error(key, format!("'{other}' is not supported; supported are silu, gelu, relu")));
        }
    })
}
