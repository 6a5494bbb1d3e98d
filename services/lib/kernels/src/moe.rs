//! Experts: gate, up, activation and down for tokens sorted by expert, then each token's weighted sum.
//!
//! Shapes: x `[tokens, hidden]`; gate, up `[inter, hidden]`; down `[hidden, inter]`. All f32 outside the weights. A
//! token's sum runs in the order of its experts in the routing, so its bits do not depend on the batch.
//! Outline: gather the tokens of each expert; one task for each (expert, panels of gate and up); one task for each
//! (expert, panels of down); one task for some tokens' sums.
use crate::gemm::{Kernels, Shared};
use crate::packed::{PANEL, PackedMatrix};
use crate::{Error, gemm};
use std::sync::Arc;

/// What stands between the two products of a feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `silu(gate) · up`.
    Silu,
    /// `gelu(gate) · up`, by the error function.
    Gelu,
    /// `gelu(gate) · up`, by the hyperbolic tangent.
    GeluTanh,
    /// `relu(gate) · up`.
    Relu,
    /// GPT-OSS: `(clamp(up) + 1) · gate · sigmoid(alpha · gate)`, gate clamped from above, up on both sides.
    ClampedSwiGlu {
        /// Factor in the sigmoid.
        alpha: f32,
        /// Bound of gate and up.
        limit: f32,
    },
}

impl Activation {
    /// The activation alone, for a network without a gate.
    pub fn apply(self, x: f32) -> f32 {
        match self {
            Self::Silu => x / (1.0 + (-x).exp()),
            Self::Gelu => 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)),
            Self::GeluTanh => {
                let inner = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
                0.5 * x * (1.0 + inner.tanh())
            }
            Self::Relu => x.max(0.0),
            Self::ClampedSwiGlu { alpha, limit } => {
                let x = x.min(limit);
                x / (1.0 + (-alpha * x).exp())
            }
        }
    }

    /// The activation with its gate.
    pub fn gated(self, gate: f32, up: f32) -> f32 {
        match self {
            Self::ClampedSwiGlu { limit, .. } => (up.clamp(-limit, limit) + 1.0) * self.apply(gate),
            _ => self.apply(gate) * up,
        }
    }
}

/// The error function; largest error 1.2e-7 (W. J. Cody's form as a Chebyshev fit, Numerical Recipes 6.2).
fn erf(x: f32) -> f32 {
    let z = f64::from(x.abs());
    let t = 1.0 / (1.0 + 0.5 * z);
    let poly = [
        0.170_872_77,
        -0.822_152_23,
        1.488_515_87,
        -1.135_203_98,
        0.278_868_07,
        -0.186_288_06,
        0.096_784_18,
        0.374_091_96,
        1.000_023_68,
    ];
    let sum = poly.iter().fold(0.0, |sum, c| sum * t + c);
    let tail = t * (-z * z - 1.265_512_23 + t * sum).exp();
    let value = (1.0 - tail) as f32;
    if x < 0.0 { -value } else { value }
}

/// One gated feed-forward network.
#[derive(Clone)]
pub struct ExpertWeights {
    /// `[inter, hidden]`.
    pub gate: PackedMatrix,
    /// `[inter, hidden]`.
    pub up: PackedMatrix,
    /// `[hidden, inter]`.
    pub down: PackedMatrix,
    /// `[inter]`.
    pub gate_bias: Option<Vec<f32>>,
    /// `[inter]`.
    pub up_bias: Option<Vec<f32>>,
    /// `[hidden]`.
    pub down_bias: Option<Vec<f32>>,
}

/// Consecutive rows of one expert.
struct Group<'a> {
    weights: &'a ExpertWeights,
    first: usize,
    rows: usize,
}

impl Kernels {
    /// Runs the experts over routed tokens: token t goes to `ids[offsets[t]..offsets[t + 1]]` with `weights`.
    /// Writes `out[tokens, hidden]`.
    ///
    /// # Errors
    /// `Expert` when a token is routed to an expert that is `None` or beyond the list.
    ///
    /// # Panics
    /// When a slice's length contradicts the others.
    #[allow(clippy::too_many_arguments, reason = "the routing is three slices in compressed rows")]
    pub fn moe(
        &self,
        experts: &[Option<Arc<ExpertWeights>>],
        activation: Activation,
        x: &[f32],
        hidden: usize,
        offsets: &[u32],
        ids: &[u32],
        weights: &[f32],
        out: &mut [f32],
    ) -> Result<(), Error> {
        let tokens = offsets.len().saturating_sub(1);
        assert_eq!(x.len(), tokens * hidden, "x is [tokens, hidden]");
        assert_eq!(out.len(), x.len(), "out is [tokens, hidden]");
        assert!(ids.len() == weights.len() && offsets.last().is_none_or(|&l| l as usize == ids.len()));
        let mut order: Vec<u32> = (0..ids.len() as u32).collect();
        order.sort_by_key(|&choice| ids[choice as usize]);
        let mut token_of = vec![0usize; ids.len()];
        for (token, ends) in offsets.windows(2).enumerate() {
            token_of[ends[0] as usize..ends[1] as usize].fill(token);
        }
        let mut groups: Vec<Group<'_>> = Vec::new();
        let mut last = None;
        let mut sorted = Vec::with_capacity(ids.len() * hidden);
        let mut place = vec![0usize; ids.len()];
        for (row, &choice) in order.iter().enumerate() {
            let expert = ids[choice as usize];
            if last == Some(expert) {
                groups.last_mut().expect("a group was pushed with `last`").rows += 1;
            } else {
                let held = experts.get(expert as usize).and_then(Option::as_ref);
                groups.push(Group { weights: held.ok_or(Error::Expert { expert })?, first: row, rows: 1 });
                last = Some(expert);
            }
            place[choice as usize] = row;
            sorted.extend_from_slice(&x[token_of[choice as usize] * hidden..][..hidden]);
        }
        let mut results = vec![0.0; sorted.len()];
        self.run_groups(&groups, activation, &sorted, hidden, &mut results);
        let out = Shared::new(out);
        let per_task = (8192 / hidden.max(1)).clamp(1, 64);
        self.pool.run(tokens.div_ceil(per_task), &|task| {
            for token in task * per_task..((task + 1) * per_task).min(tokens) {
                // SAFETY: a token's row is written by the task that owns the token.
                let sum = unsafe { out.slice(token * hidden, hidden) };
                sum.fill(0.0);
                for choice in offsets[token] as usize..offsets[token + 1] as usize {
                    let row = &results[place[choice] * hidden..][..hidden];
                    crate::elementwise::add(sum, row, weights[choice]);
                }
            }
        });
        Ok(())
    }

    /// One network over all rows: a dense layer or a shared expert. `x` and `out` are `[m, hidden]`.
    pub fn gated_ffn(&self, w: &ExpertWeights, activation: Activation, x: &[f32], m: usize, out: &mut [f32]) {
        let hidden = w.gate.cols();
        assert_eq!(x.len(), m * hidden, "x is [m, hidden]");
        self.run_groups(&[Group { weights: w, first: 0, rows: m }], activation, x, hidden, out);
    }

    fn run_groups(&self, groups: &[Group<'_>], activation: Activation, x: &[f32], hidden: usize, out: &mut [f32]) {
        let inter_of = |group: &Group<'_>| group.weights.up.rows();
        let mut starts = Vec::with_capacity(groups.len());
        let mut total = 0;
        for group in groups {
            starts.push(total);
            total += group.rows * inter_of(group);
        }
        let mut inner = vec![0.0; total];
        {
            let inner = Shared::new(&mut inner);
            self.over_panels(
                groups,
                |g| inter_of(g).div_ceil(PANEL),
                |g, panel| {
                    let group = &groups[g];
                    let (n, first) = (inter_of(group), panel * PANEL);
                    let x = &x[group.first * hidden..][..group.rows * hidden];
                    let at = |row: usize, col: usize| starts[g] + row * n + col;
                    // SAFETY: a panel's task writes that panel's columns of its group only.
                    let put_gate = |row: usize, col: usize, values: &[f32]| unsafe {
                        inner.slice(at(row, col), values.len()).copy_from_slice(values);
                    };
                    let w = group.weights;
                    gemm::panel_product(self.isa, &w.gate, panel, x, group.rows, w.gate_bias.as_deref(), &put_gate);
                    // SAFETY: as above.
                    let put_up = |row: usize, col: usize, values: &[f32]| unsafe {
                        for (inner, up) in inner.slice(at(row, col), values.len()).iter_mut().zip(values) {
                            *inner = activation.gated(*inner, *up);
                        }
                    };
                    gemm::panel_product(self.isa, &w.up, panel, x, group.rows, w.up_bias.as_deref(), &put_up);
                    debug_assert!(first < n, "a panel starts inside the matrix");
                },
            );
        }
        let out = Shared::new(out);
        self.over_panels(
            groups,
            |g| g.weights.down.rows().div_ceil(PANEL),
            |g, panel| {
                let group = &groups[g];
                let w = group.weights;
                let x = &inner[starts[g]..][..group.rows * inter_of(group)];
                // SAFETY: a panel's task writes that panel's columns of its group's rows only.
                let put = |row: usize, col: usize, values: &[f32]| unsafe {
                    out.slice((group.first + row) * hidden + col, values.len()).copy_from_slice(values);
                };
                gemm::panel_product(self.isa, &w.down, panel, x, group.rows, w.down_bias.as_deref(), &put);
            },
        );
    }

    /// Runs `body(group, panel)` for every panel of every group.
    fn over_panels(
        &self,
        groups: &[Group<'_>],
        panels: impl Fn(&Group<'_>) -> usize,
        body: impl Fn(usize, usize) + Sync,
    ) {
        let tasks: Vec<(usize, usize)> =
            groups.iter().enumerate().flat_map(|(g, group)| (0..panels(group)).map(move |panel| (g, panel))).collect();
        let chunk = tasks.len().div_ceil(self.pool.threads() * 8).max(1);
        self.pool.run(tasks.len().div_ceil(chunk), &|task| {
            for &(group, panel) in &tasks[task * chunk..((task + 1) * chunk).min(tasks.len())] {
                body(group, panel);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_is_exact_to_single_precision() {
        for (x, y) in [(0.0, 0.0), (0.5, 0.520_499_9), (1.0, 0.842_700_8), (-2.0, -0.995_322_3), (4.0, 1.0)] {
            assert!((erf(x) - y).abs() < 3e-7, "erf({x})");
        }
    }
}
