//! A few rows, which are bound by the memory: it is read in long runs of panels, of codes several at once where that is
//! faster (see [`int8::streams`]). Bits are those of one panel after another.
use crate::activations::Rows;
use crate::gemm::{Kernels, Path, Tile};
use crate::int8::{self, Ahead, STREAMS};
use crate::packed::{Format, PANEL, PackedMatrix};
use std::ops::Range;

/// Bytes of a matrix that make a run: where threads take turns at shorter ones, each one's prefetcher reads into what is
/// the other's, and every run begins with misses (Zen 4, one token's experts on two threads: 28 in place of 26 GB/s).
const RUN: usize = 48 << 10;

impl Kernels {
    /// Whether so many rows are one tile's, and multiplied with the weights as they lie in memory.
    pub(crate) fn is_few(&self, format: Format, rows: usize) -> bool {
        let path = self.path(format, rows);
        path != Path::Lines && rows <= path.most(self.isa, format)
    }

    /// Panels of a matrix that a task takes at least, where all tasks of a region have `panels` of them.
    pub(crate) fn least_run(&self, w: &PackedMatrix, panels: usize) -> usize {
        let panel = PackedMatrix::packed_len(w.format(), PANEL, w.cols());
        // but some for each thread
        RUN.div_ceil(panel.max(1)).min(panels / (self.pool.threads() * 4)).max(1)
    }

    /// Multiplies a few rows of int8, row i being `x.row(index(i))`, with some panels of codes; `put(panel, i, values)` takes
    /// the results.
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
        let streams = int8::streams(self.isa, w.format());
        for first in panels.clone().step_by(streams) {
            let here = first..(first + streams).min(panels.end);
            let mut bytes: [&[u8]; STREAMS] = [&[]; STREAMS];
            for (bytes, index) in bytes.iter_mut().zip(here.clone()) {
                *bytes = w.panel(index);
            }
            let tiles = &mut tiles[..here.len()];
            let ahead = Ahead { from: bytes[0].as_ptr(), step: 0 };
            int8::multiply(self.isa, w.format(), &bytes[..here.len()], &slices[..rows], w.cols(), ahead, tiles);
            for (index, tile) in here.zip(tiles.iter()) {
                for (row, values) in tile.0[..rows].iter().enumerate() {
                    put(index, row, values);
                }
            }
        }
    }
}
