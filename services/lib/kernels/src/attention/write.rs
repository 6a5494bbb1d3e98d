//! `{isa}-{f32,bf16,int8}-write`: keys and values into the blocks, in the order that `layout` describes.
//!
//! Shapes: k `[tokens, kv_heads, k_dim]`, v `[tokens, kv_heads, v_dim]`, f32. bf16 is rounded to the nearest, ties to
//! even; int8 to the nearest, ties away from zero, by a token's and head's own scale (see `layout`), so its error is at
//! most half a scale and a rounding. Every number depends on its own token and head only.
//! Outline: what is written at a time is one KV head of a *run*, up to 16 tokens that share their lines of keys. 16
//! dimensions of all its tokens are converted as they lie and then put into their lines, which are neighbours in keys as
//! in values. Many tokens are split over the threads by (run, KV head), whose bytes nobody else writes.
use super::AttentionSequence;
use super::layout::{BLOCK, KvFormat, KvLayer, KvShape, LANES};
use crate::bf16::round;
use crate::gemm::{Kernels, Shared};
use crate::isa::{Isa, for_each_isa};
use std::ops::Range;

/// Values that are worth a task: some microseconds.
const TASK: usize = 1 << 13;

/// Consecutive tokens of one run of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    block: u32,
    /// The first token's place in the block.
    slot: usize,
    /// At most up to the next multiple of 16.
    tokens: usize,
    /// The first token's place in k and v.
    row: usize,
}

/// Cuts the sequences' queries into runs; `put` takes them in order.
fn cut(sequences: &[AttentionSequence<'_>], mut put: impl FnMut(Run)) {
    let mut row = 0;
    for sequence in sequences {
        let end = sequence.start + sequence.queries;
        let mut position = sequence.start;
        while position < end {
            let tokens = (LANES - position % LANES).min(end - position);
            put(Run { block: sequence.blocks[position / BLOCK], slot: position % BLOCK, tokens, row });
            (position, row) = (position + tokens, row + tokens);
        }
    }
}

impl Kernels {
    /// Writes the keys `[tokens, kv_heads, k_dim]` and values `[tokens, kv_heads, v_dim]` (empty with `v_in_k`) of the
    /// sequences' queries, one sequence after another.
    ///
    /// # Panics
    /// When a slice's length or a block is not what the shapes say.
    pub fn write_kv(&self, kv: &mut KvLayer, sequences: &[AttentionSequence<'_>], k: &[f32], v: &[f32]) {
        let tokens = sequences.iter().map(|sequence| sequence.queries).sum();
        let (isa, heads) = (self.isa, kv.shape().kv_heads);
        let writer = Writer::new(isa, kv, tokens, k, v);
        let tasks = ((k.len() + v.len()) / TASK).min(self.pool.threads() * 4);
        let mut runs = Vec::new();
        if tasks > 1 && self.pool.threads() > 1 {
            cut(sequences, |run| runs.push(run));
        }
        if runs.is_empty() || !are_apart(&runs) {
            // SAFETY: one thread writes one part after another.
            return cut(sequences, |run| (0..heads).for_each(|head| unsafe { writer.write(&run, head) }));
        }
        let parts = runs.len() * heads;
        let tasks = tasks.min(parts);
        self.pool.run(tasks, &|task| {
            for part in parts * task / tasks..parts * (task + 1) / tasks {
                // SAFETY: the runs are apart, so each (run, head) has bytes of its own, and it is in one task.
                unsafe { writer.write(&runs[part / heads], part % heads) };
            }
        });
    }
}

impl KvLayer {
    /// Writes one token's keys `[kv_heads, k_dim]` and values `[kv_heads, v_dim]` (empty with `v_in_k`).
    ///
    /// # Panics
    /// When the block or slot does not exist or a length is wrong.
    pub fn write(&mut self, block: u32, slot: usize, k: &[f32], v: &[f32]) {
        let heads = self.shape().kv_heads;
        let writer = Writer::new(Isa::best(), self, 1, k, v);
        let run = Run { block, slot, tokens: 1, row: 0 };
        // SAFETY: one thread writes one part after another.
        (0..heads).for_each(|head| unsafe { writer.write(&run, head) });
    }
}

/// Whether no two runs share lines. Only a caller who gives a block to two sequences has others.
fn are_apart(runs: &[Run]) -> bool {
    let mut places: Vec<_> = runs.iter().map(|run| (run.block, run.slot / LANES)).collect();
    places.sort_unstable();
    places.windows(2).all(|pair| pair[0] != pair[1])
}

/// What all parts of a call share.
struct Writer<'a> {
    isa: Isa,
    shape: KvShape,
    blocks: usize,
    bytes: Shared<'a, u8>,
    k: &'a [f32],
    v: &'a [f32],
}

impl<'a> Writer<'a> {
    fn new(isa: Isa, kv: &'a mut KvLayer, tokens: usize, k: &'a [f32], v: &'a [f32]) -> Self {
        let (shape, blocks) = (*kv.shape(), kv.blocks());
        let v_dim = if shape.v_in_k { 0 } else { shape.v_dim };
        assert_eq!(k.len(), tokens * shape.kv_heads * shape.k_dim, "k is [tokens, kv_heads, k_dim]");
        assert_eq!(v.len(), tokens * shape.kv_heads * v_dim, "v is [tokens, kv_heads, v_dim]");
        Self { isa, shape, blocks, bytes: Shared::new(kv.bytes_mut()), k, v }
    }

    /// Writes a run's keys and values of one head.
    ///
    /// # Safety
    /// Nobody else reads or writes this head's numbers of the run of 16 tokens meanwhile.
    unsafe fn write(&self, run: &Run, head: usize) {
        let (shape, blocks) = (self.shape, self.blocks);
        let Run { block, slot, tokens, row } = *run;
        assert!((block as usize) < blocks && slot < BLOCK, "block {block}, slot {slot} of {blocks}");
        let start = block as usize * shape.block_len();
        let rows = |values, dim| Rows { values, first: row, tokens, head, heads: shape.kv_heads, dim };
        let (keys, values) = (rows(self.k, shape.k_dim), rows(self.v, shape.v_dim));
        let keys_at = start + head * shape.key_bytes();
        // SAFETY: by the caller's word, since all that is written is this head's and this run's.
        unsafe { self.write_side(true, keys_at, slot, &keys) };
        if !shape.v_in_k {
            let values_at = start + shape.kv_heads * shape.key_bytes() + head * shape.value_bytes();
            // SAFETY: as above.
            unsafe { self.write_side(false, values_at, slot, &values) };
        }
    }

    /// Writes rows to a head's keys or values, whose bytes start at `start`.
    ///
    /// # Safety
    /// As [`Self::write`].
    unsafe fn write_side(&self, keys: bool, start: usize, slot: usize, rows: &Rows<'_>) {
        let (isa, shape) = (self.isa, self.shape);
        // SAFETY: by the caller's word.
        let part = |at: Range<usize>| unsafe { self.bytes.slice(start + at.start, at.len()) };
        let mut scales = [0f32; LANES];
        if shape.format == KvFormat::Int8 {
            let scales = &mut scales[..rows.tokens];
            find_scales(isa, rows, scales);
            part(slot * 4..(slot + rows.tokens) * 4).copy_from_slice(bytemuck::cast_slice(scales));
        }
        let (run, lane) = (slot / LANES, slot % LANES);
        for square in 0..rows.dim.div_ceil(LANES) {
            let at = if keys { shape.key_square(run, square) } else { shape.value_square(run, square) };
            put_square(isa, shape.format, rows, square * LANES, &scales, lane, keys, part(at));
        }
    }
}

/// One head's rows of consecutive tokens in `[tokens, heads, dim]`.
struct Rows<'a> {
    values: &'a [f32],
    first: usize,
    tokens: usize,
    head: usize,
    heads: usize,
    dim: usize,
}

impl Rows<'_> {
    fn row(&self, token: usize) -> &[f32] {
        &self.values[((self.first + token) * self.heads + self.head) * self.dim..][..self.dim]
    }
}

for_each_isa! {
    /// Each token's scale in int8.
    fn find_scales(rows: &Rows<'_>, scales: &mut [f32]) => find_scales_body
}

#[inline(always)]
fn find_scales_body(rows: &Rows<'_>, scales: &mut [f32]) {
    for (token, scale) in scales.iter_mut().enumerate() {
        // as integers magnitudes have the same order, and the largest are those that are no numbers
        let largest = rows.row(token).iter().fold(0, |largest: u32, v| largest.max(v.to_bits() & 0x7fff_ffff));
        let largest = f32::from_bits(largest);
        *scale = if largest.is_finite() { largest / 127.0 } else { f32::NAN };
    }
}

for_each_isa! {
    /// Puts 16 dimensions, from `first`, of the tokens' rows into lines of keys `[dimensions][16 tokens]` or of values
    /// `[16 tokens][16 dimensions]`, where in pairs the outer index is a pair's and the inner one is followed by the
    /// pair's two. The first token is number `lane` of the 16.
    fn put_square(
        format: KvFormat,
        rows: &Rows<'_>,
        first: usize,
        scales: &[f32; LANES],
        lane: usize,
        keys: bool,
        lines: &mut [u8],
    ) => put_square_body
}

#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "a kernel's inner call")]
fn put_square_body(
    format: KvFormat,
    rows: &Rows<'_>,
    first: usize,
    scales: &[f32; LANES],
    lane: usize,
    keys: bool,
    lines: &mut [u8],
) {
    let values = |token: usize| rows.row(token)[first..].iter().take(LANES);
    match format {
        KvFormat::F32 => {
            let convert = |token: usize, out: &mut [f32; LANES]| {
                out.iter_mut().zip(values(token)).for_each(|(out, v)| *out = *v);
            };
            put_body::<f32, 1>(rows, first, lane, keys, convert, bytemuck::cast_slice_mut(lines));
        }
        KvFormat::Bf16 => {
            let convert = |token: usize, out: &mut [u16; LANES]| {
                out.iter_mut().zip(values(token)).for_each(|(out, v)| *out = (round(*v) >> 16) as u16);
            };
            put_body::<u16, 2>(rows, first, lane, keys, convert, bytemuck::cast_slice_mut(lines));
        }
        KvFormat::Int8 => {
            let convert = |token: usize, out: &mut [i8; LANES]| {
                let scale = scales[token];
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                // what is no number becomes 0
                let code = |v: f32| v.round().clamp(-127.0, 127.0) as i32 as i8;
                if inverse.is_finite() {
                    out.iter_mut().zip(values(token)).for_each(|(out, v)| *out = code(v * inverse));
                } else {
                    // the inverse of a denormal overflows
                    out.iter_mut().zip(values(token)).for_each(|(out, v)| *out = code(v / scale));
                }
            };
            put_body::<i8, 2>(rows, first, lane, keys, convert, bytemuck::cast_slice_mut(lines));
        }
    }
}

/// As [`put_square`], with P numbers of a token (in keys) or a dimension (in values) side by side.
#[inline(always)]
fn put_body<T: Copy + Default, const P: usize>(
    rows: &Rows<'_>,
    first: usize,
    lane: usize,
    keys: bool,
    convert: impl Fn(usize, &mut [T; LANES]),
    lines: &mut [T],
) {
    // zeros fill up a pair of keys: the query has a zero there too, which must not meet a NaN
    let mut numbers = [[T::default(); LANES]; LANES];
    let numbers = &mut numbers[..rows.tokens];
    numbers.iter_mut().enumerate().for_each(|(token, numbers)| convert(token, numbers));
    let lines = lines.as_chunks_mut::<P>().0.as_chunks_mut::<LANES>().0;
    if keys {
        for (step, line) in lines.iter_mut().enumerate() {
            for (to, numbers) in line[lane..].iter_mut().zip(&*numbers) {
                *to = numbers.as_chunks().0[step];
            }
        }
    } else {
        let dims = (rows.dim - first).min(LANES);
        for (token, numbers) in numbers.iter().enumerate() {
            let (line, half) = ((lane + token) / P, (lane + token) % P);
            lines[line].iter_mut().zip(&numbers[..dims]).for_each(|(to, number)| to[half] = *number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    /// Numbers of every kind, a row of no numbers here and there.
    fn values(seed: usize, len: usize, row: usize) -> Vec<f32> {
        let value = |i: usize| {
            let noise = ((i * 7_919 + seed * 104_729) % 10_007) as f32 / 5_000.0 - 1.0;
            match (i / row % 23, i % 5) {
                (3, _) => noise * 1e-41,
                (7, _) => 0.0,
                (11, 2) => f32::NAN,
                (13, 1) => f32::NEG_INFINITY,
                (17, 3) => f32::MAX,
                (19, _) => noise * 1e-37,
                _ => noise,
            }
        };
        (0..len).map(value).collect()
    }

    /// The definition: one number after another, as the table of `layout` says.
    fn put(shape: &KvShape, head: &mut [u8], keys: bool, slot: usize, row: &[f32]) {
        let (run, lane) = (slot / LANES, slot % LANES);
        let place = |d: usize| match (shape.format, keys) {
            (KvFormat::F32, true) => (run * shape.k_dim + d) * LANES + lane,
            (KvFormat::F32, false) => (d / LANES * BLOCK + slot) * LANES + d % LANES,
            (_, true) => ((run * shape.k_dim.div_ceil(2) + d / 2) * LANES + lane) * 2 + d % 2,
            (_, false) => ((d / LANES * BLOCK / 2 + slot / 2) * LANES + d % LANES) * 2 + slot % 2,
        };
        let finite = row.iter().all(|v| v.is_finite());
        let scale = if finite { row.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0 } else { f32::NAN };
        if shape.format == KvFormat::Int8 {
            head[slot * 4..][..4].copy_from_slice(&scale.to_le_bytes());
        }
        let filled = if keys && shape.format != KvFormat::F32 { row.len().next_multiple_of(2) } else { row.len() };
        for d in 0..filled {
            let v = row.get(d).copied().unwrap_or(0.0);
            match shape.format {
                KvFormat::F32 => head[place(d) * 4..][..4].copy_from_slice(&v.to_le_bytes()),
                KvFormat::Bf16 => head[place(d) * 2..][..2].copy_from_slice(&bf16::from_f32(v).to_le_bytes()),
                KvFormat::Int8 => {
                    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                    let code = if inverse.is_finite() { v * inverse } else { v / scale };
                    head[BLOCK * 4 + place(d)] = code.round().clamp(-127.0, 127.0) as i8 as u8;
                }
            }
        }
    }

    const BLOCKS: usize = 12;

    /// All blocks' bytes after `write`, every byte having been 0x5a.
    fn bytes(shape: KvShape, write: impl FnOnce(&mut KvLayer)) -> Vec<u8> {
        let mut kv = KvLayer::new(shape, BLOCKS).expect("a few blocks fit in memory");
        kv.bytes_mut().fill(0x5a);
        write(&mut kv);
        kv.bytes_mut().to_vec()
    }

    #[test]
    fn every_number_stands_at_its_place_and_nothing_else_is_touched() {
        let runs: [&[AttentionSequence<'_>]; 4] = [
            &[AttentionSequence { blocks: &[2], start: 37, queries: 1 }],
            &[AttentionSequence { blocks: &[4, 1, 3], start: 5, queries: 150 }],
            &[
                AttentionSequence { blocks: &[5, 0], start: 63, queries: 2 },
                AttentionSequence { blocks: &[6], start: 0, queries: 0 },
                AttentionSequence { blocks: &[11, 7, 8, 9, 10, 2], start: 1, queries: 370 },
            ],
            // both write into one run, the second over the first
            &[
                AttentionSequence { blocks: &[3, 1], start: 0, queries: 100 },
                AttentionSequence { blocks: &[3, 2], start: 15, queries: 100 },
            ],
        ];
        for (kv_heads, k_dim, v_dim, v_in_k) in
            [(2, 64, 64, false), (3, 9, 17, false), (1, 33, 20, true), (4, 128, 130, false), (1, 1, 1, false)]
        {
            for format in [KvFormat::F32, KvFormat::Bf16, KvFormat::Int8] {
                let shape = KvShape { kv_heads, k_dim, v_dim, v_in_k, format };
                for sequences in runs {
                    let tokens: usize = sequences.iter().map(|s| s.queries).sum();
                    let k = values(1, tokens * kv_heads * k_dim, k_dim);
                    let v = if v_in_k { vec![] } else { values(2, tokens * kv_heads * v_dim, v_dim) };
                    let v_row = v.len() / tokens;
                    let want = bytes(shape, |kv| {
                        let mut row = 0;
                        for s in sequences {
                            for position in s.start..s.start + s.queries {
                                let block = s.blocks[position / BLOCK] as usize * shape.block_len();
                                let block = &mut kv.bytes_mut()[block..][..shape.block_len()];
                                let (keys, values) = block.split_at_mut(kv_heads * shape.key_bytes());
                                let slot = position % BLOCK;
                                for head in 0..kv_heads {
                                    let key = &k[(row * kv_heads + head) * k_dim..][..k_dim];
                                    put(&shape, &mut keys[head * shape.key_bytes()..], true, slot, key);
                                    if !v_in_k {
                                        let value = &v[(row * kv_heads + head) * v_dim..][..v_dim];
                                        put(&shape, &mut values[head * shape.value_bytes()..], false, slot, value);
                                    }
                                }
                                row += 1;
                            }
                        }
                    });
                    for isa in Isa::available() {
                        for threads in [1, 3] {
                            let kernels = Kernels::with_isa(threads, isa);
                            let got = bytes(shape, |kv| kernels.write_kv(kv, sequences, &k, &v));
                            assert!(got == want, "{shape:?} {sequences:?} {isa} {threads} threads");
                        }
                    }
                    let one_by_one = bytes(shape, |kv| {
                        let rows = k.chunks_exact(kv_heads * k_dim).enumerate();
                        let places = sequences.iter().flat_map(|s| {
                            (s.start..s.start + s.queries)
                                .map(|position| (s.blocks[position / BLOCK], position % BLOCK))
                        });
                        for ((row, k), (block, slot)) in rows.zip(places) {
                            kv.write(block, slot, k, &v[row * v_row..][..v_row]);
                        }
                    });
                    assert!(one_by_one == want, "{shape:?} {sequences:?} token by token");
                }
            }
        }
    }

    #[test]
    fn sequences_are_cut_at_the_bounds_of_runs() {
        let mut runs = Vec::new();
        let sequences = [
            AttentionSequence { blocks: &[9, 4], start: 62, queries: 20 },
            AttentionSequence { blocks: &[4], start: 7, queries: 1 },
        ];
        cut(&sequences, |run| runs.push((run.block, run.slot, run.tokens, run.row)));
        assert_eq!(runs, [(9, 62, 2, 0), (4, 0, 16, 2), (4, 16, 2, 18), (4, 7, 1, 20)]);
    }
}
