//! The CPU kernels of `moesaic-kernels`.
//!
//! Deterministic: every operation computes a row in an order that does not depend on the other rows, so a request's
//! logits are bit-identical whatever the batch and the chunking.
mod buffers;

use super::{Activations, AttentionCall, AttentionSequence, Backend, FfnMatrices, KvLayout, Loader, Matrix};
use crate::Result;
use crate::spec::{Activation, Norm, NormKind};
use buffers::Values;
use moesaic_kernels::{self as kernels, ExpertWeights, Kernels, KvLayer, KvShape, PackedMatrix, Product, elementwise};
use moesaic_types::{KvFormat, Routing};
use std::borrow::Cow;
use std::sync::Arc;

/// The native backend with its threads.
pub struct NativeBackend {
    kernels: Kernels,
}

/// Rows of f32 in memory, which is kept for later ones.
#[derive(Debug)]
pub struct Rows {
    /// Row-major.
    values: Values,
    /// Columns.
    cols: usize,
}

impl Rows {
    /// Rows of any content.
    fn new(rows: usize, cols: usize) -> Self {
        Self { values: Values::new(rows * cols), cols }
    }

    /// How many rows.
    fn count(&self) -> usize {
        self.values.len() / self.cols.max(1)
    }
}

/// `y = x Wᵀ + bias`.
#[derive(Clone)]
pub struct Linear {
    weight: Arc<PackedMatrix>,
    bias: Option<Vec<f32>>,
}

/// A norm's weights.
pub struct NormWeights {
    norm: Norm,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
}

/// A feed-forward network.
#[derive(Clone)]
pub enum Ffn {
    /// `down(act(gate(x)) * up(x))`.
    Gated(Arc<ExpertWeights>, Activation),
    /// `down(act(up(x)))`.
    Plain {
        /// Up.
        up: Linear,
        /// Down.
        down: Linear,
        /// The nonlinearity.
        activation: Activation,
    },
}

/// A layer's experts.
pub struct Experts {
    weights: Vec<Option<Arc<ExpertWeights>>>,
    activation: Activation,
    hidden: usize,
}

/// Cosines and sines `[rows, pairs]`.
pub struct Rotation {
    cos: Values,
    sin: Values,
    pairs: usize,
    interleaved: bool,
}

/// The KV cache of all layers.
pub struct Kv {
    layers: Vec<KvLayer>,
    layouts: Vec<KvLayout>,
}

impl NativeBackend {
    /// Kernels on `threads` threads, with the best instructions that the CPU has.
    pub fn new(threads: usize, activations: Activations) -> Self {
        let format = match activations {
            Activations::Int8 => kernels::ActivationFormat::Int8,
            Activations::F32 => kernels::ActivationFormat::F32,
        };
        Self { kernels: Kernels::new(threads.max(1)).with_activations(format) }
    }
}

fn kernel_activation(activation: Activation) -> kernels::Activation {
    match activation {
        Activation::Silu => kernels::Activation::Silu,
        Activation::Gelu => kernels::Activation::Gelu,
        Activation::GeluTanh => kernels::Activation::GeluTanh,
        Activation::Relu => kernels::Activation::Relu,
        Activation::ClampedSwiGlu { alpha, limit } => kernels::Activation::ClampedSwiGlu { alpha, limit },
    }
}

fn kv_shape(layout: &KvLayout, format: KvFormat) -> KvShape {
    let format = match format {
        KvFormat::F32 => kernels::KvFormat::F32,
        KvFormat::Bf16 => kernels::KvFormat::Bf16,
        KvFormat::Int8 => kernels::KvFormat::Int8,
    };
    KvShape { kv_heads: layout.heads, k_dim: layout.k_dim, v_dim: layout.v_dim, v_in_k: layout.v_in_k, format }
}

impl Loader for NativeBackend {
    type Linear = Linear;
    type Embedding = Arc<PackedMatrix>;
    type Norm = NormWeights;
    type Ffn = Ffn;

    fn load_linear(&self, matrix: Matrix<'_>, bias: Option<Vec<f32>>) -> Result<Linear> {
        Ok(Linear { weight: Arc::new(matrix.pack()?), bias })
    }

    fn load_embedding(&self, matrix: Matrix<'_>) -> Result<Self::Embedding> {
        Ok(Arc::new(matrix.pack()?))
    }

    fn tie(&self, embedding: &Self::Embedding) -> Result<Linear> {
        Ok(Linear { weight: embedding.clone(), bias: None })
    }

    fn load_norm(&self, norm: Norm, weight: Vec<f32>, bias: Option<Vec<f32>>) -> Result<NormWeights> {
        Ok(NormWeights { norm, weight, bias })
    }

    fn load_ffn(&self, matrices: FfnMatrices<'_>) -> Result<Ffn> {
        let activation = matrices.activation;
        let Some(gate) = matrices.gate else {
            let up = self.load_linear(matrices.up, matrices.up_bias)?;
            let down = self.load_linear(matrices.down, matrices.down_bias)?;
            return Ok(Ffn::Plain { up, down, activation });
        };
        let weights = ExpertWeights {
            gate: gate.pack()?,
            up: matrices.up.pack()?,
            down: matrices.down.pack()?,
            gate_bias: matrices.gate_bias,
            up_bias: matrices.up_bias,
            down_bias: matrices.down_bias,
        };
        Ok(Ffn::Gated(Arc::new(weights), activation))
    }
}

impl Backend for NativeBackend {
    type Tensor = Rows;
    type Experts = Experts;
    type Rotation = Rotation;
    type Kv = Kv;

    fn name(&self) -> &'static str {
        "native"
    }

    fn advanced(&self) -> u64 {
        self.kernels.advanced()
    }

    fn gather_experts(&self, experts: Vec<Option<Ffn>>, hidden: usize) -> Result<Experts> {
        let mut activation = Activation::Silu;
        let weights = experts.into_iter().map(|expert| match expert {
            None => Ok(None),
            Some(Ffn::Gated(weights, own)) => {
                activation = own;
                Ok(Some(weights))
            }
            Some(Ffn::Plain { .. }) => Err(self.error("experts without a gate are not supported")),
        });
        let weights = weights.collect::<Result<_>>()?;
        Ok(Experts { weights, activation, hidden })
    }

    fn to_device(&self, values: Vec<f32>, cols: usize) -> Result<Rows> {
        Ok(Rows { values: values.into(), cols })
    }

    fn to_host(&self, x: &Rows) -> Result<Vec<f32>> {
        Ok(x.values.to_vec())
    }

    fn on_host<'a>(&self, x: &'a Rows) -> Result<Cow<'a, [f32]>> {
        Ok(Cow::Borrowed(&x.values[..]))
    }

    fn embed(&self, embedding: &Self::Embedding, tokens: &[u32]) -> Result<Rows> {
        let cols = embedding.cols();
        let mut out = Rows::new(tokens.len(), cols);
        self.kernels.by_rows(&mut out.values, cols, &|first, rows| {
            for (&token, row) in tokens[first..].iter().zip(rows.chunks_exact_mut(cols)) {
                embedding.dequantize_row(token as usize, row);
            }
        });
        Ok(out)
    }

    fn norm(&self, weights: &NormWeights, x: &Rows) -> Result<Rows> {
        let isa = self.kernels.isa();
        let mut out = Rows::new(x.count(), x.cols);
        let NormWeights { norm, weight, bias } = weights;
        self.kernels.by_rows(&mut out.values, x.cols, &|first, out| {
            let x = &x.values[first * x.cols..][..out.len()];
            match norm.kind {
                NormKind::Rms => elementwise::rms_norm(isa, x, weight, norm.eps, out),
                NormKind::Layer => elementwise::layer_norm(isa, x, weight, bias.as_deref(), norm.eps, out),
            }
        });
        Ok(out)
    }

    fn linear(&self, linear: &Linear, x: &Rows) -> Result<Rows> {
        let [out] = self.linears([linear], x)?;
        Ok(out)
    }

    fn linears<const N: usize>(&self, linears: [&Linear; N], x: &Rows) -> Result<[Rows; N]> {
        let mut all = linears.map(|linear| Rows::new(x.count(), linear.weight.rows()));
        let mut outs = all.iter_mut();
        let products = linears.map(|Linear { weight, bias }| {
            let out = &mut outs.next().expect("as many results as matrices").values;
            Product { weight, bias: bias.as_deref(), out }
        });
        self.kernels.linears(&x.values, x.count(), products);
        Ok(all)
    }

    fn expect(&self, linear: &Linear) {
        self.kernels.expect(&linear.weight);
    }

    fn linear_by_head(&self, linears: &[Linear], x: &Rows) -> Result<Rows> {
        let mut out = Rows::new(x.count(), linears.iter().map(|linear| linear.weight.rows()).sum());
        let heads = linears.iter().map(|Linear { weight, bias }| (&**weight, bias.as_deref()));
        self.kernels.linear_by_head(heads, &x.values, x.count(), &mut out.values);
        Ok(out)
    }

    fn rotation(&self, cos: &[f32], sin: &[f32], pairs: usize, interleaved: bool) -> Result<Rotation> {
        Ok(Rotation { cos: cos.into(), sin: sin.into(), pairs, interleaved })
    }

    fn rotate(&self, mut x: Rows, head_dim: usize, offset: usize, rotation: &Rotation) -> Result<Rows> {
        let (cols, pairs, isa) = (x.cols, rotation.pairs, self.kernels.isa());
        self.kernels.by_rows(&mut x.values, cols, &|first, rows| {
            let (cos, sin) = (&rotation.cos[first * pairs..], &rotation.sin[first * pairs..]);
            let angles = cos.chunks_exact(pairs).zip(sin.chunks_exact(pairs));
            for (row, (cos, sin)) in rows.chunks_exact_mut(cols).zip(angles) {
                for head in row.chunks_exact_mut(head_dim) {
                    elementwise::rotate(isa, &mut head[offset..offset + 2 * pairs], cos, sin, rotation.interleaved);
                }
            }
        });
        Ok(x)
    }

    fn columns(&self, x: &Rows, heads: usize, start: usize, width: usize) -> Result<Rows> {
        let head_dim = x.cols / heads;
        let mut out = Rows::new(x.count(), heads * width);
        for (out, head) in out.values.chunks_exact_mut(width).zip(x.values.chunks_exact(head_dim)) {
            out.copy_from_slice(&head[start..][..width]);
        }
        Ok(out)
    }

    fn join(&self, a: &Rows, b: &Rows, heads: usize) -> Result<Rows> {
        let mut out = Rows::new(a.count(), a.cols + b.cols);
        let (a_width, b_width) = (a.cols / heads, b.cols / heads);
        let parts = a.values.chunks_exact(a_width).zip(b.values.chunks_exact(b_width));
        for (out, (a, b)) in out.values.chunks_exact_mut(a_width + b_width).zip(parts) {
            let (first, second) = out.split_at_mut(a_width);
            first.copy_from_slice(a);
            second.copy_from_slice(b);
        }
        Ok(out)
    }

    fn rows(&self, x: &Rows, rows: &[u32]) -> Result<Rows> {
        let mut out = Rows::new(rows.len(), x.cols);
        for (out, row) in out.values.chunks_exact_mut(x.cols).zip(rows) {
            out.copy_from_slice(&x.values[*row as usize * x.cols..][..x.cols]);
        }
        Ok(out)
    }

    fn scale(&self, mut x: Rows, factor: f32) -> Result<Rows> {
        let cols = x.cols;
        self.kernels.by_rows(&mut x.values, cols, &|_, rows| rows.iter_mut().for_each(|x| *x *= factor));
        Ok(x)
    }

    fn clamp(&self, mut x: Rows, limit: f32) -> Result<Rows> {
        let cols = x.cols;
        self.kernels.by_rows(&mut x.values, cols, &|_, rows| rows.iter_mut().for_each(|x| *x = x.clamp(-limit, limit)));
        Ok(x)
    }

    fn add(&self, mut x: Rows, y: &Rows, factor: f32) -> Result<Rows> {
        let (cols, isa) = (x.cols, self.kernels.isa());
        self.kernels.by_rows(&mut x.values, cols, &|first, rows| {
            elementwise::add(isa, rows, &y.values[first * cols..][..rows.len()], factor);
        });
        Ok(x)
    }

    fn gate_rows(&self, mut x: Rows, gate: &Rows) -> Result<Rows> {
        let cols = x.cols;
        self.kernels.by_rows(&mut x.values, cols, &|first, rows| {
            for (row, gate) in rows.chunks_exact_mut(cols).zip(&gate.values[first..]) {
                let factor = 1.0 / (1.0 + (-gate).exp());
                row.iter_mut().for_each(|x| *x *= factor);
            }
        });
        Ok(x)
    }

    fn ffn(&self, ffn: &Ffn, x: &Rows) -> Result<Rows> {
        match ffn {
            Ffn::Gated(weights, activation) => {
                let mut out = Rows::new(x.count(), weights.down.rows());
                self.kernels.gated_ffn(weights, kernel_activation(*activation), &x.values, x.count(), &mut out.values);
                Ok(out)
            }
            Ffn::Plain { up, down, activation } => {
                let mut inner = self.linear(up, x)?;
                let (cols, activation) = (inner.cols, kernel_activation(*activation));
                self.kernels.by_rows(&mut inner.values, cols, &|_, rows| {
                    rows.iter_mut().for_each(|x| *x = activation.apply(*x));
                });
                self.linear(down, &inner)
            }
        }
    }

    fn experts(&self, experts: &Experts, x: &Rows, routing: &Routing) -> Result<Rows> {
        let mut out = Rows::new(x.count(), x.cols);
        self.kernels
            .moe(
                &experts.weights,
                kernel_activation(experts.activation),
                &x.values,
                experts.hidden,
                &routing.offsets,
                &routing.experts,
                &routing.weights,
                &mut out.values,
            )
            .map_err(|error| self.error(error.to_string()))?;
        Ok(out)
    }

    fn kv_block_bytes(&self, layers: &[KvLayout], format: KvFormat) -> usize {
        layers.iter().map(|layout| kv_shape(layout, format).block_len()).sum()
    }

    fn allocate_kv(&self, layers: &[KvLayout], format: KvFormat, blocks: usize) -> Result<Kv> {
        let layer = |layout: &KvLayout| {
            KvLayer::new(kv_shape(layout, format), blocks).map_err(|error| self.error(error.to_string()))
        };
        Ok(Kv { layers: layers.iter().map(layer).collect::<Result<_>>()?, layouts: layers.to_vec() })
    }

    fn attend(
        &self,
        kv: &mut Kv,
        layer: usize,
        call: &AttentionCall,
        sequences: &[AttentionSequence<'_>],
        q: &Rows,
        k: &Rows,
        v: Option<&Rows>,
    ) -> Result<Rows> {
        let layout = kv.layouts[layer];
        let cache = &mut kv.layers[layer];
        let call = kernels::AttentionCall {
            heads: call.heads,
            scale: call.scale,
            window: call.window,
            sinks: call.sinks.as_deref(),
            alibi: call.alibi.as_deref(),
        };
        self.kernels.write_kv(cache, sequences, &k.values, v.map_or(&[][..], |v| &v.values));
        let mut out = Rows::new(q.count(), call.heads * layout.v_dim);
        self.kernels.attention(cache, &call, sequences, &q.values, &mut out.values);
        Ok(out)
    }

    fn export_block(&self, kv: &Kv, block: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for layer in &kv.layers {
            layer.export(block as u32, &mut bytes);
        }
        Ok(bytes)
    }

    fn import_block(&self, kv: &mut Kv, block: usize, bytes: &[u8]) -> Result<()> {
        let mut rest = bytes;
        for layer in &mut kv.layers {
            let (part, after) = rest.split_at(layer.block_len());
            layer.import(block as u32, part).map_err(|error| self.error(error.to_string()))?;
            rest = after;
        }
        Ok(())
    }
}
