//! Experts: gate, up, activation and down for tokens sorted by expert, then each token's weighted sum.
//!
//! Shapes: x `[tokens, hidden]`; gate, up `[inter, hidden]`; down `[hidden, inter]`. All f32 outside the weights. A
//! token's sum runs in the order of its experts' numbers, so its bits do not depend on the batch.
//! Outline: x is quantized once for all experts. One parallel region runs (expert, some panels of gate and up): rows of
//! x are addressed where they are, and what comes out of the activation is quantized at once, as a task owns whole
//! groups of it. A second one runs columns of the output over all experts and adds the weighted results where they
//! belong. One token makes as many tasks as there are panels, a large batch about one for each expert.
use crate::Error;
use crate::activation::{Activation, gate_all};
use crate::activations::{Buffer, Form, Rows, with};
use crate::gemm::{Kernels, Panel, Shared, Tile};
use crate::inputs::{Buffers, Inputs};
use crate::packed::{PANEL, PackedMatrix};
use crate::runs::Runs;
use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

/// Sums of one task.
const SUMS: usize = 64 << 10;
/// Rows of an expert on average up to which a layer is bound by the memory that its weights are in.
const FEW: usize = 4;
/// Values that are summed in about the time in which another thread would begin.
const SUM_TASK: usize = 16 << 10;

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

/// Where the results go.
enum Sink<'a> {
    /// Row i to row i.
    Rows,
    /// Row i, weighted, is added to its token's row.
    Tokens { tokens: &'a [u32], weights: &'a [f32] },
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
        weights_of: &(dyn Fn(u32) -> &'a ExpertWeights + Sync),
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
        let mut runs = Runs::new(units, self.pool.threads());
        parts.clear();
        for (index, group) in groups.iter().enumerate() {
            let w = weights_of(group.expert);
            let (panels, unit) = (w.up.panels(), self.unit(w));
            let units_here = panels.div_ceil(unit);
            let least =
                if self.is_few_in(w, group.rows) { self.least_run(&w.up, units * unit).div_ceil(unit) } else { 1 };
            runs.cut(units_here, least, units_here, |run| {
                let (first, end) = (run.start * unit, (run.end * unit).min(panels));
                parts.push(Part { group: index as u32, first: first as u32, panels: (end - first) as u32 });
            });
        }
        downs.clear();
        if routed && tokens.len() <= groups.len() * FEW {
            let panels = hidden.div_ceil(PANEL);
            let mut runs = Runs::new(groups.len() * panels, self.pool.threads());
            for (index, group) in groups.iter().enumerate() {
                let least = self.least_run(&weights_of(group.expert).down, groups.len() * panels);
                runs.cut(panels, least, panels, |run| {
                    downs.push(Part { group: index as u32, first: run.start as u32, panels: run.len() as u32 });
                });
            }
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

    /// Panels of gate and up that make one group of an inner row.
    fn unit(&self, w: &ExpertWeights) -> usize {
        match self.down_form(w) {
            Form::Float => 1,
            Form::Int8 { group } => group / PANEL,
        }
    }

    /// Some panels of gate and up over all rows of a group, to the inner rows.
    #[allow(clippy::too_many_arguments, reason = "a task's body")]
    fn gate_and_up(
        &self,
        w: &ExpertWeights,
        activation: Activation,
        inputs: &Inputs<'_>,
        group: Group,
        tokens: Option<&[u32]>,
        part: Part,
        following: (&ExpertWeights, usize),
        inner: Shared<'_, u8>,
        scratch: &mut Scratch,
    ) {
        let (form, unit, inter) = (self.down_form(w), self.unit(w), w.up.rows());
        let (gate_rows, up_rows) = (
            inputs.of(Form::new(self.activations, w.gate.format())),
            inputs.of(Form::new(self.activations, w.up.format())),
        );
        let row_of = |row: usize| tokens.map_or(row, |tokens| tokens[group.first + row] as usize);
        let last = (part.first + part.panels) as usize;
        for first in (part.first as usize..last).step_by(unit) {
            let panels = first..(first + unit).min(last);
            let columns = panels.start * PANEL..(panels.end * PANEL).min(inter);
            let block = scratch.block.floats(group.rows * columns.len());
            for index in panels {
                let (w_next, next) = if index + 1 < last { (w, index + 1) } else { following };
                let (gate_next, up_next) = (Some(w_next.gate.panel(next)), Some(w_next.up.panel(next)));
                let gate = Panel::new(self, &w.gate, index, group.rows, gate_next, &mut scratch.gate);
                let up = Panel::new(self, &w.up, index, group.rows, up_next, &mut scratch.up);
                let columns_here = index * PANEL..((index + 1) * PANEL).min(inter);
                let passes = group.rows.div_ceil(gate.most().min(up.most()));
                let (mut gates, mut ups) = (Tile::new(), Tile::new());
                for pass in 0..passes {
                    let rows = group.rows * pass / passes..group.rows * (pass + 1) / passes;
                    for (panel, x, out) in [(&gate, &gate_rows, &mut gates), (&up, &up_rows, &mut ups)] {
                        panel.multiply(&x.tile(rows.clone(), row_of)[..rows.len()], pass, passes, out);
                    }
                    for (tile, bias) in [(&mut gates, &w.gate_bias), (&mut ups, &w.up_bias)] {
                        if let Some(bias) = bias {
                            tile.0[..rows.len()].iter_mut().for_each(|row| add_bias(row, &bias[columns_here.clone()]));
                        }
                    }
                    let gates = gates.0[..rows.len()].as_flattened_mut();
                    gate_all(self.isa, activation, gates, ups.0[..rows.len()].as_flattened());
                    let at = columns_here.start - columns.start;
                    for (row, values) in rows.zip(gates.as_chunks::<PANEL>().0) {
                        let out = &mut block[row * columns.len() + at..][..columns_here.len()];
                        out.copy_from_slice(&values[..columns_here.len()]);
                    }
                }
            }
            self.put_inner(form, inter, group, &columns, block, inner);
        }
    }

    /// Whether a group of so many rows takes whole runs of gate's panels and then of up's.
    fn is_few_in(&self, w: &ExpertWeights, rows: usize) -> bool {
        self.is_few(w.gate.format(), rows) && self.is_few(w.up.format(), rows)
    }

    /// As [`Self::gate_and_up`], for a few rows: all the part's panels of gate, then all of up, as they lie in memory.
    #[allow(clippy::too_many_arguments, reason = "a task's body")]
    fn gate_and_up_of_few(
        &self,
        w: &ExpertWeights,
        activation: Activation,
        inputs: &Inputs<'_>,
        group: Group,
        tokens: Option<&[u32]>,
        part: Part,
        inner: Shared<'_, u8>,
        scratch: &mut Scratch,
    ) {
        let (form, inter) = (self.down_form(w), w.up.rows());
        let row_of = |row: usize| tokens.map_or(row, |tokens| tokens[group.first + row] as usize);
        let panels = part.first as usize..(part.first + part.panels) as usize;
        let columns = panels.start * PANEL..(panels.end * PANEL).min(inter);
        let run = |matrix: &PackedMatrix, bias: &Option<Vec<f32>>, out: &mut [f32]| {
            let x = inputs.of(Form::new(self.activations, matrix.format()));
            self.few(matrix, panels.clone(), &x, group.rows, row_of, |panel, row, values| {
                let first = panel * PANEL;
                let here = PANEL.min(columns.end - first);
                let out = &mut out[row * columns.len() + first - columns.start..][..here];
                out.copy_from_slice(&values[..here]);
                if let Some(bias) = bias {
                    add_bias(out, &bias[first..first + here]);
                }
            });
        };
        let gates = scratch.gate.floats(group.rows * columns.len());
        let ups = scratch.up.floats(group.rows * columns.len());
        run(&w.gate, &w.gate_bias, gates);
        run(&w.up, &w.up_bias, ups);
        gate_all(self.isa, activation, gates, ups);
        self.put_inner(form, inter, group, &columns, gates, inner);
    }

    /// Writes some columns of a group's inner rows, given as `[rows, columns]`: whole groups of what they are kept as.
    fn put_inner(
        &self,
        form: Form,
        inter: usize,
        group: Group,
        columns: &Range<usize>,
        values: &[f32],
        inner: Shared<'_, u8>,
    ) {
        let (start, len) = (form.row_bytes(columns.start), form.row_bytes(columns.len()));
        for (row, values) in values.chunks_exact(columns.len()).enumerate() {
            // SAFETY: a part's task writes its own columns, in whole groups, of its group's rows.
            let out = unsafe { inner.slice(group.inner + row * form.row_bytes(inter) + start, len) };
            form.write(self.isa, values, out);
        }
    }

    /// Some panels of down over a group's rows; `put(panel, row, values)` takes the results, the bias among them.
    #[allow(clippy::too_many_arguments, reason = "a task's body")]
    fn down_panels(
        &self,
        w: &ExpertWeights,
        inner: &[u8],
        group: Group,
        panels: Range<usize>,
        following: Option<&[u8]>,
        buffer: &mut Buffer,
        mut put: impl FnMut(usize, usize, &[f32]),
    ) {
        let (form, inter, width) = (self.down_form(w), w.down.cols(), w.down.rows());
        let rows = Rows::new(form, inter, &inner[group.inner..][..group.rows * form.row_bytes(inter)]);
        let mut put = |index: usize, row: usize, values: &[f32; PANEL]| {
            let first = index * PANEL;
            let here = PANEL.min(width - first);
            let mut values = *values;
            if let Some(bias) = &w.down_bias {
                add_bias(&mut values[..here], &bias[first..first + here]);
            }
            put(index, row, &values[..here]);
        };
        if self.is_few(w.down.format(), group.rows) {
            return self.few(&w.down, panels, &rows, group.rows, |row| row, put);
        }
        for index in panels.clone() {
            let next = if index + 1 < panels.end { Some(w.down.panel(index + 1)) } else { following };
            let panel = Panel::new(self, &w.down, index, group.rows, next, buffer);
            panel.for_each_tile(&rows, |row| row, |row, values| put(index, row, values));
        }
    }

    /// Down over all groups, by columns of the output; the vector is for its tasks.
    fn down<'a>(
        &self,
        weights_of: &(dyn Fn(u32) -> &'a ExpertWeights + Sync),
        groups: &[Group],
        inner: &[u8],
        sink: &Sink<'_>,
        tasks: &mut Vec<Range<usize>>,
        out: &mut [f32],
    ) {
        let Some(group) = groups.first() else { return out.fill(0.0) };
        let width = weights_of(group.expert).down.rows();
        let panels = width.div_ceil(PANEL);
        let rows_out = out.len() / width.max(1);
        // sums of a task that stay in a cache
        let most = (SUMS / (rows_out * PANEL).max(1)).max(1);
        tasks.clear();
        Runs::new(panels, self.pool.threads()).cut(panels, 1, most, |run| tasks.push(run));
        let out = Shared::new(out);
        self.pool.run(tasks.len(), &|task| {
            let range = tasks[task].clone();
            let columns = range.start * PANEL..(range.end * PANEL).min(width);
            with(&SCRATCH, |scratch| {
                // sums grow in memory of our own: rows of the output are far apart, often by a power of two, so that
                // few of them fit a cache together
                let sums = match sink {
                    Sink::Rows => &mut [],
                    Sink::Tokens { .. } => scratch.block.floats(rows_out * columns.len()),
                };
                sums.fill(0.0);
                for (i, group) in groups.iter().enumerate() {
                    let w = weights_of(group.expert);
                    let following = groups.get(i + 1).map(|group| weights_of(group.expert).down.panel(range.start));
                    let put = |index: usize, row: usize, values: &[f32]| {
                        let row = group.first + row;
                        match sink {
                            Sink::Rows => {
                                // SAFETY: a task writes its own columns only.
                                let out = unsafe { out.slice(row * width + index * PANEL, values.len()) };
                                out.copy_from_slice(values);
                            }
                            Sink::Tokens { tokens, weights } => {
                                let at = tokens[row] as usize * columns.len() + index * PANEL - columns.start;
                                add_weighted(&mut sums[at..at + values.len()], weights[row], values);
                            }
                        }
                    };
                    self.down_panels(w, inner, *group, range.clone(), following, &mut scratch.gate, put);
                }
                for (row, sums) in sums.chunks_exact(columns.len()).enumerate() {
                    // SAFETY: a task writes its own columns only.
                    unsafe { out.slice(row * width + columns.start, columns.len()) }.copy_from_slice(sums);
                }
            });
        });
    }

    /// Down over the groups of tokens, by expert: each matrix is read in long runs, and what comes out of them,
    /// `[rows, hidden]`, is summed afterwards. [`Self::down`] has the same bits and is faster where rows are many.
    #[allow(clippy::too_many_arguments, reason = "as `down`")]
    fn down_by_expert<'a>(
        &self,
        weights_of: &(dyn Fn(u32) -> &'a ExpertWeights + Sync),
        groups: &[Group],
        parts: &[Part],
        inner: &[u8],
        hidden: usize,
        (tokens, weights): (&[u32], &[f32]),
        results: &mut Buffer,
        out: &mut [f32],
    ) {
        let results = results.floats(tokens.len() * hidden);
        let shared = Shared::new(&mut *results);
        self.pool.run(parts.len(), &|part| {
            let Part { group, first, panels } = parts[part];
            let (group, panels) = (groups[group as usize], first as usize..(first + panels) as usize);
            let w = weights_of(group.expert);
            with(&SCRATCH, |scratch| {
                self.down_panels(w, inner, group, panels, None, &mut scratch.gate, |index, row, values| {
                    let at = (group.first + row) * hidden + index * PANEL;
                    // SAFETY: a part's task writes its own columns of its group's rows.
                    unsafe { shared.slice(at, values.len()) }.copy_from_slice(values);
                });
            });
        });
        let tasks = (results.len() / SUM_TASK).clamp(1, self.pool.threads());
        let count = out.len() / hidden;
        let (results, out) = (&*results, Shared::new(out));
        self.pool.run(tasks, &|task| {
            let columns = hidden * task / tasks..hidden * (task + 1) / tasks;
            // SAFETY: a task writes its own columns only, and has one row of them at a time.
            let row_of = |token: usize| unsafe { out.slice(token * hidden + columns.start, columns.len()) };
            (0..count).for_each(|token| row_of(token).fill(0.0));
            for ((token, weight), row) in tokens.iter().zip(weights).zip(results.chunks_exact(hidden)) {
                add_weighted(row_of(*token as usize), *weight, &row[columns.clone()]);
            }
        });
    }
}

/// Adds `weight · values`.
fn add_weighted(sums: &mut [f32], weight: f32, values: &[f32]) {
    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += weight * value);
}

fn add_bias(row: &mut [f32], bias: &[f32]) {
    row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
}
