//! Gate, up and the activation: a part is some panels of one expert's gate and up.
//!
//! Where rows are many, a panel of each is multiplied with all rows while it is in a cache. A few rows are bound by the
//! memory: all panels of gate are read, then all of up, as they lie in it.
use super::{ExpertWeights, Group, Part, Scratch, WeightsOf, add_bias};
use crate::activation::{Activation, gate_all};
use crate::activations::Form;
use crate::gemm::{Kernels, Panel, Shared, Tile};
use crate::inputs::Inputs;
use crate::packed::{PANEL, PackedMatrix};
use crate::runs::Runs;
use std::ops::Range;

impl Kernels {
    /// Panels of gate and up that make one group of an inner row.
    pub(super) fn unit(&self, w: &ExpertWeights) -> usize {
        match self.down_form(w) {
            Form::Float | Form::Bf16 => 1,
            Form::Int8 { group } => group / PANEL,
        }
    }

    /// Cuts gate and up of all groups, `units` in all, into parts.
    pub(super) fn cut_gates<'a>(
        &self,
        weights_of: WeightsOf<'a, '_>,
        groups: &[Group],
        units: usize,
        parts: &mut Vec<Part>,
    ) {
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
    }

    /// Some panels of gate and up over all rows of a group, to the inner rows.
    #[allow(clippy::too_many_arguments, reason = "a task's body")]
    pub(super) fn gate_and_up(
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
    pub(super) fn is_few_in(&self, w: &ExpertWeights, rows: usize) -> bool {
        self.is_few(w.gate.format(), rows) && self.is_few(w.up.format(), rows)
    }

    /// As [`Self::gate_and_up`], for a few rows: all the part's panels of gate, then all of up, as they lie in memory.
    #[allow(clippy::too_many_arguments, reason = "a task's body")]
    pub(super) fn gate_and_up_of_few(
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
        let mut run = |matrix: &PackedMatrix, bias: &Option<Vec<f32>>, out: &mut [f32]| {
            let x = inputs.of(Form::new(self.activations, matrix.format()));
            let buffer = &mut scratch.block;
            self.multiply_panels(matrix, panels.clone(), &x, group.rows, row_of, None, buffer, |panel, row, values| {
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
}
