//! Experts: gate, up, activation and down for tokens sorted by expert, then each token's weighted sum.
//!
//! Shapes: x `[tokens, hidden]`; gate, up `[inter, hidden]`; down `[hidden, inter]`. All f32 outside the weights. A
//! token's sum runs in the order of its experts' numbers, so its bits do not depend on the batch.
//! Outline: x is quantized once for all experts. One parallel region runs (expert, some panels of gate and up), see
//! `gate_up`: rows of x are addressed where they are, and what comes out of the activation is quantized at once, as a
//! task owns whole groups of it. A second one multiplies with down and sums the weighted results, see `down`: by columns
//! of the output over all experts where rows are many, by expert where they are few and memory sets the pace.
mod down;
mod gate_up;

use crate::Error;
use crate::activation::Activation;
use crate::activations::{Buffer, Form, with};
use crate::gemm::{Kernels, Shared};
use crate::inputs::{Buffers, Inputs};
use crate::packed::PackedMatrix;
use down::{Sink, by_expert};
use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

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

/// An expert's weights, by its number.
type WeightsOf<'a, 'f> = &'f (dyn Fn(u32) -> &'a ExpertWeights + Sync);

/// Consecutive rows of one expert.
#[derive(Clone, Copy)]
struct Group {
    expert: u32,
    first: usize,
    rows: usize,
    /// Where its inner rows start, in bytes.
    inner: usize,
}

/// Panels of one group's gate and up, or of its down.
#[derive(Clone, Copy)]
struct Part {
    group: u32,
    first: u32,
    panels: u32,
}

/// What a caller of [`Kernels::moe`] keeps from call to call.
#[derive(Default)]
struct Workspace {
    counts: Vec<u32>,
    /// The rows' tokens and weights, sorted by expert.
    tokens: Vec<u32>,
    weights: Vec<f32>,
    groups: Vec<Group>,
    parts: Vec<Part>,
    /// The same of down, where it runs by expert.
    downs: Vec<Part>,
    /// Panels of down by task, where it runs by columns.
    columns: Vec<Range<usize>>,
    x: Buffers,
    inner: Buffer,
    results: Buffer,
}

/// What a task keeps from task to task.
#[derive(Default)]
struct Scratch {
    gate: Buffer,
    up: Buffer,
    block: Buffer,
}

thread_local! {
    static WORKSPACE: Cell<Workspace> = Cell::default();
    static SCRATCH: Cell<Scratch> = Cell::default();
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
        let count = offsets.len().saturating_sub(1);
        assert_eq!(x.len(), count * hidden, "x is [tokens, hidden]");
        assert_eq!(out.len(), x.len(), "out is [tokens, hidden]");
        assert!(ids.len() == weights.len() && offsets.last().is_none_or(|&l| l as usize == ids.len()));
        with(&WORKSPACE, |work| {
            let counts = &mut work.counts;
            counts.clear();
            counts.resize(experts.len() + 1, 0);
            for &expert in ids {
                let held = experts.get(expert as usize).is_some_and(Option::is_some);
                *counts.get_mut(expert as usize + 1).filter(|_| held).ok_or(Error::Expert { expert })? += 1;
            }
            work.groups.clear();
            for expert in 0..experts.len() {
                let (first, rows) = (counts[expert], counts[expert + 1]);
                if rows > 0 {
                    let (first, rows) = (first as usize, rows as usize);
                    work.groups.push(Group { expert: expert as u32, first, rows, inner: 0 });
                }
                counts[expert + 1] += first;
            }
            work.tokens.resize(ids.len(), 0);
            work.weights.resize(ids.len(), 0.0);
            for (token, ends) in offsets.windows(2).enumerate() {
                for choice in ends[0] as usize..ends[1] as usize {
                    let row = &mut counts[ids[choice] as usize];
                    work.tokens[*row as usize] = token as u32;
                    work.weights[*row as usize] = weights[choice];
                    *row += 1;
                }
            }
            let weights_of = |expert: u32| experts[expert as usize].as_deref().expect("held, as was checked above");
            self.networks(&weights_of, activation, x, hidden, work, true, out);
            Ok(())
        })
    }

    /// One network over all rows: a dense layer or a shared expert. `x` and `out` are `[m, hidden]`.
    pub fn gated_ffn(&self, w: &ExpertWeights, activation: Activation, x: &[f32], m: usize, out: &mut [f32]) {
        let hidden = w.gate.cols();
        assert_eq!(x.len(), m * hidden, "x is [m, hidden]");
        assert_eq!(out.len(), m * w.down.rows(), "out is [m, down's rows]");
        with(&WORKSPACE, |work| {
            work.groups.clear();
            work.groups.push(Group { expert: 0, first: 0, rows: m, inner: 0 });
            self.networks(&|_| w, activation, x, hidden, work, false, out);
        });
    }

    /// Runs the groups of a workspace; their rows are tokens where `routed`.
    #[allow(clippy::too_many_arguments, reason = "an inner call of two public ones")]
    fn networks<'a>(
        &self,
        weights_of: WeightsOf<'a, '_>,
        activation: Activation,
        x: &[f32],
        hidden: usize,
        work: &mut Workspace,
        routed: bool,
        out: &mut [f32],
    ) {
        let Workspace { tokens, weights, groups, parts, downs, columns, x: buffers, inner, results, .. } = work;
        let mut total = 0;
        let mut units = 0;
        for group in groups.iter_mut() {
            let w = weights_of(group.expert);
            let (inter, width) = (w.down.cols(), w.down.rows());
            assert!(w.gate.cols() == hidden && w.up.cols() == hidden, "gate and up are [inter, hidden]");
            assert!(w.gate.rows() == inter && w.up.rows() == inter, "down is [hidden, inter]");
            assert!(!routed || width == hidden, "an expert's results are [hidden]");
            group.inner = total;
            total += group.rows * self.down_form(w).row_bytes(inter);
            units += w.up.panels().div_ceil(self.unit(w));
        }
        self.cut_gates(weights_of, groups, units, parts);
        downs.clear();
        if routed && by_expert(tokens.len(), groups.len()) {
            self.cut_downs(weights_of, groups, hidden, downs);
        }
        // the first part is the caller's
        if let Some(part) = parts.get(1) {
            let w = weights_of(groups[part.group as usize].expert);
            self.expect_from(&w.gate, part.first as usize);
        }
        let matrices = groups.iter().flat_map(|group| {
            let w = weights_of(group.expert);
            [&w.gate, &w.up]
        });
        let inputs = Inputs::new(self, x, hidden, buffers, matrices);
        let tokens = routed.then_some(&tokens[..]);
        let inner = inner.bytes(total);
        let shared = Shared::new(&mut *inner);
        self.pool.run(parts.len(), &|part| {
            if let (0, Some(next)) = (part, downs.get(1)) {
                // who finds no part any more reads ahead for the next region
                self.expect_from(&weights_of(groups[next.group as usize].expert).down, next.first as usize);
            }
            // the part after this one is next for some thread, most likely
            let following = parts.get(part + 1).unwrap_or(&parts[part]);
            let following = (weights_of(groups[following.group as usize].expert), following.first as usize);
            let part = parts[part];
            let group = groups[part.group as usize];
            with(&SCRATCH, |scratch| {
                let w = weights_of(group.expert);
                if self.is_few_in(w, group.rows) {
                    return self.gate_and_up_of_few(w, activation, &inputs, group, tokens, part, shared, scratch);
                }
                self.gate_and_up(w, activation, &inputs, group, tokens, part, following, shared, scratch);
            });
        });
        match tokens {
            None => self.down(weights_of, groups, inner, &Sink::Rows, columns, out),
            Some(tokens) if downs.is_empty() => {
                self.down(weights_of, groups, inner, &Sink::Tokens { tokens, weights }, columns, out);
            }
            Some(tokens) => {
                let routing = (tokens, &weights[..]);
                self.down_by_expert(weights_of, groups, downs, inner, hidden, routing, results, out);
            }
        }
    }

    /// The form in which the inner rows are kept.
    fn down_form(&self, w: &ExpertWeights) -> Form {
        Form::new(self.activations, w.down.format())
    }
}

fn add_bias(row: &mut [f32], bias: &[f32]) {
    row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
}
