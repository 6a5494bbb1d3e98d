//! candle: the CPU by default, a GPU with the cargo features `cuda` or `metal`.
//!
//! Activations and arithmetic are f32. Weights are f32 on the CPU (q8 and q4 with the rounding that the packed
//! formats bring) and may stay bf16 on a GPU. The KV cache is f32 or bf16, in blocks as everywhere.
use super::{AttentionCall, AttentionSequence, Backend, FfnMatrices, KvLayout, Loader, Matrix};
use crate::spec::{Activation, Norm, NormKind};
use crate::{Error, Result};
use candle_core::{D, DType, Device, Tensor};
use moesaic_types::{BLOCK_TOKENS, KvFormat, Routing, WeightFormat};
use std::collections::BTreeMap;

/// Query rows whose scores are in memory at a time.
const QUERY_TILE: usize = 128;

/// The candle backend on one device.
pub struct CandleBackend {
    device: Device,
}

/// `y = x Wᵀ + bias`.
#[derive(Clone)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

/// A norm's weights.
pub struct NormWeights {
    norm: Norm,
    weight: Tensor,
    bias: Option<Tensor>,
}

/// A feed-forward network.
#[derive(Clone)]
pub struct Ffn {
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
    activation: Activation,
}

/// Cosines and sines `[rows, 1, pairs]`.
pub struct Rotation {
    cos: Tensor,
    sin: Tensor,
    pairs: usize,
    interleaved: bool,
}

/// Keys and values `[blocks * 64, heads * width]` of each layer.
pub struct Kv {
    layers: Vec<KvTensors>,
}

struct KvTensors {
    layout: KvLayout,
    k: Tensor,
    v: Option<Tensor>,
}

/// The rows' experts of one rank: which row, where its output is, and its weight.
#[derive(Default)]
struct Rank {
    rows: Vec<u32>,
    sources: Vec<u32>,
    weights: Vec<f32>,
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Backend { backend: "candle", reason: error.to_string() }
    }
}

impl CandleBackend {
    /// The device that this build is for: the CUDA device with the most free memory, the first Metal device, else the CPU with so many threads (of the
    /// first backend of a process; candle's threads are the process's).
    pub fn new(threads: usize) -> Result<Self> {
        // an error means that they are set already
        let _first_counts = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
        #[cfg(feature = "cuda")]
        let device = {
            let chosen = super::cuda::roomiest()?;
            tracing::info!(device = ?chosen, "run on a CUDA device");
            Device::new_cuda(chosen.ordinal)?
        };
        #[cfg(all(feature = "metal", not(feature = "cuda")))]
        let device = Device::new_metal(0)?;
        #[cfg(not(any(feature = "cuda", feature = "metal")))]
        let device = Device::Cpu;
        Ok(Self { device })
    }

    fn tensor(&self, matrix: Matrix<'_>) -> Result<Tensor> {
        let (rows, cols, format) = (matrix.rows, matrix.cols, matrix.format);
        let tensor = Tensor::from_vec(matrix.to_f32()?, (rows, cols), &self.device)?;
        let keep_half = format == WeightFormat::Bf16 && !self.device.is_cpu();
        Ok(if keep_half { tensor.to_dtype(DType::BF16)? } else { tensor })
    }

    fn vector(&self, values: Vec<f32>) -> Result<Tensor> {
        let len = values.len();
        Ok(Tensor::from_vec(values, len, &self.device)?)
    }

    fn indices(&self, values: Vec<u32>) -> Result<Tensor> {
        let len = values.len();
        Ok(Tensor::from_vec(values, len, &self.device)?)
    }

    fn apply(&self, ffn: &Ffn, x: &Tensor) -> Result<Tensor> {
        let up = self.linear(&ffn.up, x)?;
        let inner = match &ffn.gate {
            Some(gate) => gated(ffn.activation, &self.linear(gate, x)?, &up)?,
            None => activate(ffn.activation, &up)?,
        };
        self.linear(&ffn.down, &inner)
    }

    /// One sequence's attention over rows `q` `[rows, heads * k_dim]` that start at position `start`.
    fn attend_tile(
        &self,
        kv: &KvTensors,
        call: &AttentionCall,
        blocks: &[u32],
        start: usize,
        q: &Tensor,
    ) -> Result<Tensor> {
        let KvLayout { heads: kv_heads, k_dim, v_dim, .. } = kv.layout;
        let (rows, group) = (q.dim(0)?, call.heads / kv_heads);
        let end = start + rows;
        let first = call.window.map_or(0, |window| (start + 1).saturating_sub(window));
        let len = end - first;
        let slot = |position: usize| blocks[position / BLOCK_TOKENS] * BLOCK_TOKENS as u32;
        let slots = (first..end).map(|position| slot(position) + (position % BLOCK_TOKENS) as u32).collect();
        let slots = self.indices(slots)?;
        let by_head = |pool: &Tensor, width: usize| -> Result<Tensor> {
            let rows = pool.index_select(&slots, 0)?.to_dtype(DType::F32)?;
            Ok(rows.reshape((len, kv_heads, width))?.transpose(0, 1)?.contiguous()?)
        };
        let k = by_head(&kv.k, k_dim)?;
        let v = match &kv.v {
            Some(v) => by_head(v, v_dim)?,
            None => k.narrow(2, 0, v_dim)?.contiguous()?,
        };
        let q = q.reshape((rows, kv_heads, group, k_dim))?.permute((1, 2, 0, 3))?.contiguous()?;
        let q = q.reshape((kv_heads, group * rows, k_dim))?;
        let scores = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? * f64::from(call.scale))?;
        let mut scores = scores.reshape((call.heads, rows, len))?;
        if let Some(slopes) = &call.alibi {
            let distance = (0..rows).flat_map(|row| (first..end).map(move |key| key as f32 - (start + row) as f32));
            let distance = Tensor::from_vec(distance.collect::<Vec<f32>>(), (1, rows, len), &self.device)?;
            let slopes = Tensor::from_vec(slopes.to_vec(), (call.heads, 1, 1), &self.device)?;
            scores = scores.broadcast_add(&slopes.broadcast_mul(&distance)?)?;
        }
        let window = call.window.unwrap_or(usize::MAX);
        let visible = |row: usize, key: usize| key <= start + row && start + row - key < window;
        let mask = (0..rows)
            .flat_map(|row| (first..end).map(move |key| if visible(row, key) { 0.0 } else { f32::NEG_INFINITY }));
        let mask = Tensor::from_vec(mask.collect::<Vec<f32>>(), (1, rows, len), &self.device)?;
        let scores = scores.broadcast_add(&mask)?;
        let mut max = scores.max_keepdim(D::Minus1)?;
        let sinks = match &call.sinks {
            Some(sinks) => {
                let sinks = Tensor::from_vec(sinks.to_vec(), (call.heads, 1, 1), &self.device)?;
                let sinks = sinks.broadcast_as((call.heads, rows, 1))?.contiguous()?;
                max = max.maximum(&sinks)?;
                Some(sinks)
            }
            None => None,
        };
        let weights = scores.broadcast_sub(&max)?.exp()?;
        let mut sum = weights.sum_keepdim(D::Minus1)?;
        if let Some(sinks) = sinks {
            sum = (sum + (sinks - max)?.exp()?)?;
        }
        let weights = weights.broadcast_div(&sum)?.reshape((kv_heads, group * rows, len))?;
        let output = weights.matmul(&v)?.reshape((kv_heads, group, rows, v_dim))?.permute((2, 0, 1, 3))?;
        Ok(output.contiguous()?.reshape((rows, call.heads * v_dim))?)
    }
}

fn activate(activation: Activation, x: &Tensor) -> Result<Tensor> {
    Ok(match activation {
        Activation::Silu | Activation::ClampedSwiGlu { .. } => x.silu()?,
        Activation::Gelu => x.gelu_erf()?,
        Activation::GeluTanh => x.gelu()?,
        Activation::Relu => x.relu()?,
    })
}

fn gated(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let Activation::ClampedSwiGlu { alpha, limit } = activation else {
        return Ok((activate(activation, gate)? * up)?);
    };
    let (alpha, limit) = (f64::from(alpha), f64::from(limit));
    let gate = gate.minimum(limit)?;
    let up = up.clamp(-limit, limit)?;
    let swish = (&gate * sigmoid(&(&gate * alpha)?)?)?;
    Ok((swish * (up + 1.0)?)?)
}

fn sigmoid(x: &Tensor) -> Result<Tensor> {
    Ok((x.neg()?.exp()? + 1.0)?.recip()?)
}

impl Loader for CandleBackend {
    type Linear = Linear;
    type Embedding = Tensor;
    type Norm = NormWeights;
    type Ffn = Ffn;

    fn load_linear(&self, matrix: Matrix<'_>, bias: Option<Vec<f32>>) -> Result<Linear> {
        let bias = bias.map(|bias| self.vector(bias)).transpose()?;
        Ok(Linear { weight: self.tensor(matrix)?, bias })
    }

    fn load_embedding(&self, matrix: Matrix<'_>) -> Result<Tensor> {
        self.tensor(matrix)
    }

    fn tie(&self, embedding: &Tensor) -> Result<Linear> {
        Ok(Linear { weight: embedding.clone(), bias: None })
    }

    fn load_norm(&self, norm: Norm, weight: Vec<f32>, bias: Option<Vec<f32>>) -> Result<NormWeights> {
        let bias = bias.map(|bias| self.vector(bias)).transpose()?;
        Ok(NormWeights { norm, weight: self.vector(weight)?, bias })
    }

    fn load_ffn(&self, matrices: FfnMatrices<'_>) -> Result<Ffn> {
        Ok(Ffn {
            gate: matrices.gate.map(|gate| self.load_linear(gate, matrices.gate_bias)).transpose()?,
            up: self.load_linear(matrices.up, matrices.up_bias)?,
            down: self.load_linear(matrices.down, matrices.down_bias)?,
            activation: matrices.activation,
        })
    }
}

impl Backend for CandleBackend {
    type Tensor = Tensor;
    type Experts = Vec<Option<Ffn>>;
    type Rotation = Rotation;
    type Kv = Kv;

    fn name(&self) -> &'static str {
        "candle"
    }

    fn gather_experts(&self, experts: Vec<Option<Ffn>>, _hidden: usize) -> Result<Vec<Option<Ffn>>> {
        Ok(experts)
    }

    fn to_device(&self, values: Vec<f32>, cols: usize) -> Result<Tensor> {
        let rows = values.len() / cols;
        Ok(Tensor::from_vec(values, (rows, cols), &self.device)?)
    }

    fn to_host(&self, x: &Tensor) -> Result<Vec<f32>> {
        Ok(x.flatten_all()?.to_vec1()?)
    }

    fn embed(&self, embedding: &Tensor, tokens: &[u32]) -> Result<Tensor> {
        Ok(embedding.index_select(&self.indices(tokens.to_vec())?, 0)?.to_dtype(DType::F32)?)
    }

    fn norm(&self, weights: &NormWeights, x: &Tensor) -> Result<Tensor> {
        let width = weights.weight.dim(0)?;
        let mut runs = x.reshape(((), width))?;
        if weights.norm.kind == NormKind::Layer {
            runs = runs.broadcast_sub(&runs.mean_keepdim(D::Minus1)?)?;
        }
        let variance = runs.sqr()?.mean_keepdim(D::Minus1)?;
        let deviation = (variance + f64::from(weights.norm.eps))?.sqrt()?;
        let mut normed = runs.broadcast_div(&deviation)?.broadcast_mul(&weights.weight)?;
        if let Some(bias) = &weights.bias {
            normed = normed.broadcast_add(bias)?;
        }
        Ok(normed.reshape(x.dims())?)
    }

    fn linear(&self, linear: &Linear, x: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&linear.weight.to_dtype(DType::F32)?.t()?)?;
        Ok(match &linear.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }

    fn linear_by_head(&self, linears: &[Linear], x: &Tensor) -> Result<Tensor> {
        let width = x.dim(1)? / linears.len();
        let head = |(head, linear)| self.linear(linear, &x.narrow(1, head * width, width)?.contiguous()?);
        let heads = linears.iter().enumerate().map(head).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&heads, 1)?)
    }

    fn rotation(&self, cos: &[f32], sin: &[f32], pairs: usize, interleaved: bool) -> Result<Rotation> {
        let shape = (cos.len() / pairs, 1, pairs);
        let cos = Tensor::from_slice(cos, shape, &self.device)?;
        let sin = Tensor::from_slice(sin, shape, &self.device)?;
        Ok(Rotation { cos, sin, pairs, interleaved })
    }

    fn rotate(&self, x: Tensor, head_dim: usize, offset: usize, rotation: &Rotation) -> Result<Tensor> {
        let (rows, cols) = x.dims2()?;
        let (heads, pairs) = (cols / head_dim, rotation.pairs);
        let x = x.reshape((rows, heads, head_dim))?;
        let turning = x.narrow(2, offset, 2 * pairs)?.contiguous()?;
        let (a, b) = if rotation.interleaved {
            let pairs = turning.reshape((rows, heads, pairs, 2))?;
            (pairs.narrow(3, 0, 1)?.squeeze(3)?, pairs.narrow(3, 1, 1)?.squeeze(3)?)
        } else {
            (turning.narrow(2, 0, pairs)?, turning.narrow(2, pairs, pairs)?)
        };
        let (cos, sin) = (&rotation.cos, &rotation.sin);
        let turned_a = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
        let turned_b = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
        let turned = if rotation.interleaved {
            Tensor::stack(&[turned_a, turned_b], 3)?.reshape((rows, heads, 2 * pairs))?
        } else {
            Tensor::cat(&[turned_a, turned_b], 2)?
        };
        let after = offset + 2 * pairs;
        let parts = [x.narrow(2, 0, offset)?, turned, x.narrow(2, after, head_dim - after)?];
        let parts: Vec<_> = parts.into_iter().filter(|part| part.elem_count() > 0).collect();
        Ok(Tensor::cat(&parts, 2)?.reshape((rows, cols))?)
    }

    fn columns(&self, x: &Tensor, heads: usize, start: usize, width: usize) -> Result<Tensor> {
        let (rows, cols) = x.dims2()?;
        let part = x.reshape((rows, heads, cols / heads))?.narrow(2, start, width)?;
        Ok(part.contiguous()?.reshape((rows, heads * width))?)
    }

    fn join(&self, a: &Tensor, b: &Tensor, heads: usize) -> Result<Tensor> {
        let rows = a.dim(0)?;
        let by_head = |x: &Tensor| x.reshape((rows, heads, x.dim(1)? / heads));
        let joined = Tensor::cat(&[by_head(a)?, by_head(b)?], 2)?;
        Ok(joined.reshape((rows, a.dim(1)? + b.dim(1)?))?)
    }

    fn rows(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        Ok(x.index_select(&self.indices(rows.to_vec())?, 0)?)
    }

    fn scale(&self, x: Tensor, factor: f32) -> Result<Tensor> {
        Ok((x * f64::from(factor))?)
    }

    fn clamp(&self, x: Tensor, limit: f32) -> Result<Tensor> {
        Ok(x.clamp(-limit, limit)?)
    }

    fn add(&self, x: Tensor, y: &Tensor, factor: f32) -> Result<Tensor> {
        Ok(if factor == 1.0 { (x + y)? } else { (x + (y * f64::from(factor))?)? })
    }

    fn gate_rows(&self, x: Tensor, gate: &Tensor) -> Result<Tensor> {
        Ok(x.broadcast_mul(&sigmoid(gate)?)?)
    }

    fn ffn(&self, ffn: &Ffn, x: &Tensor) -> Result<Tensor> {
        self.apply(ffn, x)
    }

    fn experts(&self, experts: &Vec<Option<Ffn>>, x: &Tensor, routing: &Routing) -> Result<Tensor> {
        // Rows by expert; then each row's outputs are added in the gate's order, one rank at a time.
        let mut by_expert: BTreeMap<u32, Vec<(u32, usize, f32)>> = BTreeMap::new();
        for (row, ends) in routing.offsets.windows(2).enumerate() {
            for (rank, choice) in (ends[0] as usize..ends[1] as usize).enumerate() {
                let choices = by_expert.entry(routing.experts[choice]).or_default();
                choices.push((row as u32, rank, routing.weights[choice]));
            }
        }
        let mut outputs = Vec::with_capacity(by_expert.len());
        let mut ranks: BTreeMap<usize, Rank> = BTreeMap::new();
        let mut computed = 0;
        for (expert, choices) in by_expert {
            let held = experts.get(expert as usize).and_then(Option::as_ref);
            let ffn = held.ok_or_else(|| self.error(format!("expert {expert} is not held here")))?;
            let rows = self.indices(choices.iter().map(|choice| choice.0).collect())?;
            outputs.push(self.apply(ffn, &x.index_select(&rows, 0)?)?);
            for (row, rank, weight) in choices {
                let ranked = ranks.entry(rank).or_default();
                ranked.rows.push(row);
                ranked.sources.push(computed);
                ranked.weights.push(weight);
                computed += 1;
            }
        }
        let mut sum = x.zeros_like()?;
        if outputs.is_empty() {
            return Ok(sum);
        }
        let outputs = Tensor::cat(&outputs, 0)?;
        for Rank { rows, sources, weights } in ranks.into_values() {
            let count = rows.len();
            let weights = Tensor::from_vec(weights, (count, 1), &self.device)?;
            let chosen = outputs.index_select(&self.indices(sources)?, 0)?.broadcast_mul(&weights)?;
            sum = sum.index_add(&self.indices(rows)?, &chosen, 0)?;
        }
        Ok(sum)
    }

    fn kv_block_bytes(&self, layers: &[KvLayout], format: KvFormat) -> usize {
        let element = if format == KvFormat::F32 { 4 } else { 2 };
        let width = |layout: &KvLayout| layout.heads * (layout.k_dim + if layout.v_in_k { 0 } else { layout.v_dim });
        layers.iter().map(|layout| BLOCK_TOKENS * width(layout) * element).sum()
    }

    fn allocate_kv(&self, layers: &[KvLayout], format: KvFormat, blocks: usize) -> Result<Kv> {
        let dtype = match format {
            KvFormat::F32 => DType::F32,
            KvFormat::Bf16 => DType::BF16,
            KvFormat::Int8 => return Err(self.error("a KV cache in int8 is not supported; use f32 or bf16")),
        };
        // candle aborts where there is no memory: ask first, all layers at once
        let len = self.kv_block_bytes(layers, format).checked_mul(blocks);
        let there = len.is_some_and(|len| !self.device.is_cpu() || Vec::<u8>::new().try_reserve_exact(len).is_ok());
        if !there {
            return Err(self.error(format!("{blocks} kv blocks cannot be allocated")));
        }
        let make = |layout: &KvLayout| -> Result<KvTensors> {
            let pool = |width| Tensor::zeros((blocks * BLOCK_TOKENS, layout.heads * width), dtype, &self.device);
            let v = if layout.v_in_k { None } else { Some(pool(layout.v_dim)?) };
            Ok(KvTensors { layout: *layout, k: pool(layout.k_dim)?, v })
        };
        Ok(Kv { layers: layers.iter().map(make).collect::<Result<_>>()? })
    }

    fn attend(
        &self,
        kv: &mut Kv,
        layer: usize,
        call: &AttentionCall,
        sequences: &[AttentionSequence<'_>],
        q: &Tensor,
        k: &Tensor,
        v: Option<&Tensor>,
    ) -> Result<Tensor> {
        let kv = &kv.layers[layer];
        let mut row = 0;
        for sequence in sequences {
            let end = sequence.start + sequence.queries;
            let mut position = sequence.start;
            while position < end {
                let (block, slot) = (sequence.blocks[position / BLOCK_TOKENS] as usize, position % BLOCK_TOKENS);
                let count = (BLOCK_TOKENS - slot).min(end - position);
                let write = |pool: &Tensor, values: &Tensor| -> Result<()> {
                    let values = values.narrow(0, row, count)?.to_dtype(pool.dtype())?.contiguous()?;
                    Ok(pool.slice_set(&values, 0, block * BLOCK_TOKENS + slot)?)
                };
                write(&kv.k, k)?;
                if let (Some(pool), Some(v)) = (&kv.v, v) {
                    write(pool, v)?;
                }
                row += count;
                position += count;
            }
        }
        let mut outputs = Vec::with_capacity(sequences.len());
        let mut row = 0;
        for sequence in sequences {
            for first in (0..sequence.queries).step_by(QUERY_TILE) {
                let count = QUERY_TILE.min(sequence.queries - first);
                let q = q.narrow(0, row + first, count)?.contiguous()?;
                outputs.push(self.attend_tile(kv, call, sequence.blocks, sequence.start + first, &q)?);
            }
            row += sequence.queries;
        }
        Ok(Tensor::cat(&outputs, 0)?)
    }

    fn export_block(&self, kv: &Kv, block: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for layer in &kv.layers {
            for pool in std::iter::once(&layer.k).chain(&layer.v) {
                let rows = pool.narrow(0, block * BLOCK_TOKENS, BLOCK_TOKENS)?.flatten_all()?;
                match pool.dtype() {
                    DType::BF16 => bytes.extend_from_slice(bytemuck::cast_slice(&rows.to_vec1::<half::bf16>()?)),
                    _ => bytes.extend_from_slice(bytemuck::cast_slice(&rows.to_vec1::<f32>()?)),
                }
            }
        }
        Ok(bytes)
    }

    fn import_block(&self, kv: &mut Kv, block: usize, bytes: &[u8]) -> Result<()> {
        let mut rest = bytes;
        for layer in &kv.layers {
            for pool in std::iter::once(&layer.k).chain(&layer.v) {
                let shape = (BLOCK_TOKENS, pool.dim(1)?);
                let (part, after) = rest.split_at(BLOCK_TOKENS * shape.1 * pool.dtype().size_in_bytes());
                rest = after;
                let values = match pool.dtype() {
                    DType::BF16 => {
                        let pairs = part.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]));
                        Tensor::from_vec(pairs.collect::<Vec<_>>(), shape, &self.device)?
                    }
                    _ => {
                        let quads = part.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                        Tensor::from_vec(quads.collect::<Vec<_>>(), shape, &self.device)?
                    }
                };
                pool.slice_set(&values, 0, block * BLOCK_TOKENS)?;
            }
        }
        Ok(())
    }
}
