//! Matrix products with packed weights: `out[m, n] = x[m, k] · Wᵀ (+ bias)`, x and out f32.
//!
//! q8 and q4: x is quantized once to int8 in groups and multiplied as integers (`activations`, `int8`). bf16: x is rounded
//! once to bf16 (error at most 2⁻⁹ of a value) and multiplied in pairs of columns, of which the second comes first
//! (`fused`). f32, and the others where [`ActivationFormat::F32`] asks: the weights are widened to f32, k ascending.
//! Accumulation is f32 by fused multiply-add, one accumulator an output element; largest error against f64 of what is
//! multiplied: k · 2⁻²⁴ relative to Σ|x·w|. The result's bits do not depend on m, on the tile or on the thread.
//! Outline: a task is a run of panels of 32 rows; tiles of up to 8 rows of x run over each panel with their accumulators in
//! registers, and ask for the memory of the next panel on the way.
use crate::activations::{ActivationFormat, Buffer, Form, Rows, with};
use crate::bf16::Number;
#[cfg(target_arch = "x86_64")]
use crate::fused;
use crate::inputs::{Buffers, Inputs};
use crate::int8::{self, Ahead};
#[cfg(target_arch = "x86_64")]
use crate::isa::Kind;
use crate::isa::{Isa, for_each_isa};
use crate::packed::{self, Format, PANEL, PackedMatrix, expand_panel};
use crate::pool::Pool;
use crate::runs::Runs;
use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

/// Rows of x in one tile at most.
pub(crate) const TILE: usize = 8;
/// Bytes of rows of x that a task takes at a time: they and some panels fit the second cache.
const BLOCK: usize = 384 << 10;
/// Values that a thread quantizes in the time in which a second one would wake up.
const ALONE: usize = 16_384;

/// Results of a tile: a row of x, 32 rows of a panel.
#[repr(align(64))]
pub(crate) struct Tile(pub(crate) [[f32; PANEL]; TILE]);

impl Tile {
    pub(crate) fn new() -> Self {
        Self([[0.0; PANEL]; TILE])
    }
}

thread_local! {
    /// The caller's quantized rows.
    pub(crate) static ROWS: Cell<Buffers> = Cell::default();
    /// The caller's tasks: a product's index, and which of its panels.
    static TASKS: Cell<Vec<(usize, Range<usize>)>> = Cell::default();
    /// A task's expanded panel.
    static LINES: Cell<Buffer> = Cell::default();
}

/// The kernels with their threads and instruction set.
#[derive(Clone)]
pub struct Kernels {
    pub(crate) pool: Arc<Pool>,
    pub(crate) isa: Isa,
    pub(crate) activations: ActivationFormat,
}

/// A slice that several tasks write, each its own elements.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a, T = f32> {
    pointer: *mut T,
    len: usize,
    life: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: tasks write disjoint ranges only, which each caller of `slice` states.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { pointer: slice.as_mut_ptr(), len: slice.len(), life: std::marker::PhantomData }
    }

    /// A part of the slice.
    ///
    /// # Safety
    /// No other live reference covers any element of it.
    #[allow(clippy::mut_from_ref, reason = "that is what it is for; the contract is stated")]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start.checked_add(len).is_some_and(|end| end <= self.len), "a task writes inside its output");
        // SAFETY: in bounds by the assertion; exclusive by the caller's word.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(start), len) }
    }
}

/// A matrix product of [`Kernels::linears`].
pub struct Product<'a> {
    /// `[n, k]`.
    pub weight: &'a PackedMatrix,
    /// `[n]`.
    pub bias: Option<&'a [f32]>,
    /// `[m, n]`.
    pub out: &'a mut [f32],
}

/// A product, ready to run. The parts of a region write to places of their own.
#[derive(Clone, Copy)]
pub(crate) struct Part<'a> {
    pub(crate) weight: &'a PackedMatrix,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) x: Rows<'a>,
    pub(crate) form: Form,
    pub(crate) m: usize,
    /// Row i of the product is that of row `i · heads + head` of x.
    pub(crate) heads: usize,
    pub(crate) head: usize,
    /// `[m, width]`; the product's columns start at `column`.
    pub(crate) out: Shared<'a>,
    pub(crate) width: usize,
    pub(crate) column: usize,
}

impl Kernels {
    /// Kernels on `threads` threads with the best instruction set; products with q8 and q4 take int8 activations, those with
    /// bf16 bf16 ones.
    pub fn new(threads: usize) -> Self {
        Self::with_isa(threads, Isa::best())
    }

    /// Kernels with an instruction set of [`Isa::available`].
    pub fn with_isa(threads: usize, isa: Isa) -> Self {
        Self { pool: Pool::new(threads), isa, activations: ActivationFormat::default() }
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The same kernels and threads with another format of activations.
    #[must_use]
    pub fn with_activations(mut self, activations: ActivationFormat) -> Self {
        self.activations = activations;
        self
    }

    /// Tasks that its threads ended so far: any thread sees by it whether a long computation gets on.
    pub fn advanced(&self) -> u64 {
        self.pool.advanced()
    }

    /// Says which matrix the next product begins with, most likely: threads that wait meanwhile read ahead. What the
    /// caller's own first task reads is left out.
    pub fn expect(&self, w: &PackedMatrix) {
        self.expect_from(w, Runs::new(w.panels(), self.pool.threads()).fair());
    }

    /// As [`Self::expect`], from a panel on.
    pub(crate) fn expect_from(&self, w: &PackedMatrix, panel: usize) {
        self.pool.expect(w.panels_from(panel.min(w.panels())));
    }

    /// `out[m, n] = x[m, k] · Wᵀ + bias[n]`.
    ///
    /// # Panics
    /// When a slice's length is not what `m` and the matrix say.
    pub fn linear(&self, w: &PackedMatrix, x: &[f32], m: usize, bias: Option<&[f32]>, out: &mut [f32]) {
        self.linears(x, m, [Product { weight: w, bias, out }]);
    }

    /// Products with the same x `[m, k]`: x is quantized once, and the threads meet once.
    ///
    /// # Panics
    /// When a slice's length is not what `m` and its matrix say.
    pub fn linears<const N: usize>(&self, x: &[f32], m: usize, products: [Product<'_>; N]) {
        let Some(first) = products.first() else { return };
        let k = first.weight.cols();
        assert_eq!(x.len(), m * k, "x is [m, k]");
        for Product { weight, bias, out } in &products {
            assert_eq!(weight.cols(), k, "all matrices have k columns");
            assert_eq!(out.len(), m * weight.rows(), "out is [m, n]");
            assert!(bias.is_none_or(|b| b.len() == weight.rows()), "bias is [n]");
        }
        with(&ROWS, |buffers| {
            let inputs = Inputs::new(self, x, k, buffers, products.iter().map(|product| product.weight));
            let parts = products.map(|Product { weight, bias, out }| {
                let form = Form::new(self.activations, weight.format());
                let (x, out, width) = (inputs.of(form), Shared::new(out), weight.rows());
                Part { weight, bias, x, form, m, heads: 1, head: 0, out, width, column: 0 }
            });
            self.run_parts(&parts);
        });
    }

    /// Runs products in one region.
    pub(crate) fn run_parts(&self, parts: &[Part<'_>]) {
        with(&TASKS, |tasks| {
            tasks.clear();
            let total = parts.iter().map(|part| part.weight.panels()).sum::<usize>();
            let mut runs = Runs::new(total, self.pool.threads());
            for (index, Part { weight, m, .. }) in parts.iter().enumerate() {
                let panels = weight.panels();
                // each worth its dispatch; and where rows are many, panels that stay in a cache
                let worth = PackedMatrix::packed_len(weight.format(), PANEL, weight.cols()) * m;
                let run = if *m <= TILE { self.least_run(weight, total) } else { 1 };
                let least = (16_384 / worth.max(1)).max(run);
                let most = if *m > TILE { 16.max(least) } else { panels };
                runs.cut(panels, least, most, |run| tasks.push((index, run)));
            }
            let tasks = &*tasks;
            self.pool.run(tasks.len(), &|task| {
                let (part, panels) = &tasks[task];
                with(&LINES, |lines| self.multiply(&parts[*part], panels.clone(), lines));
            });
        });
    }

    /// One task of a product: some panels over all rows.
    fn multiply(&self, part: &Part<'_>, panels: Range<usize>, lines: &mut Buffer) {
        let Part { weight: w, bias, x, form, m, heads, head, out, width: out_width, column } = *part;
        let (n, k) = (w.rows(), w.cols());
        let block = match self.path(w.format(), m) {
            // weights that are expanded serve all rows
            Path::Lines => m.max(1),
            _ => (BLOCK / form.row_bytes(k).max(1)).max(4 * TILE),
        };
        // rows of x that stay in a cache while the task's panels run over them
        for first_row in (0..m).step_by(block) {
            let rows = block.min(m - first_row);
            let row_of = |row| (first_row + row) * heads + head;
            let put = |index: usize, row: usize, values: &[f32; PANEL]| {
                let (first, width) = (index * PANEL, PANEL.min(n - index * PANEL));
                // SAFETY: a panel's task writes that panel's columns only.
                let out = unsafe { out.slice((first_row + row) * out_width + column + first, width) };
                out.copy_from_slice(&values[..width]);
                if let Some(bias) = bias {
                    out.iter_mut().zip(&bias[first..first + width]).for_each(|(out, bias)| *out += bias);
                }
            };
            self.multiply_panels(w, panels.clone(), &x, rows, row_of, None, lines, put);
        }
    }

    /// Multiplies all rows, row i being `x.row(index(i))`, with some panels; `put(panel, i, values)` takes the results.
    /// `following` is what is read after them; weights that must be expanded are written to the buffer.
    #[allow(clippy::too_many_arguments, reason = "a task's body")]
    pub(crate) fn multiply_panels(
        &self,
        w: &PackedMatrix,
        panels: Range<usize>,
        x: &Rows<'_>,
        rows: usize,
        index: impl Fn(usize) -> usize,
        following: Option<&[u8]>,
        buffer: &mut Buffer,
        mut put: impl FnMut(usize, usize, &[f32; PANEL]),
    ) {
        let path = self.path(w.format(), rows);
        if path == Path::Codes && rows <= path.most(self.isa, w.format()) {
            return self.few(w, panels, x, rows, index, put);
        }
        for at in panels.clone() {
            let next = if at + 1 < panels.end { Some(w.panel(at + 1)) } else { following };
            let panel = Panel::new(self, w, at, rows, next, buffer);
            panel.for_each_tile(x, &index, |row, values| put(at, row, values));
        }
    }

    /// Rows of k values in a form; what is not there yet is written to the buffer.
    pub(crate) fn rows<'a>(&self, form: Form, x: &'a [f32], k: usize, buffer: &'a mut Buffer) -> Rows<'a> {
        if form == Form::Float || k == 0 {
            return Rows::new(Form::Float, k, bytemuck::cast_slice(x));
        }
        let (rows, stride) = (x.len() / k, form.row_bytes(k));
        let bytes = buffer.bytes(rows * stride);
        if x.len() <= ALONE {
            for (x, out) in x.chunks_exact(k).zip(bytes.chunks_exact_mut(stride)) {
                form.write(self.isa, x, out);
            }
        } else {
            let per_task = (ALONE / 2).div_ceil(k);
            let out = Shared::new(&mut *bytes);
            self.pool.run(rows.div_ceil(per_task), &|task| {
                for row in task * per_task..((task + 1) * per_task).min(rows) {
                    // SAFETY: a row is written by the task that owns it.
                    form.write(self.isa, &x[row * k..(row + 1) * k], unsafe { out.slice(row * stride, stride) });
                }
            });
        }
        Rows::new(form, k, bytes)
    }
}

/// One panel, ready to be multiplied with rows.
pub(crate) struct Panel<'a> {
    isa: Isa,
    format: Format,
    form: Form,
    path: Path,
    k: usize,
    rows: usize,
    bytes: &'a [u8],
    /// f32 lines, where the path wants them.
    lines: &'a [f32],
    /// What will be read after all passes over it.
    next: *const u8,
}

/// How weights come into a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    /// As codes, for int8 rows.
    Codes,
    /// As pairs of bf16, for bf16 rows.
    #[cfg(target_arch = "x86_64")]
    Pairs,
    /// bf16, widened in registers.
    #[cfg(target_arch = "x86_64")]
    Widened,
    /// As f32 lines in memory.
    Lines,
}

impl Path {
    /// The most rows that one tile takes.
    pub(crate) fn most(self, isa: Isa, format: Format) -> usize {
        if self == Self::Codes { int8::rows_at_most(isa, format) } else { TILE }
    }
}

impl Kernels {
    /// How weights come into a product with so many rows.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables, reason = "there is one path for any number"))]
    pub(crate) fn path(&self, format: Format, rows: usize) -> Path {
        let form = Form::new(self.activations, format);
        match (form, format) {
            (Form::Int8 { .. }, _) => Path::Codes,
            #[cfg(target_arch = "x86_64")]
            (Form::Bf16, _) if self.isa.kind() == Kind::Avx512Bf16 => Path::Pairs,
            #[cfg(target_arch = "x86_64")]
            (_, Format::Bf16) if self.isa.kind() >= Kind::Avx512 && rows <= TILE => Path::Widened,
            _ => Path::Lines,
        }
    }
}

impl<'a> Panel<'a> {
    /// Panel `index` of w for `rows` rows; `next` is what will be read after all passes over it. Weights that must be
    /// expanded are written to the buffer.
    pub(crate) fn new(
        kernels: &Kernels,
        w: &'a PackedMatrix,
        index: usize,
        rows: usize,
        next: Option<&'a [u8]>,
        buffer: &'a mut Buffer,
    ) -> Self {
        let (isa, format, k, bytes) = (kernels.isa, w.format(), w.cols(), w.panel(index));
        let path = kernels.path(format, rows);
        let lines = match (path, bytemuck::try_cast_slice(bytes)) {
            (Path::Lines, Ok(lines)) if format == Format::F32 => lines,
            (Path::Lines, _) => {
                let lines = buffer.floats(k * PANEL);
                expand_panel(isa, format, bytes, k, lines);
                lines
            }
            _ => &[],
        };
        let form = Form::new(kernels.activations, format);
        Self { isa, format, form, path, k, rows, bytes, lines, next: next.unwrap_or(bytes).as_ptr() }
    }

    /// The most rows that one tile takes.
    pub(crate) fn most(&self) -> usize {
        self.path.most(self.isa, self.format)
    }

    /// What pass `pass` of `passes` over this panel asks for: its part of the next panel. Where there is one pass only,
    /// just what it reads: asking ahead fills the first cache's miss buffers, and the processor's own prefetcher into
    /// the second one is faster (one thread, one token: 21 in place of 14 GB/s).
    fn ahead(&self, pass: usize, passes: usize) -> Ahead {
        let bytes = self.bytes;
        let from = if passes > 1 { self.next.wrapping_add(bytes.len() / passes * pass) } else { bytes.as_ptr() };
        Ahead { from, step: packed::LINE / passes.min(packed::LINE) }
    }

    /// Multiplies one tile's rows.
    pub(crate) fn multiply(&self, rows: &[&[u8]], pass: usize, passes: usize, out: &mut Tile) {
        match self.path {
            Path::Codes => {
                let (ahead, out) = (self.ahead(pass, passes), std::slice::from_mut(out));
                int8::multiply(self.isa, self.format, &[self.bytes], rows, self.k, ahead, out);
            }
            #[cfg(target_arch = "x86_64")]
            // SAFETY: such a path is taken only with tokens of a kind with AVX-512 and its BF16.
            Path::Pairs => unsafe { fused::pairs(self.bytes, rows, self.k, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: such a path is taken only with tokens of kinds with these parts of AVX-512.
            Path::Widened => unsafe {
                match self.form {
                    Form::Bf16 => fused::widened::<u16>(self.bytes, &numbers(rows)[..rows.len()], self.k, out),
                    _ => fused::widened::<f32>(self.bytes, &numbers(rows)[..rows.len()], self.k, out),
                }
            },
            Path::Lines => match self.form {
                Form::Bf16 => pair_product(self.isa, self.lines, &numbers(rows)[..rows.len()], self.k, out),
                _ => tile_product(self.isa, self.lines, &numbers(rows)[..rows.len()], self.k, out),
            },
        }
    }

    /// Multiplies all rows, row i being `x.row(index(i))`; `put(i, values)` takes the results.
    pub(crate) fn for_each_tile(
        &self,
        x: &Rows<'_>,
        index: impl Fn(usize) -> usize,
        mut put: impl FnMut(usize, &[f32; PANEL]),
    ) {
        let passes = self.rows.div_ceil(self.most());
        let mut tile = Tile::new();
        for pass in 0..passes {
            let (start, end) = (self.rows * pass / passes, self.rows * (pass + 1) / passes);
            let rows = x.tile(start..end, &index);
            self.multiply(&rows[..end - start], pass, passes, &mut tile);
            for (i, values) in (start..end).zip(&tile.0) {
                put(i, values);
            }
        }
    }
}

/// Rows of numbers, from their bytes.
fn numbers<'a, T: Number>(rows: &[&'a [u8]]) -> [&'a [T]; TILE] {
    let mut numbers: [&[T]; TILE] = [&[]; TILE];
    for (numbers, row) in numbers.iter_mut().zip(rows) {
        *numbers = bytemuck::cast_slice(row);
    }
    numbers
}

for_each_isa! {
    /// `out[r] = Σ_k x[r, k] · lines[k]`.
    fn tile_product(lines: &[f32], x: &[&[f32]], k: usize, out: &mut Tile) => tile_body
}

for_each_isa! {
    /// The same with rows of bf16, in pairs of columns.
    fn pair_product(lines: &[f32], x: &[&[u16]], k: usize, out: &mut Tile) => tile_body
}

#[inline(always)]
fn tile_body<T: Number>(lines: &[f32], x: &[&[T]], k: usize, out: &mut Tile) {
    match x.len() {
        8 => tile_rows::<T, 8>(lines, x, k, out),
        7 => tile_rows::<T, 7>(lines, x, k, out),
        6 => tile_rows::<T, 6>(lines, x, k, out),
        5 => tile_rows::<T, 5>(lines, x, k, out),
        4 => tile_rows::<T, 4>(lines, x, k, out),
        3 => tile_rows::<T, 3>(lines, x, k, out),
        2 => tile_rows::<T, 2>(lines, x, k, out),
        _ => tile_rows::<T, 1>(lines, x, k, out),
    }
}

#[inline(always)]
fn tile_rows<T: Number, const R: usize>(lines: &[f32], x: &[&[T]], k: usize, out: &mut Tile) {
    let mut accumulators = [[0f32; PANEL]; R];
    let rows: [&[T]; R] = std::array::from_fn(|r| &x[r][..k]);
    let lines = &lines.as_chunks::<PANEL>().0[..k];
    for i in 0..k {
        let column = T::column(i, k);
        let line = &lines[column];
        for r in 0..R {
            let value = rows[r][column].widen();
            for lane in 0..PANEL {
                accumulators[r][lane] = value.mul_add(line[lane], accumulators[r][lane]);
            }
        }
    }
    out.0[..R].copy_from_slice(&accumulators);
}
