//! Reads the architecture from GGUF metadata: llama (Mixtral too), qwen2moe, qwen3, qwen3moe, olmoe, gpt-oss.
//!
//! What a key leaves open is as llama.cpp has it, but for GPT-OSS's YaRN: no key says that its ramp is not rounded to
//! whole dimensions, so llama.cpp rounds it; the model was trained without, and so it runs here.
use super::config::Config;
use super::names::{self, ExpertNames, Names};
use super::rope::{Rope, RopeScaling, yarn_mscale};
use super::{
    Activation, Attention, Dense, Ffn, GatePolicy, Gqa, LayerSpec, ModelSpec, Moe, Norm, NormKind, Position, QkNorm,
    Shared,
};
use crate::source::WeightSource;
use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// Values of `general.architecture` that can be loaded.
pub const ARCHITECTURES: [&str; 6] = ["llama", "qwen2moe", "qwen3", "qwen3moe", "olmoe", GPT_OSS];
const GPT_OSS: &str = "gpt-oss";
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

    fn is_gpt_oss(&self) -> bool {
        self.architecture == GPT_OSS
    }

    fn has(&self, tensor: &str) -> bool {
        self.source.info(tensor).is_some()
    }

    fn model(&self) -> Result<ModelSpec> {
        let hidden = self.size("embedding_length", None)?;
        let count = self.size("block_count", None)?;
        if count > MAX_LAYERS {
            return Err(self.config.error(&self.key("block_count"), format!("{count} is above {MAX_LAYERS}")));
        }
        let norm =
            Norm { kind: NormKind::Rms, eps: self.number("attention.layer_norm_rms_epsilon", Some(1e-6))? as f32 };
        let max_context = self.size("context_length", Some(2048))?;
        let embedding = "token_embd.weight";
        let vocab = match self.source.info(embedding) {
            Some(info) if info.shape.len() == 2 && info.shape[0] > 0 => info.shape[0],
            _ => {
                return Err(Error::Tensor {
                    path: self.source.path().to_owned(),
                    tensor: embedding.into(),
                    reason: "is missing or is no matrix".into(),
                });
            }
        };
        let attention = self.attention(hidden, norm, max_context)?;
        let ffn = self.ffn()?;
        let layer = |window| LayerSpec {
            attention_norm: norm,
            attention: Attention::Gqa(Gqa { window, ..attention.clone() }),
            ffn_norm: norm,
            ffn: ffn.clone(),
            residual_scale: 1.0,
            residual_after_norm: false,
        };
        Ok(ModelSpec {
            architecture: self.architecture.to_owned(),
            vocab,
            hidden,
            max_context,
            embedding_scale: 1.0,
            embedding_norm: None,
            layers: self.windows(count)?.into_iter().map(layer).collect(),
            final_norm: norm,
            logits_scale: 1.0,
            tied: !self.has("output.weight"),
            names: self.names(),
        })
    }

    fn names(&self) -> Names {
        let stacked = self.has("blk.0.ffn_up_exps.weight") || !self.has("blk.0.ffn_up.0.weight");
        let experts = if stacked {
            names::GGUF.experts
        } else {
            // Files of early 2024 have a matrix for each expert.
            ExpertNames::Separate(["blk.{l}.ffn_gate.{e}", "blk.{l}.ffn_up.{e}", "blk.{l}.ffn_down.{e}"])
        };
        Names { experts, ..if self.is_gpt_oss() { names::GGUF_GPT_OSS } else { names::GGUF } }
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
        let divisors = match self.source.info(ROPE_DIVISORS) {
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
        let theta = self.number("rope.freq_base", Some(10_000.0))?;
        if theta <= 1.0 {
            return Err(self.config.error(&self.key("rope.freq_base"), format!("{theta} is not above 1")));
        }
        Ok(Gqa {
            heads,
            kv_heads,
            head_dim,
            scale: (1.0 / (head_dim as f64).sqrt()) as f32,
            position: Position::Rope(Rope {
                dims,
                theta,
                // llama's rows are permuted in the file so that neighbours turn together.
                interleaved: self.architecture == "llama",
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

    fn scaling(&self, max_context: usize) -> Result<RopeScaling> {
        let key = self.key("rope.scaling.type");
        Ok(match self.config.text(&key)?.unwrap_or("none") {
            "none" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: self.number("rope.scaling.factor", Some(1.0))? },
            "yarn" => {
                let factor = self.number("rope.scaling.factor", None)?;
                let attention = self.number("rope.scaling.attn_factor", Some(1.0))?
                    * self.number("rope.scaling.yarn_attn_factor", Some(1.0))?;
                RopeScaling::Yarn {
                    factor,
                    beta_fast: self.number("rope.scaling.yarn_beta_fast", Some(32.0))?,
                    beta_slow: self.number("rope.scaling.yarn_beta_slow", Some(1.0))?,
                    original_context: self.number("rope.scaling.original_context_length", Some(max_context as f64))?,
                    truncate: !self.is_gpt_oss(),
                    attention_factor: attention * yarn_mscale(factor, 1.0),
                }
            }
            other => {
                let reason = format!("'{other}' is not supported; supported are none, linear and yarn");
                return Err(self.config.error(&key, reason));
            }
        })
    }

    fn ffn(&self) -> Result<Ffn> {
        let oss = self.is_gpt_oss();
        let activation = if oss { GPT_OSS_ACTIVATION } else { Activation::Silu };
        let network = |intermediate| Dense { intermediate, activation, gated: true, bias: oss };
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
        let stacked = self.source.info("blk.0.ffn_up_exps.weight").and_then(|info| info.shape.get(1).copied());
        let expert = match self.config.optional_size(&self.key("expert_feed_forward_length"))? {
            Some(inner) => inner,
            None => match stacked.filter(|_| self.architecture != "llama") {
                Some(inner) => inner,
                None => inner()?,
            },
        };
        let shared = match self.architecture {
            "qwen2moe" => {
                let stored = self.source.info("blk.0.ffn_up_shexp.weight").and_then(|info| info.shape.first().copied());
                let inner = self.size("expert_shared_feed_forward_length", stored)?;
                Some(Shared { form: network(inner), gated: true })
            }
            _ => None,
        };
        let normalize = matches!(self.architecture, "llama" | "qwen3moe");
        let normalize = self.config.flag(&self.key("expert_weights_norm"), normalize)?;
        let gate = if oss {
            GatePolicy::TopKSoftmax { top_k }
        } else {
            GatePolicy::SoftmaxTopK { top_k, normalize, groups: None, scale: 1.0 }
        };
        let expert = network(expert);
        Ok(Ffn::Moe(Moe { experts, expert, gate, gate_bias: oss, choice_bias: false, shared }))
    }
}
