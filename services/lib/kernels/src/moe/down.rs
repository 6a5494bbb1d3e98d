//! Down and the weighted sum: by columns of the output over all experts, or by expert.
use super::{ExpertWeights, Group, Part, SCRATCH, WeightsOf, add_bias};
use crate::activations::{Buffer, Rows, with};
use crate::gemm::{Kernels, Shared};
use crate::packed::PANEL;
use crate::runs::Runs;
use std::ops::Range;

/// Sums of one task.
const SUMS: usize = 64 << 10;
/// Rows of an expert on average up to which a layer is bound by the memory that its weights are in.
const FEW: usize = 4;
/// Values that are summed in about the time in which another thread would begin.
const SUM_TASK: usize = 16 << 10;

/// Where the results go.
pub(super) enum Sink<'a> {
    /// Row i to row i.
    Rows,
    /// Row i, weighted, is added to its token's row.
    Tokens { tokens: &'a [u32], weights: &'a [f32] },
}

/// Whether a layer runs by expert: where its experts have a few rows on average.
pub(super) fn by_expert(rows: usize, experts: usize) -> bool {
    rows <= experts * FEW
}

impl Kernels {
    /// Cuts down of all groups of tokens into parts.
    pub(super) fn cut_downs<'a>(
        &self,
        weights_of: WeightsOf<'a, '_>,
        groups: &[Group],
        hidden: usize,
        parts: &mut Vec<Part>,
    ) {
        let panels = hidden.div_ceil(PANEL);
        let mut runs = Runs::new(groups.len() * panels, self.pool.threads());
        for (index, group) in groups.iter().enumerate() {
            let least = self.least_run(&weights_of(group.expert).down, groups.len() * panels);
            runs.cut(panels, least, panels, |run| {
                parts.push(Part { group: index as u32, first: run.start as u32, panels: run.len() as u32 });
            });
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
        self.multiply_panels(
            &w.down,
            panels,
            &rows,
            group.rows,
            |row| row,
            following,
            buffer,
            |index, row, values| {
                let first = index * PANEL;
                let here = PANEL.min(width - first);
                let mut values = *values;
                if let Some(bias) = &w.down_bias {
                    add_bias(&mut values[..here], &bias[first..first + here]);
                }
                put(index, row, &values[..here]);
            },
        );
    }

    /// Down over all groups, by columns of the output; the vector is for its tasks.
    pub(super) fn down<'a>(
        &self,
        weights_of: WeightsOf<'a, '_>,
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
    pub(super) fn down_by_expert<'a>(
        &self,
        weights_of: WeightsOf<'a, '_>,
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
