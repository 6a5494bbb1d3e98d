//! Reads the architecture from GGUF metadata: llama (Mixtral too), qwen2moe, qwen3, qwen3moe, olmoe, gpt-oss, granitemoe,
//! bloom, deepseek2 (DeepSeek-V2 and V3).
//!
//! llama.cpp's converter permutes the rows of llama's and Granite's queries and keys so that neighbours turn together;
//! all other families' rows are as Hugging Face has them.
//!
//! What a key leaves open is as llama.cpp has it, but for GPT-OSS's YaRN: no key says that its ramp is not rounded to
//! whole dimensions, so llama.cpp rounds it; the model was trained without, and so it runs here.
mod bloom;
mod deepseek;

use super::config::Config;
use super::names::{self, ExpertNames, Names};
use super::rope::{Rope, RopeScaling};
use super::{
    Activation, Attention, Dense, Ffn, GatePolicy, Gqa, LayerSpec, ModelSpec, Moe, Norm, NormKind, Position, QkNorm,
    Shared,
};
use crate::source::WeightSource;
use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// Values of `general.architecture` that can be loaded.
pub const ARCHITECTURES: [&str; 9] =
    ["llama", "qwen2moe", "qwen3", "qwen3moe", "olmoe", GPT_OSS, GRANITE, BLOOM, DEEPSEEK];
const GPT_OSS: &str = "gpt-oss";
const GRANITE: &str = "granitemoe";
const BLOOM: &str = "bloom";
const DEEPSEEK: &str = "deepseek2";
/// Constants of GPT-OSS that its files do not carry.
const GPT_OSS_ACTIVATION: Activation = Activation::ClampedSwiGlu { alpha: 1.702, limit: 7.0 };
const MAX_LAYERS: usize = 4096;
const MAX_EXPERTS: usize = 65_536;
const ROPE_DIVISORS: &str = "rope_freqs.weight";

/// Reads the metadata of the `.gguf` file that `source` has open.
pub fn read_file(path: &Path, source: &dyn WeightSource) -> Result<ModelSpec> {
    match source.gguf() {
        Some(metadata) => from_gguf(&metadata.to_json(), source),
        None => Err(Error::Corrupt {
            path: path.to_owned(),
            reason: "is neither a folder with config.json nor a GGUF file".into(),
        }),
    }
}

/// The architecture that metadata (as a JSON object) and tensors describe.
pub fn from_gguf(metadata: &Value, source: &dyn WeightSource) -> Result<ModelSpec> {
    let config = Config::new(source.path(), metadata)?;
    let key = "general.architecture";
    let architecture = config.text(key)?.ok_or_else(|| config.error(key, "is missing".into()))?;
    let Some(&architecture) = ARCHITECTURES.iter().find(|&&known| known == architecture) else {
        let known = ARCHITECTURES.join(", ");
        return Err(config.error(key, format!("'{architecture}' is not supported; supported are {known}")));
    };
    Reader { config, architecture, source }.model()
}

struct Reader<'a> {
    config: Config<'a>,
    architecture: &'static str,
    source: &'a dyn WeightSource,
}

impl Reader<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn size(&self, name: &str, default: Option<usize>) -> Result<usize> {
        self.config.size(&self.key(name), default)
    }

    fn number(&self, name: &str, default: Option<f64>) -> Result<f64> {
        self.config.positive(&self.key(name), default)
    }

    /// A number above 0. Files that llama.cpp itself wrote have 0 for what the model lacks.
    fn nonzero(&self, name: &str) -> Result<Option<f64>> {
        match self.config.number(&self.key(name), Some(0.0))? {
            0.0 => Ok(None),
            _ => self.number(name, None).map(Some),
        }
    }

    /// A whole number from 1; as [`Self::nonzero`].
    fn nonzero_size(&self, name: &str) -> Result<Option<usize>> {
        let size = self.config.count(&self.key(name), Some(0))?;
        Ok((size > 0).then_some(size))
    }

    fn is_gpt_oss(&self) -> bool {
        self.architecture == GPT_OSS
    }

    /// One of Granite's scales; other families have the default.
    fn granite_scale(&self, name: &str, default: f64) -> Result<f64> {
        Ok(if self.architecture == GRANITE { self.nonzero(name)?.unwrap_or(default) } else { default })
    }

    fn has(&self, tensor: &str) -> bool {
        self.source.original(tensor).is_some()
    }

    fn model(&self) -> Result<ModelSpec> {
        let hidden = self.size("embedding_length", None)?;
        let count = self.size("block_count", None)?;
        if count > MAX_LAYERS {
            return Err(self.config.error(&self.key("block_count"), format!("{count} is above {MAX_LAYERS}")));
        }
        let embedding = "token_embd.weight";
        let vocab = match self.source.original(embedding) {
            Some(info) if info.shape.len() == 2 && info.shape[0] > 0 => info.shape[0],
            _ => {
                return Err(Error::Tensor {
                    path: self.source.path().to_owned(),
                    tensor: embedding.into(),
                    reason: "is missing or is no matrix".into(),
                });
            }
        };
        let max_context = self.size("context_length", Some(2048))?;
        let bloom = self.architecture == BLOOM;
        let (layers, norm) = if bloom {
            self.bloom_layers(hidden, count)?
        } else {
            let eps = self.number("attention.layer_norm_rms_epsilon", Some(1e-6))? as f32;
            let norm = Norm { kind: NormKind::Rms, eps };
            (self.layers(hidden, count, norm, max_context)?, norm)
        };
        Ok(ModelSpec {
            architecture: self.architecture.to_owned(),
            vocab,
            hidden,
            max_context,
            embedding_scale: self.granite_scale("embedding_scale", 1.0)? as f32,
            embedding_norm: bloom.then_some(norm),
            layers,
            final_norm: norm,
            logits_scale: (1.0 / self.granite_scale("logit_scale", 1.0)?) as f32,
            tied: !self.has("output.weight"),
            names: self.names(),
        })
    }

    fn layers(&self, hidden: usize, count: usize, norm: Norm, max_context: usize) -> Result<Vec<LayerSpec>> {
        let residual_scale = self.granite_scale("residual_scale", 1.0)? as f32;
        let attention = match self.architecture {
            DEEPSEEK => Attention::Mla(self.mla(max_context)?),
            _ => Attention::Gqa(self.attention(hidden, norm, max_context)?),
        };
        let dense = match self.architecture {
            DEEPSEEK => self.config.count(&self.key("leading_dense_block_count"), Some(0))?,
            _ => 0,
        };
        let ffn = if dense < count { Some(self.ffn(dense)?) } else { None };
        let layer = |(index, window): (usize, Option<usize>)| {
            let attention = match &attention {
                Attention::Gqa(gqa) => Attention::Gqa(Gqa { window, ..gqa.clone() }),
                mla @ Attention::Mla(_) => mla.clone(),
            };
            let ffn = match &ffn {
                Some(ffn) if index >= dense => ffn.clone(),
                _ => Ffn::Dense(self.network(self.size("feed_forward_length", None)?)),
            };
            Ok(LayerSpec {
                attention_norm: norm,
                attention,
                ffn_norm: norm,
                ffn,
                residual_scale,
                residual_after_norm: false,
            })
        };
        self.windows(count)?.into_iter().enumerate().map(layer).collect()
    }

    fn names(&self) -> Names {
        let stacked = self.has("blk.0.ffn_up_exps.weight") || !self.has("blk.0.ffn_up.0.weight");
        let experts = if stacked {
            names::GGUF.experts
        } else {
            // Files of early 2024 have a matrix for each expert.
            ExpertNames::Separate(["blk.{l}.ffn_gate.{e}", "blk.{l}.ffn_up.{e}", "blk.{l}.ffn_down.{e}"])
        };
        let names = match self.architecture {
            GPT_OSS => names::GGUF_GPT_OSS,
            BLOOM => names::GGUF_BLOOM,
            DEEPSEEK if !self.has("blk.0.attn_kv_b.weight") && self.has("blk.0.attn_k_b.weight") => {
                names::GGUF_MLA_BY_HEAD
            }
            _ => names::GGUF,
        };
        Names { experts, ..names }
    }

    /// The sliding window of each of `layers` layers.
    fn windows(&self, layers: usize) -> Result<Vec<Option<usize>>> {
        if !self.is_gpt_oss() {
            return Ok(vec![self.config.optional_size(&self.key("attention.sliding_window"))?; layers]);
        }
        let window = self.size("attention.sliding_window", None)?;
        // of so many layers the last is not windowed; 0: all are
        let period = self.config.count(&self.key("attention.sliding_window_pattern"), Some(2))?;
        let slides = |layer: usize| period == 0 || layer % period < period - 1;
        Ok((0..layers).map(|layer| slides(layer).then_some(window)).collect())
    }

    fn attention(&self, hidden: usize, norm: Norm, max_context: usize) -> Result<Gqa> {
        let heads = self.size("attention.head_count", None)?;
        let kv_heads = self.size("attention.head_count_kv", Some(heads))?;
        if !heads.is_multiple_of(kv_heads) {
            let key = self.key("attention.head_count_kv");
            return Err(self.config.error(&key, format!("{kv_heads} does not divide {heads} heads")));
        }
        let head_dim = self.size("attention.key_length", Some((hidden / heads).max(1)))?;
        if self.size("attention.value_length", Some(head_dim))? != head_dim {
            let key = self.key("attention.value_length");
            return Err(self.config.error(&key, format!("differs from the key's {head_dim}, which is not supported")));
        }
        let dims = self.size("rope.dimension_count", Some(head_dim))?;
        if !dims.is_multiple_of(2) || dims > head_dim {
            let key = self.key("rope.dimension_count");
            return Err(self.config.error(&key, format!("{dims} is odd or above the head's {head_dim}")));
        }
        let divisors = match self.source.original(ROPE_DIVISORS) {
            Some(info) if info.shape == [dims / 2] => {
                let mut divisors = vec![0.0; dims / 2];
                self.source.read_f32(ROPE_DIVISORS, 0, &mut divisors)?;
                Some(divisors)
            }
            Some(info) => {
                return Err(Error::Tensor {
                    path: self.source.path().to_owned(),
                    tensor: ROPE_DIVISORS.into(),
                    reason: format!("has shape {:?}, not [{}]", info.shape, dims / 2),
                });
            }
            None => None,
        };
        let theta = self.theta()?;
        let scale = self.granite_scale("attention.scale", 1.0 / (head_dim as f64).sqrt())?;
        Ok(Gqa {
            heads,
            kv_heads,
            head_dim,
            scale: scale as f32,
            position: Position::Rope(Rope {
                dims,
                theta,
                interleaved: matches!(self.architecture, "llama" | GRANITE),
                scaling: self.scaling(max_context)?,
                divisors,
            }),
            window: None,
            sinks: self.is_gpt_oss(),
            qkv_bias: self.has("blk.0.attn_q.bias"),
            output_bias: self.has("blk.0.attn_output.bias"),
            qk_norm: match self.architecture {
                "qwen3" | "qwen3moe" => QkNorm::Head(norm),
                "olmoe" => QkNorm::Full(norm),
                _ => QkNorm::None,
            },
            clip: match self.key("attention.clamp_kqv") {
                key if self.config.has(&key) => Some(self.config.positive(&key, None)? as f32),
                _ => None,
            },
        })
    }

    fn theta(&self) -> Result<f64> {
        match self.number("rope.freq_base", Some(10_000.0))? {
            theta if theta > 1.0 => Ok(theta),
            theta => Err(self.config.error(&self.key("rope.freq_base"), format!("{theta} is not above 1"))),
        }
    }

    fn scaling(&self, max_context: usize) -> Result<RopeScaling> {
        // The only switch of rotation that files have: llama.cpp reads it so for Granite.
        let turns = self.key("rope.scaling.finetuned");
        if self.architecture == GRANITE && !self.config.flag(&turns, true)? {
            return Err(self.config.error(&turns, "false, no rotation, is not supported".into()));
        }
        let key = self.key("rope.scaling.type");
        // Files of 2023 have the older key of linear scaling, and no type.
        Ok(match self.config.text(&key)?.unwrap_or("linear") {
            "none" => RopeScaling::None,
            "linear" => {
                let older = self.nonzero("rope.scale_linear")?;
                match self.nonzero("rope.scaling.factor")?.or(older) {
                    Some(factor) => RopeScaling::Linear { factor },
                    None => RopeScaling::None,
                }
            }
            "yarn" => {
                let factor = self.number("rope.scaling.factor", self.nonzero("rope.scale_linear")?)?;
                let attention = self.number("rope.scaling.attn_factor", Some(1.0))?
                    * self.number("rope.scaling.yarn_attn_factor", Some(1.0))?;
                RopeScaling::Yarn {
                    factor,
                    beta_fast: self.number("rope.scaling.yarn_beta_fast", Some(32.0))?,
                    beta_slow: self.number("rope.scaling.yarn_beta_slow", Some(1.0))?,
                    original_context: self.number("rope.scaling.original_context_length", Some(max_context as f64))?,
                    truncate: !self.is_gpt_oss(),
                    attention_factor: attention * self.yarn_temperature(factor)?,
                }
            }
            other => {
                let reason = format!("'{other}' is not supported; supported are none, linear and yarn");
                return Err(self.config.error(&key, reason));
            }
        })
    }

    fn network(&self, intermediate: usize) -> Dense {
        let oss = self.is_gpt_oss();
        let activation = if oss { GPT_OSS_ACTIVATION } else { Activation::Silu };
        Dense { intermediate, activation, gated: true, bias: oss }
    }

    /// The feed-forward part of layers from `first` on.
    fn ffn(&self, first: usize) -> Result<Ffn> {
        let oss = self.is_gpt_oss();
        let network = |intermediate| self.network(intermediate);
        let experts = self.config.count(&self.key("expert_count"), Some(0))?;
        let inner = || self.size("feed_forward_length", None);
        if experts == 0 {
            return Ok(Ffn::Dense(network(inner()?)));
        }
        let top_k = self.size("expert_used_count", None)?;
        if experts > MAX_EXPERTS || top_k > experts {
            let reason = format!("{top_k} of {experts} experts is impossible");
            return Err(self.config.error(&self.key("expert_used_count"), reason));
        }
        // The key came late; older files say it by the tensor's shape alone.
        let stack = format!("blk.{first}.ffn_up_exps.weight");
        let stacked = self.source.original(&stack).and_then(|info| info.shape.get(1).copied());
        let expert = match self.config.optional_size(&self.key("expert_feed_forward_length"))? {
            Some(inner) => inner,
            None => match stacked.filter(|_| self.architecture != "llama") {
                Some(inner) => inner,
                None => inner()?,
            },
        };
        let shared = match self.architecture {
            "qwen2moe" => {
                let stored =
                    self.source.original("blk.0.ffn_up_shexp.weight").and_then(|info| info.shape.first().copied());
                let inner = self.size("expert_shared_feed_forward_length", stored)?;
                Some(Shared { form: network(inner), gated: true })
            }
            GRANITE => {
                let inner = self.nonzero_size("expert_shared_feed_forward_length")?;
                inner.map(|inner| Shared { form: network(inner), gated: false })
            }
            DEEPSEEK => {
                let count = self.nonzero_size("expert_shared_count")?;
                count.map(|count| Shared { form: network(expert * count), gated: false })
            }
            _ => None,
        };
        let normalize = matches!(self.architecture, "llama" | "qwen3moe");
        let normalize = self.config.flag(&self.key("expert_weights_norm"), normalize)?;
        let gate = match self.architecture {
            GPT_OSS | GRANITE => GatePolicy::TopKSoftmax { top_k },
            DEEPSEEK => self.deepseek_gate(experts, top_k, normalize)?,
            _ => GatePolicy::SoftmaxTopK { top_k, normalize, groups: None, scale: 1.0 },
        };
        let choice_bias = self.architecture == DEEPSEEK && self.has(&format!("blk.{first}.exp_probs_b.bias"));
        if choice_bias && !matches!(gate, GatePolicy::Sigmoid { .. }) {
            let reason = "a bias of the choice is supported with sigmoid only".to_owned();
            return Err(self.config.error(&self.key("expert_gating_func"), reason));
        }
        let expert = network(expert);
        Ok(Ffn::Moe(Moe { experts, expert, gate, gate_bias: oss, choice_bias, shared }))
    }
}
