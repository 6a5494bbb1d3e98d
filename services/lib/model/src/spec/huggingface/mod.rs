//! Reads `config.json` of the families that are supported.
//!
//! Any MoE family's gate can be replaced by dynamic top-p with `"moe_gate": "dynamic_top_p"`, `"moe_top_p"` (the
//! probability mass, in (0, 1]) and `"moe_max_active"` (the cap on experts per token).
mod bloom;
mod moe;

use super::config::Config;
use super::names::{self, Names};
use super::rope::RopeConfig;
use super::{
    Activation, Attention, Dense, Ffn, Gqa, LayerSpec, Mla, ModelSpec, Norm, NormKind, Position, QkNorm, defaults,
};
use crate::Result;
use crate::source::read_json;
use serde_json::Value;
use std::path::Path;

/// Values of `model_type` that can be loaded.
pub const FAMILIES: [&str; 12] = [
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
    "bloom",
];
const MAX_LAYERS: usize = 4096;
const MAX_EXPERTS: usize = 65_536;

/// Reads a Hugging Face folder's `config.json`.
pub fn read_folder(folder: &Path) -> Result<ModelSpec> {
    let path = folder.join("config.json");
    from_config(&path, &read_json(&path)?)
}

/// The architecture that a `config.json` describes; `path` is for messages.
pub fn from_config(path: &Path, config: &Value) -> Result<ModelSpec> {
    let given = Config::new(path, config)?;
    let family = given.text("model_type")?.ok_or_else(|| given.error("model_type", "is missing".into()))?;
    let Some(&family) = FAMILIES.iter().find(|&&known| known == family) else {
        let known = FAMILIES.join(", ");
        return Err(given.error("model_type", format!("'{family}' is not supported; supported are {known}")));
    };
    if let Some(quantization) = given.object("quantization_config")? {
        let method = quantization.text("quant_method")?.unwrap_or("unknown");
        if !(method == "mxfp4" || method == "fp8" && quantization.has("weight_block_size")) {
            let reason = format!(
                "'{method}' is not supported (mxfp4 and fp8 with weight_block_size are); load the unquantized \
                 checkpoint and use --weights q8 or q4"
            );
            return Err(given.error("quantization_config", reason));
        }
    }
    let full = Value::Object(defaults::fill(family, given.entries()));
    let config = Config::new(path, &full)?;
    if family == "bloom" { bloom::read(&config) } else { Reader::new(config, family)?.model() }
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
        let eps = config.positive("rms_norm_eps", None)? as f32;
        let rope = RopeConfig::read(&config, config.size("max_position_embeddings", None)?, family == "glm4_moe")?;
        let activation = if family == "gpt_oss" {
            Activation::ClampedSwiGlu {
                alpha: config.number("swiglu_alpha", None)? as f32,
                limit: config.positive("swiglu_limit", None)? as f32,
            }
        } else {
            activation(&config, "hidden_act")?
        };
        let layers = layer_count(&config, "num_hidden_layers")?;
        Ok(Self { config, family, hidden, layers, norm: Norm { kind: NormKind::Rms, eps }, rope, activation })
    }

    fn model(&self) -> Result<ModelSpec> {
        let config = &self.config;
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
            max_context: config.size("max_position_embeddings", None)?,
            embedding_scale: multiplier("embedding_multiplier")? as f32,
            embedding_norm: None,
            layers,
            final_norm: self.norm,
            logits_scale: (1.0 / logits_scaling) as f32,
            tied: config.flag("tie_word_embeddings", false)?,
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
            None if self.family != "llama" || self.hidden.is_multiple_of(heads) => (self.hidden / heads).max(1),
            None => return Err(config.error("num_attention_heads", format!("does not divide {}", self.hidden))),
        };
        let scale = match self.family {
            "granitemoe" => config.number("attention_multiplier", Some(1.0))? as f32,
            _ => (1.0 / (head_dim as f64).sqrt()) as f32,
        };
        let qkv_bias = match self.family {
            "qwen2_moe" => config.flag("qkv_bias", false)?,
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

    /// The sliding window of a layer: by `layer_types` in the families that have it, else by each family's own rule.
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
        let types = match self.family {
            "qwen2_moe" | "qwen3" | "gpt_oss" => config.list("layer_types")?,
            _ => None,
        };
        let sliding = match types {
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
                "qwen3" => layer >= config.count("max_window_layers", None)?,
                // the reverse of Qwen3's, as its configuration class has it
                "qwen2_moe" => layer.is_multiple_of(2) && layer < config.count("max_window_layers", None)?,
                _ => true,
            },
        };
        Ok(sliding.then_some(window))
    }

    fn mla(&self, heads: usize) -> Result<Attention> {
        let config = &self.config;
        let nope_dim = config.size("qk_nope_head_dim", None)?;
        let rope_dim = config.size("qk_rope_head_dim", None)?;
        let interleaved = self.family == "deepseek_v2" || config.flag("rope_interleave", false)?;
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
        Ok(Ffn::Dense(self.biased(self.network(config.size("intermediate_size", None)?))?))
    }

    fn network(&self, intermediate: usize) -> Dense {
        Dense { intermediate, activation: self.activation, gated: true, bias: false }
    }

    /// A network that every token goes through has biases where `mlp_bias` says so.
    fn biased(&self, network: Dense) -> Result<Dense> {
        let bias = matches!(self.family, "llama" | "deepseek_v2") && self.config.flag("mlp_bias", false)?;
        Ok(Dense { bias, ..network })
    }
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
