//! One layer's weights on a backend, and how it runs.
use super::laps::Laps;
use super::weights::{Role, Weights};
use crate::Result;
use crate::backend::{AttentionCall, AttentionSequence, Backend, Loader};
use crate::expert_pool::{ExpertPool, Ticket};
use crate::runner::StepPart;
use crate::spec::names::{QkvNames, at_layer};
use crate::spec::{Attention, Ffn, Gqa, LayerSpec, Mla, Moe, Norm, NormKind, Position, QkNorm, Rope, alibi_slopes};
use moesaic_types::Routing;

/// A layer's weights, but for its experts.
pub(super) struct Layer<B: Loader> {
    attention_norm: B::Norm,
    projections: Projections<B>,
    call: AttentionCall,
    /// Index into the decoder's distinct rotations.
    rope: Option<usize>,
    ffn_norm: B::Norm,
    ffn: FfnWeights<B>,
}

enum Projections<B: Loader> {
    Gqa { qkv: [B::Linear; 3], qk_norm: Option<[B::Norm; 2]>, output: B::Linear },
    Mla(Box<MlaWeights<B>>),
}

struct MlaWeights<B: Loader> {
    /// Down projection and norm of the query's latent.
    q_latent: Option<(B::Linear, B::Norm)>,
    q: B::Linear,
    kv_down: B::Linear,
    kv_norm: B::Norm,
    /// Per head: from a query's part without position to the latent.
    absorb_k: Vec<B::Linear>,
    /// Per head: from the attended latent to a value.
    expand_v: Vec<B::Linear>,
    output: B::Linear,
}

enum FfnWeights<B: Loader> {
    Dense(B::Ffn),
    Moe { gate: B::Linear, choice_bias: Option<Vec<f32>>, shared: Option<(B::Ffn, Option<B::Linear>)> },
}

/// What a step's layers share.
pub(super) struct Step<'a, B: Backend> {
    pub(super) backend: &'a B,
    pub(super) pool: &'a dyn ExpertPool<B>,
    pub(super) sequences: &'a [AttentionSequence<'a>],
    pub(super) rotations: &'a [B::Rotation],
    pub(super) kv: &'a mut B::Kv,
    /// Index of the layer whose keys and values are the first in `kv`.
    pub(super) first: usize,
    pub(super) laps: &'a mut Laps,
    /// Takes the layer's routing, if it has one.
    pub(super) routing: &'a mut Routing,
}

pub(super) fn load_norm<B: Loader>(
    weights: &Weights<'_>,
    backend: &B,
    norm: Norm,
    name: &str,
    len: usize,
) -> Result<B::Norm> {
    let weight = weights.vector(&format!("{name}.weight"), len)?;
    let bias = weights.bias(name, len, norm.kind == NormKind::Layer)?;
    backend.load_norm(norm, weight, bias)
}

impl<B: Loader> Layer<B> {
    /// Loads layer `index`; adds its rotation to `ropes` unless an equal one is there.
    pub(super) fn load(weights: &Weights<'_>, backend: &B, index: usize, ropes: &mut Vec<Rope>) -> Result<Self> {
        let spec = weights.spec();
        let (names, layer) = (&spec.names, &spec.layers[index]);
        let norm = |norm, name| load_norm(weights, backend, norm, &at_layer(name, index), spec.hidden);
        let (projections, rope, sinks, alibi, window) = match &layer.attention {
            Attention::Gqa(gqa) => {
                let sinks = gqa.sinks.then(|| weights.vector(&at_layer(names.sinks, index), gqa.heads)).transpose()?;
                let (rope, alibi) = match &gqa.position {
                    Position::Rope(rope) => (Some(rope), None),
                    Position::Alibi => (None, Some(alibi_slopes(gqa.heads))),
                };
                (load_gqa(weights, backend, index, gqa)?, rope, sinks, alibi, gqa.window)
            }
            Attention::Mla(mla) => {
                let loaded = Box::new(load_mla(weights, backend, index, mla)?);
                (Projections::Mla(loaded), Some(&mla.rope), None, None, None)
            }
        };
        let rope = rope.map(|rope| {
            ropes.iter().position(|known| known == rope).unwrap_or_else(|| {
                ropes.push(rope.clone());
                ropes.len() - 1
            })
        });
        Ok(Self {
            attention_norm: norm(layer.attention_norm, names.attention_norm)?,
            projections,
            call: AttentionCall {
                heads: layer.attention.heads(),
                scale: layer.attention.scale(),
                window,
                sinks: sinks.map(Into::into),
                alibi: alibi.map(Into::into),
            },
            rope,
            ffn_norm: norm(layer.ffn_norm, names.ffn_norm)?,
            ffn: load_ffn(weights, backend, index)?,
        })
    }
}

impl<B: Backend> Layer<B> {
    /// Says that this layer is next.
    pub(super) fn expect(&self, backend: &B) {
        match &self.projections {
            Projections::Gqa { qkv: [q, ..], .. } => backend.expect(q),
            Projections::Mla(weights) => {
                backend.expect(weights.q_latent.as_ref().map_or(&weights.q, |(down, _)| down));
            }
        }
    }

    /// Runs the layer on the residual stream `x` up to the dispatch of its tokens to their experts.
    pub(super) fn begin(
        &self,
        step: &mut Step<'_, B>,
        index: usize,
        spec: &LayerSpec,
        x: B::Tensor,
    ) -> Result<Begun<B>> {
        let backend = step.backend;
        let normed = backend.norm(&self.attention_norm, &x)?;
        step.laps.end(StepPart::Elementwise);
        let attended = self.attend(step, index, spec, &normed)?;
        if let FfnWeights::Moe { gate, .. } = &self.ffn {
            backend.expect(gate);
        }
        let residual = if spec.residual_after_norm { normed } else { x };
        let x = backend.add(residual, &attended, spec.residual_scale)?;
        let normed = backend.norm(&self.ffn_norm, &x)?;
        step.laps.end(StepPart::Elementwise);
        let output = self.feed_forward(step, index, &spec.ffn, &normed)?;
        let residual = if spec.residual_after_norm { normed } else { x };
        Ok(Begun { residual, output, scale: spec.residual_scale })
    }

    fn attend(&self, step: &mut Step<'_, B>, index: usize, spec: &LayerSpec, x: &B::Tensor) -> Result<B::Tensor> {
        let backend = step.backend;
        let rotation = self.rope.map(|rope| &step.rotations[rope]);
        let rotate = |x: B::Tensor, head_dim: usize| match rotation {
            Some(rotation) => backend.rotate(x, head_dim, 0, rotation),
            None => Ok(x),
        };
        match (&self.projections, &spec.attention) {
            (Projections::Gqa { qkv, qk_norm, output }, Attention::Gqa(gqa)) => {
                let [mut q, mut k, mut v] = backend.linears(qkv.each_ref(), x)?;
                backend.expect(output);
                step.laps.end(StepPart::Projections);
                if let Some([q_norm, k_norm]) = qk_norm {
                    q = backend.norm(q_norm, &q)?;
                    k = backend.norm(k_norm, &k)?;
                }
                if let Some(limit) = gqa.clip {
                    [q, k, v] = [backend.clamp(q, limit)?, backend.clamp(k, limit)?, backend.clamp(v, limit)?];
                }
                let (q, k) = (rotate(q, gqa.head_dim)?, rotate(k, gqa.head_dim)?);
                step.laps.end(StepPart::Elementwise);
                let attended =
                    backend.attend(step.kv, index - step.first, &self.call, step.sequences, &q, &k, Some(&v))?;
                step.laps.end(StepPart::Attention);
                let output = backend.linear(output, &attended);
                step.laps.end(StepPart::Output);
                output
            }
            (Projections::Mla(weights), Attention::Mla(mla)) => {
                let q = match &weights.q_latent {
                    Some((down, norm)) => {
                        backend.linear(&weights.q, &backend.norm(norm, &backend.linear(down, x)?)?)?
                    }
                    None => backend.linear(&weights.q, x)?,
                };
                let q_nope = backend.columns(&q, mla.heads, 0, mla.nope_dim)?;
                let q_rope = rotate(backend.columns(&q, mla.heads, mla.nope_dim, mla.rope_dim)?, mla.rope_dim)?;
                let q = backend.join(&backend.linear_by_head(&weights.absorb_k, &q_nope)?, &q_rope, mla.heads)?;
                let kv = backend.linear(&weights.kv_down, x)?;
                let latent = backend.norm(&weights.kv_norm, &backend.columns(&kv, 1, 0, mla.kv_rank)?)?;
                let k_rope = rotate(backend.columns(&kv, 1, mla.kv_rank, mla.rope_dim)?, mla.rope_dim)?;
                let k = backend.join(&latent, &k_rope, 1)?;
                step.laps.end(StepPart::Projections);
                let attended = backend.attend(step.kv, index - step.first, &self.call, step.sequences, &q, &k, None)?;
                step.laps.end(StepPart::Attention);
                let output = backend.linear(&weights.output, &backend.linear_by_head(&weights.expand_v, &attended)?);
                step.laps.end(StepPart::Output);
                output
            }
            _ => unreachable!("a layer is loaded from the spec that it runs with"),
        }
    }

    fn feed_forward(&self, step: &mut Step<'_, B>, index: usize, spec: &Ffn, x: &B::Tensor) -> Result<Output<B>> {
        let backend = step.backend;
        match (&self.ffn, spec) {
            (FfnWeights::Moe { gate, choice_bias, shared }, Ffn::Moe(moe)) => {
                let scores = backend.linear(gate, x)?;
                moe.gate.route(&backend.on_host(&scores)?, moe.experts, choice_bias.as_deref(), step.routing);
                step.laps.end(StepPart::Router);
                let ticket = step.pool.dispatch(index, x, step.routing)?;
                // The shared expert runs while the others may be under way elsewhere.
                let shared = match shared {
                    Some((ffn, gate)) => {
                        let output = backend.ffn(ffn, x)?;
                        Some(match gate {
                            Some(gate) => backend.gate_rows(output, &backend.linear(gate, x)?)?,
                            None => output,
                        })
                    }
                    None => None,
                };
                step.laps.end(StepPart::Experts);
                Ok(Output::Experts { ticket, shared })
            }
            (FfnWeights::Dense(ffn), Ffn::Dense(_)) => {
                let output = backend.ffn(ffn, x)?;
                step.laps.end(StepPart::Experts);
                Ok(Output::Dense(output))
            }
            _ => unreachable!("a layer is loaded from the spec that it runs with"),
        }
    }
}

/// A layer whose experts may be under way.
pub(super) struct Begun<B: Backend> {
    residual: B::Tensor,
    output: Output<B>,
    scale: f32,
}

enum Output<B: Backend> {
    Dense(B::Tensor),
    Experts { ticket: Ticket<B>, shared: Option<B::Tensor> },
}

impl<B: Backend> Begun<B> {
    /// Awaits the experts; the residual stream after the layer, and whether it routed.
    pub(super) fn end(self, backend: &B, laps: &mut Laps) -> Result<(B::Tensor, bool)> {
        let (output, is_routed) = match self.output {
            Output::Dense(output) => (output, false),
            Output::Experts { ticket, shared } => {
                laps.begin();
                let output = ticket.combine()?;
                laps.end(StepPart::Experts);
                let output = match shared {
                    Some(shared) => backend.add(output, &shared, 1.0)?,
                    None => output,
                };
                (output, true)
            }
        };
        let x = backend.add(self.residual, &output, self.scale)?;
        laps.end(StepPart::Elementwise);
        Ok((x, is_routed))
    }
}

fn load_gqa<B: Loader>(weights: &Weights<'_>, backend: &B, index: usize, gqa: &Gqa) -> Result<Projections<B>> {
    let (names, hidden) = (&weights.spec().names, weights.spec().hidden);
    let (q_width, kv_width) = (gqa.heads * gqa.head_dim, gqa.kv_heads * gqa.head_dim);
    let qkv = match names.qkv {
        QkvNames::Separate(qkv) => {
            let load = |name: &str, rows: usize| {
                let name = at_layer(name, index);
                let bias = weights.bias(&name, rows, gqa.qkv_bias)?;
                backend.load_linear(weights.matrix(&name, rows, hidden, Role::Body)?, bias)
            };
            [load(qkv[0], q_width)?, load(qkv[1], kv_width)?, load(qkv[2], kv_width)?]
        }
        QkvNames::FusedByHead(name) | QkvNames::FusedByPart(name) => {
            let name = at_layer(name, index);
            let (head_dim, by_head) = (gqa.head_dim, matches!(names.qkv, QkvNames::FusedByHead(_)));
            let biases = weights.bias(&name, 3 * q_width, gqa.qkv_bias)?;
            let load = |part: usize, part_name: &str| {
                let row_of = move |row: usize| match by_head {
                    true => (row / head_dim * 3 + part) * head_dim + row % head_dim,
                    false => part * q_width + row,
                };
                let bias = biases.as_ref().map(|all| (0..q_width).map(|row| all[row_of(row)]).collect());
                let matrix =
                    weights.matrix_rows((&name, part_name), 3 * q_width, (q_width, hidden), Role::Body, row_of)?;
                backend.load_linear(matrix, bias)
            };
            [load(0, "query")?, load(1, "key")?, load(2, "value")?]
        }
    };
    let qk_norm = match gqa.qk_norm {
        QkNorm::None => None,
        QkNorm::Head(norm) => Some((norm, gqa.head_dim, gqa.head_dim)),
        QkNorm::Full(norm) => Some((norm, q_width, kv_width)),
    };
    let qk_norm = match qk_norm {
        Some((norm, q_len, k_len)) => Some([
            load_norm(weights, backend, norm, &at_layer(names.q_norm, index), q_len)?,
            load_norm(weights, backend, norm, &at_layer(names.k_norm, index), k_len)?,
        ]),
        None => None,
    };
    let output = at_layer(names.o, index);
    let bias = weights.bias(&output, hidden, gqa.output_bias)?;
    let output = backend.load_linear(weights.matrix(&output, hidden, q_width, Role::Body)?, bias)?;
    Ok(Projections::Gqa { qkv, qk_norm, output })
}

fn load_mla<B: Loader>(weights: &Weights<'_>, backend: &B, index: usize, mla: &Mla) -> Result<MlaWeights<B>> {
    let (names, hidden) = (&weights.spec().names, weights.spec().hidden);
    let linear = |name: &str, rows: usize, cols: usize, bias: bool| {
        let bias = weights.bias(name, rows, bias)?;
        backend.load_linear(weights.matrix(name, rows, cols, Role::Body)?, bias)
    };
    let q_width = mla.heads * (mla.nope_dim + mla.rope_dim);
    let [q_down, q_norm, q_up] = names.q_latent.map(|name| at_layer(name, index));
    let (q_latent, q) = match mla.q_rank {
        Some(rank) => {
            let down = linear(&q_down, rank, hidden, mla.bias)?;
            let norm = load_norm(weights, backend, mla.norm, &q_norm, rank)?;
            (Some((down, norm)), linear(&q_up, q_width, rank, false)?)
        }
        None => {
            let QkvNames::Separate([q, ..]) = names.qkv else { unreachable!("families with MLA have a query matrix") };
            (None, linear(&at_layer(q, index), q_width, hidden, false)?)
        }
    };
    let [kv_down, kv_norm, kv_up] = names.kv_latent.map(|name| at_layer(name, index));
    let head_rows = mla.nope_dim + mla.v_dim;
    let shape = (mla.heads * head_rows, mla.kv_rank);
    let mut absorb_k = Vec::with_capacity(mla.heads);
    let mut expand_v = Vec::with_capacity(mla.heads);
    let by_head = names.kv_by_head.map(|names| names.map(|name| at_layer(name, index)));
    for head in 0..mla.heads {
        let (first, middle) = (head * head_rows, head * head_rows + mla.nope_dim);
        let (k, v) = match &by_head {
            Some([k, v]) => (
                weights.head(k, (mla.heads, head), (mla.kv_rank, mla.nope_dim))?,
                weights.head(v, (mla.heads, head), (mla.v_dim, mla.kv_rank))?,
            ),
            None => (
                weights.part((&kv_up, &format!("{head}.key")), shape, first..middle, true)?,
                weights.part((&kv_up, &format!("{head}.value")), shape, middle..first + head_rows, false)?,
            ),
        };
        absorb_k.push(backend.load_linear(k, None)?);
        expand_v.push(backend.load_linear(v, None)?);
    }
    Ok(MlaWeights {
        q_latent,
        q,
        kv_down: linear(&kv_down, mla.kv_rank + mla.rope_dim, hidden, mla.bias)?,
        kv_norm: load_norm(weights, backend, mla.norm, &kv_norm, mla.kv_rank)?,
        absorb_k,
        expand_v,
        output: linear(&at_layer(names.o, index), hidden, mla.heads * mla.v_dim, mla.bias)?,
    })
}

fn load_ffn<B: Loader>(weights: &Weights<'_>, backend: &B, index: usize) -> Result<FfnWeights<B>> {
    let (spec, names) = (weights.spec(), &weights.spec().names);
    let moe: &Moe = match &spec.layers[index].ffn {
        Ffn::Dense(form) => {
            return Ok(FfnWeights::Dense(backend.load_ffn(weights.network(&names.dense, index, *form)?)?));
        }
        Ffn::Moe(moe) => moe,
    };
    let name = at_layer(names.gate, index);
    let bias = weights.bias(&name, moe.experts, moe.gate_bias)?;
    let gate = backend.load_linear(weights.matrix(&name, moe.experts, spec.hidden, Role::Gate)?, bias)?;
    let choice_bias =
        moe.choice_bias.then(|| weights.vector(&at_layer(names.choice_bias, index), moe.experts)).transpose()?;
    let shared = match moe.shared {
        Some(shared) => {
            let ffn = backend.load_ffn(weights.network(&names.shared, index, shared.form)?)?;
            let gate = if shared.gated {
                Some(backend.load_linear(weights.row(&at_layer(names.shared_gate, index), spec.hidden)?, None)?)
            } else {
                None
            };
            Some((ffn, gate))
        }
        None => None,
    };
    Ok(FfnWeights::Moe { gate, choice_bias, shared })
}
