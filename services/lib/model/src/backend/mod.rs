//! What a device must be able to do: hold weights, run a layer's operations on rows of f32 activations, and keep the
//! paged KV cache. Two implementations: [`native`] CPU kernels and [`candle`].
//!
//! A [`Backend::Tensor`] is a matrix of f32, one row a token. No operation may let one row's arithmetic depend on
//! the others of a batch where the backend promises determinism (native does; see `design.md`, promise 2).
pub mod candle;
#[cfg(feature = "cuda")]
pub mod cuda;
mod matrix;
pub mod native;

pub use matrix::{FfnMatrices, Matrix, ReadCodes, ReadRow, TensorSlice, kernel_format};

use crate::spec::Norm;
use crate::{Error, Result};
pub use moesaic_kernels::AttentionSequence;
use moesaic_types::{KvFormat, Routing};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::sync::Arc;

/// Threads of the maths at most.
pub const MAX_THREADS: usize = 1024;

/// Refuses a number of threads that no machine has; 0 stands for all cores.
///
/// # Errors
/// A message with the limit.
pub fn check_threads(threads: usize) -> Result<usize, String> {
    match threads {
        0..=MAX_THREADS => Ok(threads),
        _ => Err(format!("{threads} threads; at most {MAX_THREADS}, or 0 for all cores")),
    }
}

/// Which backend runs a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendKind {
    /// The CPU kernels of `moesaic-kernels`.
    #[default]
    Native,
    /// candle: CPU, or a GPU with the cargo features `cuda` or `metal`.
    Candle,
}

impl std::str::FromStr for BackendKind {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "native" => Ok(Self::Native),
            "candle" => Ok(Self::Candle),
            _ => Err(format!("backend '{text}' is unknown; use native or candle")),
        }
    }
}

/// How products with bf16, q8 and q4 weights take their activations on the native backend; those with f32 weights take
/// f32, and so does candle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activations {
    /// Rounded: for q8 and q4 weights to int8 in their groups, as llama.cpp does, which is several times as fast; for bf16
    /// weights to bf16, which is faster where the CPU multiplies pairs of it, and gives the same bits everywhere else.
    #[default]
    Int8,
    /// As they are.
    F32,
}

impl std::str::FromStr for Activations {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "int8" => Ok(Self::Int8),
            "f32" => Ok(Self::F32),
            _ => Err(format!("activations '{text}' are unknown; use int8 or f32")),
        }
    }
}

/// What is cached of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Key and value heads.
    pub heads: usize,
    /// Width of a key.
    pub k_dim: usize,
    /// Width of a value.
    pub v_dim: usize,
    /// Whether a value is the start of its key, and not stored again.
    pub v_in_k: bool,
}

/// One layer's attention, but for the tensors.
#[derive(Clone, Debug)]
pub struct AttentionCall {
    /// Query heads; a multiple of the layout's.
    pub heads: usize,
    /// Multiplies scores.
    pub scale: f32,
    /// A query sees the last `window` positions, its own included.
    pub window: Option<usize>,
    /// A logit per head that takes part in the softmax and adds nothing.
    pub sinks: Option<Arc<[f32]>>,
    /// A slope per head: `-slope * distance` is added to scores.
    pub alibi: Option<Arc<[f32]>>,
}

/// Takes a model's weights, one after another: a device that will run it, or something that writes them elsewhere.
pub trait Loader {
    /// A matrix with an optional bias.
    type Linear: Send + Sync;
    /// A table of rows.
    type Embedding: Send + Sync;
    /// A norm's weights.
    type Norm: Send + Sync;
    /// A feed-forward network; a clone shares its memory.
    type Ffn: Clone + Send + Sync;

    /// Takes a matrix.
    fn load_linear(&self, matrix: Matrix<'_>, bias: Option<Vec<f32>>) -> Result<Self::Linear>;
    /// Takes an embedding.
    fn load_embedding(&self, matrix: Matrix<'_>) -> Result<Self::Embedding>;
    /// The embedding as output matrix, sharing its memory.
    fn tie(&self, embedding: &Self::Embedding) -> Result<Self::Linear>;
    /// Takes a norm's weights.
    fn load_norm(&self, norm: Norm, weight: Vec<f32>, bias: Option<Vec<f32>>) -> Result<Self::Norm>;
    /// Takes a feed-forward network.
    fn load_ffn(&self, matrices: FfnMatrices<'_>) -> Result<Self::Ffn>;
}

/// A device that runs models.
pub trait Backend: Loader + Send + Sync + Sized + 'static {
    /// Rows of f32 on the device.
    type Tensor: Send;
    /// One layer's experts; those that are elsewhere are missing.
    type Experts: Send + Sync;
    /// Cosines and sines of a batch's positions.
    type Rotation: Send;
    /// The KV cache of all layers.
    type Kv: Send;

    /// `native` or `candle`.
    fn name(&self) -> &'static str;

    /// Grows while a long operation gets on, where the device tells; any thread may look.
    fn advanced(&self) -> u64 {
        0
    }

    /// Gathers a layer's experts.
    fn gather_experts(&self, experts: Vec<Option<Self::Ffn>>, hidden: usize) -> Result<Self::Experts>;

    /// Moves `[rows, cols]` values to the device.
    fn to_device(&self, values: Vec<f32>, cols: usize) -> Result<Self::Tensor>;
    /// Moves values to the host.
    fn to_host(&self, x: &Self::Tensor) -> Result<Vec<f32>>;
    /// Values to read on the host: without a copy where they are there already.
    fn on_host<'a>(&self, x: &'a Self::Tensor) -> Result<Cow<'a, [f32]>> {
        Ok(Cow::Owned(self.to_host(x)?))
    }
    /// Rows of the embedding.
    fn embed(&self, embedding: &Self::Embedding, tokens: &[u32]) -> Result<Self::Tensor>;
    /// Normalizes each run of columns that is as long as the norm's weight.
    fn norm(&self, norm: &Self::Norm, x: &Self::Tensor) -> Result<Self::Tensor>;
    /// `x Wᵀ + bias`.
    fn linear(&self, linear: &Self::Linear, x: &Self::Tensor) -> Result<Self::Tensor>;
    /// The same with several matrices, which a device may run at once.
    fn linears<const N: usize>(&self, linears: [&Self::Linear; N], x: &Self::Tensor) -> Result<[Self::Tensor; N]> {
        let all = linears.iter().map(|linear| self.linear(linear, x)).collect::<Result<Vec<_>>>()?;
        Ok(all.try_into().unwrap_or_else(|_| unreachable!("as many results as matrices")))
    }
    /// Says which matrix is needed next, most likely; a hint for a device that can read ahead.
    fn expect(&self, _linear: &Self::Linear) {}
    /// Applies a matrix of its own to each head's columns.
    fn linear_by_head(&self, linears: &[Self::Linear], x: &Self::Tensor) -> Result<Self::Tensor>;
    /// Cosines and sines `[rows, pairs]`, for pairs of neighbours or of halves.
    fn rotation(&self, cos: &[f32], sin: &[f32], pairs: usize, interleaved: bool) -> Result<Self::Rotation>;
    /// Rotates the columns from `offset` of each head.
    fn rotate(
        &self,
        x: Self::Tensor,
        head_dim: usize,
        offset: usize,
        rotation: &Self::Rotation,
    ) -> Result<Self::Tensor>;
    /// Columns `start..start + width` of each of `heads` heads.
    fn columns(&self, x: &Self::Tensor, heads: usize, start: usize, width: usize) -> Result<Self::Tensor>;
    /// Joins two tensors' columns head by head.
    fn join(&self, a: &Self::Tensor, b: &Self::Tensor, heads: usize) -> Result<Self::Tensor>;
    /// Some rows.
    fn rows(&self, x: &Self::Tensor, rows: &[u32]) -> Result<Self::Tensor>;
    /// `x * factor`.
    fn scale(&self, x: Self::Tensor, factor: f32) -> Result<Self::Tensor>;
    /// Values clamped to ±`limit`.
    fn clamp(&self, x: Self::Tensor, limit: f32) -> Result<Self::Tensor>;
    /// `x + factor * y`.
    fn add(&self, x: Self::Tensor, y: &Self::Tensor, factor: f32) -> Result<Self::Tensor>;
    /// Each row of `x` times the sigmoid of its `gate` `[rows, 1]`.
    fn gate_rows(&self, x: Self::Tensor, gate: &Self::Tensor) -> Result<Self::Tensor>;
    /// A dense network.
    fn ffn(&self, ffn: &Self::Ffn, x: &Self::Tensor) -> Result<Self::Tensor>;
    /// Each row's experts, weighted and summed in the order of `routing`. An error if one is missing.
    fn experts(&self, experts: &Self::Experts, x: &Self::Tensor, routing: &Routing) -> Result<Self::Tensor>;

    /// Bytes of one block of 64 tokens over these layers.
    fn kv_block_bytes(&self, layers: &[KvLayout], format: KvFormat) -> usize;
    /// Makes a cache of `blocks` blocks.
    fn allocate_kv(&self, layers: &[KvLayout], format: KvFormat, blocks: usize) -> Result<Self::Kv>;
    /// Writes the batch's keys and values into the cache and attends. `q` `[rows, heads * k_dim]`, `k`
    /// `[rows, kv heads * k_dim]`, `v` `[rows, kv heads * v_dim]` (`None` if values are in keys); gives
    /// `[rows, heads * v_dim]`.
    #[allow(clippy::too_many_arguments, reason = "the tensors of attention")]
    fn attend(
        &self,
        kv: &mut Self::Kv,
        layer: usize,
        call: &AttentionCall,
        sequences: &[AttentionSequence<'_>],
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: Option<&Self::Tensor>,
    ) -> Result<Self::Tensor>;
    /// A block's bytes.
    fn export_block(&self, kv: &Self::Kv, block: usize) -> Result<Vec<u8>>;
    /// Fills a block; `bytes` has the right length.
    fn import_block(&self, kv: &mut Self::Kv, block: usize, bytes: &[u8]) -> Result<()>;

    /// An error of this backend.
    fn error(&self, reason: impl Into<String>) -> Error {
        Error::Backend { backend: self.name(), reason: reason.into() }
    }
}
