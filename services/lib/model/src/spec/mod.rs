//! Architectures as data: everything that tells one model from another, read from `config.json` or GGUF metadata.
//!
//! To add a family, add its reading to [`huggingface`] (or [`gguf`]) and its tensor names to [`names`]; only a new
//! *kind* of layer part touches the decoder.
mod bloom;
mod config;
mod defaults;
pub mod gguf;
pub mod huggingface;
pub mod names;
pub mod rope;

pub use crate::gate::{GatePolicy, Groups};
pub(crate) use config::Config;
pub use huggingface::{from_config, read_folder};
pub use names::{ExpertNames, Names};
pub use rope::{Rope, RopeScaling};

use crate::Result;
use crate::source::{self, WeightSource};
use std::path::Path;

/// Reads the architecture of a Hugging Face folder, or of a GGUF file that `source` has open.
pub fn read(path: &Path, source: &dyn WeightSource) -> Result<ModelSpec> {
    if !path.is_dir() || source.gguf().is_some() {
        return gguf::read_file(path, source);
    }
    let mut spec = read_folder(path)?;
    let bare = spec.names.without_prefix();
    let has = |name: &str| source.info(&format!("{name}.weight")).is_some();
    if !has(spec.names.embedding) && has(bare.embedding) {
        spec.names = bare;
    }
    spec.tied &= !has_own_output(&spec, source)?;
    Ok(spec)
}

/// Reads the architecture without opening the weights of a folder, for who has none.
pub fn read_text_side(path: &Path) -> Result<ModelSpec> {
    if source::gguf_file(path).is_some() { read(path, &*source::open(path)?) } else { read_folder(path) }
}

/// Whether the files have an output matrix that is not the embedding. Such a model is not tied, whatever its
/// configuration says (the reference decides so too).
fn has_own_output(spec: &ModelSpec, source: &dyn WeightSource) -> Result<bool> {
    const CHUNK: usize = 1 << 14;
    let (embedding, output) = (format!("{}.weight", spec.names.embedding), format!("{}.weight", spec.names.output));
    let (Some(theirs), Some(own)) = (source.info(&embedding), source.info(&output)) else { return Ok(false) };
    if !spec.tied || theirs.shape != own.shape || theirs.dtype != own.dtype {
        return Ok(spec.tied);
    }
    let len: usize = own.shape.iter().product();
    let (mut a, mut b) = (vec![0.0; CHUNK.min(len)], vec![0.0; CHUNK.min(len)]);
    for start in (0..len).step_by(CHUNK) {
        let part = CHUNK.min(len - start);
        source.read_f32(&embedding, start, &mut a[..part])?;
        source.read_f32(&output, start, &mut b[..part])?;
        if a[..part].iter().zip(&b[..part]).any(|(a, b)| a.to_bits() != b.to_bits()) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A model's architecture.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// The family (`model_type` of `config.json`, `general.architecture` of GGUF).
    pub architecture: String,
    /// Rows of the embedding and of the logits.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// The longest context, in tokens.
    pub max_context: usize,
    /// Multiplies embeddings.
    pub embedding_scale: f32,
    /// Normalizes embeddings (Bloom).
    pub embedding_norm: Option<Norm>,
    /// The layers, in order.
    pub layers: Vec<LayerSpec>,
    /// Before the logits.
    pub final_norm: Norm,
    /// Multiplies logits.
    pub logits_scale: f32,
    /// Whether the output matrix is the embedding.
    pub tied: bool,
    /// How the tensors are called.
    pub names: Names,
}

impl ModelSpec {
    /// Indices of the layers that have experts.
    pub fn moe_layers(&self) -> impl Iterator<Item = usize> + '_ {
        self.layers.iter().enumerate().filter(|(_, layer)| layer.ffn.moe().is_some()).map(|(index, _)| index)
    }

    /// The MoE part of a layer, if it has one.
    pub fn moe(&self, layer: usize) -> Option<&Moe> {
        self.layers.get(layer).and_then(|layer| layer.ffn.moe())
    }
}

/// One layer: attention, then a feed-forward part, each behind its norm and added to the residual stream.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// Before attention.
    pub attention_norm: Norm,
    /// Attention.
    pub attention: Attention,
    /// Before the feed-forward part.
    pub ffn_norm: Norm,
    /// The feed-forward part.
    pub ffn: Ffn,
    /// Multiplies what both parts add to the residual stream.
    pub residual_scale: f32,
    /// Whether the residual is taken after the norm (an option of Bloom).
    pub residual_after_norm: bool,
}

/// A norm over the last dimension, with a weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Which.
    pub kind: NormKind,
    /// Added to the variance.
    pub eps: f32,
}

/// Which norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// Root mean square.
    Rms,
    /// Mean and variance, with a bias.
    Layer,
}

/// How a layer attends.
#[derive(Clone, Debug, PartialEq)]
pub enum Attention {
    /// Grouped queries.
    Gqa(Gqa),
    /// Multi-head latent attention (DeepSeek), run in the absorbed form: what is cached is the latent.
    Mla(Mla),
}

impl Attention {
    /// Query heads.
    pub fn heads(&self) -> usize {
        match self {
            Self::Gqa(gqa) => gqa.heads,
            Self::Mla(mla) => mla.heads,
        }
    }

    /// Key and value heads that are cached, the width of a key, of a value, and whether the value is the key's start.
    pub fn cached(&self) -> (usize, usize, usize, bool) {
        match self {
            Self::Gqa(gqa) => (gqa.kv_heads, gqa.head_dim, gqa.head_dim, false),
            Self::Mla(mla) => (1, mla.kv_rank + mla.rope_dim, mla.kv_rank, true),
        }
    }

    /// Multiplies scores before the softmax.
    pub fn scale(&self) -> f32 {
        match self {
            Self::Gqa(gqa) => gqa.scale,
            Self::Mla(mla) => mla.scale,
        }
    }
}

/// Grouped-query attention.
#[derive(Clone, Debug, PartialEq)]
pub struct Gqa {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Multiplies scores.
    pub scale: f32,
    /// How positions enter.
    pub position: Position,
    /// A query sees the last `window` positions, its own included.
    pub window: Option<usize>,
    /// A learned logit per head that takes part in the softmax and adds nothing.
    pub sinks: bool,
    /// Biases of query, key and value.
    pub qkv_bias: bool,
    /// Bias of the output.
    pub output_bias: bool,
    /// Norms of queries and keys.
    pub qk_norm: QkNorm,
    /// Queries, keys and values are clamped to ±this.
    pub clip: Option<f32>,
}

/// Norms of queries and keys, before positions enter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum QkNorm {
    /// None.
    None,
    /// Each head by itself.
    Head(Norm),
    /// Over all heads at once.
    Full(Norm),
}

/// How positions enter attention.
#[derive(Clone, Debug, PartialEq)]
pub enum Position {
    /// Rotation of queries and keys.
    Rope(Rope),
    /// A slope per head times the distance.
    Alibi,
}

/// Multi-head latent attention.
#[derive(Clone, Debug, PartialEq)]
pub struct Mla {
    /// Heads.
    pub heads: usize,
    /// Width of the query's latent; `None`: queries are projected directly.
    pub q_rank: Option<usize>,
    /// Width of the latent that is cached.
    pub kv_rank: usize,
    /// Width of a head's part without position.
    pub nope_dim: usize,
    /// Width of the part with position, shared by all heads' keys.
    pub rope_dim: usize,
    /// Width of a head's value.
    pub v_dim: usize,
    /// Multiplies scores.
    pub scale: f32,
    /// The rotation.
    pub rope: Rope,
    /// Norm of the latents.
    pub norm: Norm,
    /// Biases of the down projections and of the output.
    pub bias: bool,
}

/// The feed-forward part.
#[derive(Clone, Debug, PartialEq)]
pub enum Ffn {
    /// One network.
    Dense(Dense),
    /// Experts behind a gate.
    Moe(Moe),
}

impl Ffn {
    /// The experts, if any.
    pub fn moe(&self) -> Option<&Moe> {
        match self {
            Self::Moe(moe) => Some(moe),
            Self::Dense(_) => None,
        }
    }
}

/// A dense feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dense {
    /// Its inner width.
    pub intermediate: usize,
    /// Its activation.
    pub activation: Activation,
    /// Whether it is `down(act(gate(x)) * up(x))`; else `down(act(up(x)))`.
    pub gated: bool,
    /// Whether its matrices have biases.
    pub bias: bool,
}

/// Experts behind a gate.
#[derive(Clone, Debug, PartialEq)]
pub struct Moe {
    /// How many.
    pub experts: usize,
    /// Each one's form.
    pub expert: Dense,
    /// How the gate chooses.
    pub gate: GatePolicy,
    /// Whether the gate's logits have a bias.
    pub gate_bias: bool,
    /// Whether a bias enters the choice alone.
    pub choice_bias: bool,
    /// An expert that every token goes to.
    pub shared: Option<Shared>,
}

/// An expert that every token goes to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shared {
    /// Its form.
    pub form: Dense,
    /// Whether its output is multiplied by the sigmoid of a gate of its own.
    pub gated: bool,
}

/// The nonlinearity of a feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// x sigmoid(x).
    Silu,
    /// Exact GELU.
    Gelu,
    /// GELU by tanh.
    GeluTanh,
    /// max(x, 0).
    Relu,
    /// GPT-OSS: gate capped at `limit`, up clamped to ±`limit`, `gate sigmoid(alpha gate) (up + 1)`.
    ClampedSwiGlu {
        /// Steepness of the sigmoid.
        alpha: f32,
        /// The clamp.
        limit: f32,
    },
}

/// ALiBi's slopes (arXiv 2108.12409), also for head counts that are not a power of two.
pub fn alibi_slopes(heads: usize) -> Vec<f32> {
    let power = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
    let slope = |of: usize, n: usize| (2f64.powf(-8.0 / of as f64 * n as f64)) as f32;
    let regular = (1..=power).map(|n| slope(power, n));
    let between = (0..heads - power).map(|n| slope(2 * power, 2 * n + 1));
    regular.chain(between).collect()
}
