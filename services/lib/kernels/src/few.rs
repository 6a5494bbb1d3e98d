//! A few rows with several panels at once: what is bound by the memory is read in several streams (see
//! [`int8::has_streams`]). Bits are those of one panel after another.
use crate::activations::{ActivationFormat, Rows};
use crate::gemm::{Kernels, Tile};
use crate::int8::{self, Ahead, STREAMS};
use crate::packed::{Format, PANEL, PackedMatrix};
use std::ops::Range;

impl Kernels {
    /// Whether a product of so many rows is worth it: they must be one tile's, in int8, with q4. With q8 it was slower
    /// (an output matrix of 35 MB: 4.3 in place of 2.5 ms).
    pub(crate) fn is_few(&self, format: Format, rows: usize) -> bool {
        let is_q4 = self.activations == ActivationFormat::Int8 && matches!(format, Format::Q4 { .. });
        is_q4 && rows <= int8::rows_at_most(self.isa, format) && int8::has_streams(self.isa)
    }

    /// Multiplies a few rows with panels of one format, each to its own tile.
    pub(crate) fn few_of(&self, format: Format, panels: &[&[u8]], rows: &[&[u8]], k: usize, outs: &mut [Tile]) {
        let Some(first) = panels.first() else { return };
        int8::multiply(self.isa, format, panels, rows, k, Ahead { from: first.as_ptr(), step: 0 }, outs);
    }

    /// Multiplies a few rows, row i being `x.row(index(i))`, with some panels; `put(panel, i, values)` takes the results.
    pub(crate) fn few(
        &self,
        w: &PackedMatrix,
        panels: Range<usize>,
        x: &Rows<'_>,
        rows: usize,
        index: impl Fn(usize) -> usize,
        mut put: impl FnMut(usize, usize, &[f32; PANEL]),
    ) {
        let slices = x.tile(0..rows, index);
        let mut tiles: [Tile; STREAMS] = std::array::from_fn(|_| Tile::new());
        for first in panels.clone().step_by(STREAMS) {
            let here = first..(first + STREAMS).min(panels.end);
            let mut bytes: [&[u8]; STREAMS] = [&[]; STREAMS];
            for (bytes, index) in bytes.iter_mut().zip(here.clone()) {
                *bytes = w.panel(index);
            }
            let tiles = &mut tiles[..here.len()];
            self.few_of(w.format(), &bytes[..here.len()], &slices[..rows], w.cols(), tiles);
            for (index, tile) in here.zip(tiles.iter()) {
                for (row, values) in tile.0[..rows].iter().enumerate() {
                    put(index, row, values);
                }
            }
        }
    }
}
