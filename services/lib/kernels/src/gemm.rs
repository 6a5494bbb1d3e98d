//! Matrix products with packed weights: `out[m, n] = x[m, k] · Wᵀ (+ bias)`, all f32 outside the weights.
//!
//! Accumulation is f32 by fused multiply-add, k ascending, one accumulator an output element: the result's bits do
//! not depend on m, on the tile or on the thread. Largest error against f64: k · 2⁻²⁴ relative to Σ|x·w|.
//! Outline: few rows of x run over the packed panel itself (`fused`, AVX-512). Otherwise a panel of 32 rows is expanded
//! to f32 once for all rows of x (f32 panels are read in place), then tiles of up to 8 rows of x run over it with 8 x 32
//! accumulators in registers.
#[cfg(target_arch = "x86_64")]
use crate::isa::Kind;
use crate::isa::{Isa, for_each_isa};
use crate::packed::{Format, PANEL, PackedMatrix, expand_panel};
use crate::pool::Pool;
use std::cell::RefCell;
use std::sync::Arc;

/// Rows of x in one tile.
const TILE: usize = 8;
/// Rows of x up to which weights are expanded in registers: one tile.
const FUSED_ROWS: usize = 8;

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// The kernels with their threads and instruction set.
#[derive(Clone)]
pub struct Kernels {
    pub(crate) pool: Arc<Pool>,
    pub(crate) isa: Isa,
}

/// A slice that several tasks write, each its own elements.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a> {
    pointer: *mut f32,
    len: usize,
    life: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: tasks write disjoint ranges only, which each caller of `slice` states.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(crate) fn new(slice: &'a mut [f32]) -> Self {
        Self { pointer: slice.as_mut_ptr(), len: slice.len(), life: std::marker::PhantomData }
    }

    /// A part of the slice.
    ///
    /// # Safety
    /// No other live reference covers any element of it.
    #[allow(clippy::mut_from_ref, reason = "that is what it is for; the contract is stated")]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [f32] {
        assert!(start.checked_add(len).is_some_and(|end| end <= self.len), "a task writes inside its output");
        // SAFETY: in bounds by the assertion; exclusive by the caller's word.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(start), len) }
    }
}

impl Kernels {
    /// Kernels on `threads` threads with the best instruction set.
    pub fn new(threads: usize) -> Self {
        Self::with_isa(threads, Isa::best())
    }

    /// Kernels with an instruction set of [`Isa::available`].
    pub fn with_isa(threads: usize, isa: Isa) -> Self {
        Self { pool: Pool::new(threads), isa }
    }

    /// Tasks that its threads ended so far: any thread sees by it whether a long computation gets on.
    pub fn advanced(&self) -> u64 {
        self.pool.advanced()
    }

    /// `out[m, n] = x[m, k] · Wᵀ + bias[n]`.
    ///
    /// # Panics
    /// When a slice's length is not what `m` and the matrix say.
    pub fn linear(&self, w: &PackedMatrix, x: &[f32], m: usize, bias: Option<&[f32]>, out: &mut [f32]) {
        let (n, k) = (w.rows(), w.cols());
        assert_eq!(x.len(), m * k, "x is [m, k]");
        assert_eq!(out.len(), m * n, "out is [m, n]");
        assert!(bias.is_none_or(|b| b.len() == n), "bias is [n]");
        let panels = w.panels();
        // a task is one panel or a few, so that a task is worth its dispatch
        let per_task = (16_384 / (k * m).max(1)).clamp(1, panels.max(1));
        let out = Shared::new(out);
        self.pool.run(panels.div_ceil(per_task), &|task| {
            for panel in task * per_task..((task + 1) * per_task).min(panels) {
                // SAFETY: a panel's task writes that panel's columns only.
                panel_product(self.isa, w, panel, x, m, bias, &|row, col, values: &[f32]| unsafe {
                    out.slice(row * n + col, values.len()).copy_from_slice(values);
                });
            }
        });
    }
}

/// Multiplies all rows of x with one panel; `put(row, first column, values)` takes the results.
pub(crate) fn panel_product(
    isa: Isa,
    w: &PackedMatrix,
    panel: usize,
    x: &[f32],
    m: usize,
    bias: Option<&[f32]>,
    put: &dyn Fn(usize, usize, &[f32]),
) {
    let (n, k) = (w.rows(), w.cols());
    let first = panel * PANEL;
    let width = PANEL.min(n - first);
    let finish = |row: usize, rows: usize, tile: &mut [[f32; PANEL]; TILE]| {
        for (r, accumulators) in tile[..rows].iter_mut().enumerate() {
            if let Some(bias) = bias {
                for (a, b) in accumulators.iter_mut().zip(&bias[first..first + width]) {
                    *a += b;
                }
            }
            put(row + r, first, &accumulators[..width]);
        }
    };
    let mut tile = [[0f32; PANEL]; TILE];
    if m <= FUSED_ROWS && fused_tile(isa, w, panel, x, m, &mut tile) {
        return finish(0, m, &mut tile);
    }
    SCRATCH.with_borrow_mut(|scratch| {
        let lines: &[f32] = match (w.format(), bytemuck::try_cast_slice(w.panel(panel))) {
            (Format::F32, Ok(lines)) => lines,
            _ => {
                scratch.resize(k * PANEL, 0.0);
                expand_panel(isa, w.format(), w.panel(panel), k, scratch);
                scratch
            }
        };
        for row in (0..m).step_by(TILE) {
            let rows = TILE.min(m - row);
            tile_product(isa, lines, &x[row * k..(row + rows) * k], k, rows, &mut tile);
            finish(row, rows, &mut tile);
        }
    });
}

/// Expands weights in registers, which pays for few rows: writing them out would cost more than the products. False,
/// and nothing done, where there is no such kernel for the format and the instruction set.
#[cfg(target_arch = "x86_64")]
fn fused_tile(
    isa: Isa,
    w: &PackedMatrix,
    panel: usize,
    x: &[f32],
    rows: usize,
    tile: &mut [[f32; PANEL]; TILE],
) -> bool {
    // SAFETY: a token of this kind is made only where the CPU has these parts of AVX-512.
    isa.kind() >= Kind::Avx512 && unsafe { crate::fused::tile(w.format(), w.panel(panel), x, w.cols(), rows, tile) }
}

#[cfg(not(target_arch = "x86_64"))]
fn fused_tile(_: Isa, _: &PackedMatrix, _: usize, _: &[f32], _: usize, _: &mut [[f32; PANEL]; TILE]) -> bool {
    false
}

for_each_isa! {
    /// `tile[r] += Σ_k x[r, k] · lines[k]` for `rows` rows.
    fn tile_product(lines: &[f32], x: &[f32], k: usize, rows: usize, tile: &mut [[f32; PANEL]; TILE]) => tile_body
}

#[inline(always)]
fn tile_body(lines: &[f32], x: &[f32], k: usize, rows: usize, tile: &mut [[f32; PANEL]; TILE]) {
    match rows {
        8 => tile_rows::<8>(lines, x, k, tile),
        7 => tile_rows::<7>(lines, x, k, tile),
        6 => tile_rows::<6>(lines, x, k, tile),
        5 => tile_rows::<5>(lines, x, k, tile),
        4 => tile_rows::<4>(lines, x, k, tile),
        3 => tile_rows::<3>(lines, x, k, tile),
        2 => tile_rows::<2>(lines, x, k, tile),
        _ => tile_rows::<1>(lines, x, k, tile),
    }
}

#[inline(always)]
fn tile_rows<const R: usize>(lines: &[f32], x: &[f32], k: usize, tile: &mut [[f32; PANEL]; TILE]) {
    let mut accumulators = [[0f32; PANEL]; R];
    let rows: [&[f32]; R] = std::array::from_fn(|r| &x[r * k..(r + 1) * k]);
    for (i, line) in lines.as_chunks::<PANEL>().0[..k].iter().enumerate() {
        for r in 0..R {
            let value = rows[r][i];
            for lane in 0..PANEL {
                accumulators[r][lane] = value.mul_add(line[lane], accumulators[r][lane]);
            }
        }
    }
    tile[..R].copy_from_slice(&accumulators);
}
