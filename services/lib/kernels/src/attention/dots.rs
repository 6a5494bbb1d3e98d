//! The two products of attention, for a group of lines (a line is one query and head) that share each vector of keys
//! and of values: scores `q · Kᵀ` and weighted values `p · V`.
//!
//! f32: one fused multiply-add a number, dimensions (tokens) ascending. Pairs (bf16, and int8 widened to it): for each
//! pair one for its second and one for its first half, which is the order of `vdpbf16ps`. One accumulator for each
//! output in either case, so its bits do not depend on the group. Accumulation is f32; largest error against f64 of the
//! rounded inputs: n · 2⁻²⁴ relative to Σ|a·b|.
//! The bodies here are portable and agree to the bit on all instruction sets; `bf16` has the pairs by `vdpbf16ps`.
use super::layout::{Codes, LANES, Line};
use super::{PAIR_ROW, ROW};
use crate::isa::{Isa, for_each_isa};
use std::ops::Range;

/// Which products: of floats or of pairs of bf16.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Numbers {
    F32,
    Pairs,
}

impl Numbers {
    /// Numbers between one line's weights and the next's.
    pub(super) fn weights_row(self) -> usize {
        match self {
            Self::F32 => ROW,
            Self::Pairs => PAIR_ROW,
        }
    }
}

/// Whether the pairs' products run on their own instruction.
fn has_bf16(isa: Isa, numbers: Numbers) -> bool {
    #[cfg(target_arch = "x86_64")]
    return isa.kind() == crate::isa::Kind::Avx512Bf16 && numbers == Numbers::Pairs;
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (isa, numbers);
        false
    }
}

/// Whether int8 is widened in registers on its way into the products, so that [`score_codes`] and [`weigh_codes`] can be
/// called: `steps` are a run's lines of keys.
pub(super) fn takes_codes(isa: Isa, steps: usize) -> bool {
    #[cfg(target_arch = "x86_64")]
    return has_bf16(isa, Numbers::Pairs) && steps.is_multiple_of(2) && std::is_x86_feature_detected!("avx512vbmi");
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (isa, steps);
        false
    }
}

/// Lines of a group at most.
pub(super) fn group_limit(isa: Isa, numbers: Numbers) -> usize {
    match numbers {
        Numbers::Pairs if has_bf16(isa, numbers) => 12,
        Numbers::Pairs => 4,
        Numbers::F32 => 6,
    }
}

/// Consecutive steps (pairs of tokens, or tokens) of tiles of values, in lines or in [`Codes`].
#[derive(Clone, Copy)]
pub(super) struct Segment<'a, T = Line> {
    /// `[tiles][stride]`.
    pub(super) lines: &'a [T],
    /// Lines from one tile to the next.
    pub(super) stride: usize,
    /// The first step's line in each tile.
    pub(super) from: usize,
    /// The first step's number among a line's weights.
    pub(super) weight: usize,
    /// Steps.
    pub(super) steps: usize,
}

impl<T> Segment<'_, T> {
    /// Nothing.
    pub(super) const NONE: Self = Self { lines: &[], stride: 0, from: 0, weight: 0, steps: 0 };
}

/// Scores of a group: `q [steps][group]` with the keys `[4 runs][steps]` of a block; the score of line r and token t of
/// the block goes to `out[r · ROW + t - 16 · runs.start]`. `next` is what is read next: as much of it is fetched meanwhile.
#[allow(clippy::too_many_arguments, reason = "a kernel's inner call")]
pub(super) fn score(
    isa: Isa,
    numbers: Numbers,
    q: &[u32],
    group: usize,
    keys: &[Line],
    steps: usize,
    runs: Range<usize>,
    next: Option<&[u8]>,
    out: &mut [f32],
) {
    assert!(q.len() == group * steps && keys.len() >= runs.end * steps && !runs.is_empty());
    assert!(out.len() >= (group - 1) * ROW + runs.len() * LANES);
    #[cfg(target_arch = "x86_64")]
    if has_bf16(isa, numbers) {
        // SAFETY: the token says that the CPU has AVX-512 with BF16; the lengths are asserted above.
        return unsafe { super::bf16::score(q, group, keys, steps, runs, next, out) };
    }
    let _ = next;
    for (index, run) in runs.enumerate() {
        score_run(isa, numbers, q, group, &keys[run * steps..][..steps], &mut out[index * LANES..]);
    }
}

/// As [`score`] with pairs, of keys in int8, where [`takes_codes`] says so; the scales are not applied.
#[allow(clippy::too_many_arguments, reason = "a kernel's inner call")]
pub(super) fn score_codes(
    isa: Isa,
    q: &[u32],
    group: usize,
    keys: &[Codes],
    steps: usize,
    runs: Range<usize>,
    next: Option<&[u8]>,
    out: &mut [f32],
) {
    assert!(takes_codes(isa, steps) && q.len() == group * steps && keys.len() >= runs.end * steps);
    assert!(!runs.is_empty() && out.len() >= (group - 1) * ROW + runs.len() * LANES);
    // SAFETY: the CPU was asked for what the kernel needs; the lengths are asserted above.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        super::codes::score(q, group, keys, steps, runs, next, out);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = next;
}

/// As [`weigh`] with pairs, of values in int8, where [`takes_codes`] says so. A segment's stride is even. A
/// token that nobody sees has a weight of 0 and a code that is finite: none is left out.
#[allow(clippy::too_many_arguments, reason = "a kernel's inner call")]
pub(super) fn weigh_codes(
    isa: Isa,
    weights: &[u32],
    group: usize,
    segments: &[Segment<'_, Codes>],
    tiles: Range<usize>,
    next: Option<&[u8]>,
    out: &mut [f32],
    row: usize,
) {
    assert!(takes_codes(isa, 2) && !tiles.is_empty() && group > 0);
    assert!(out.len() >= (group - 1) * row + tiles.len() * LANES);
    check(Numbers::Pairs, weights, group, segments, tiles.end);
    for segment in segments {
        assert!(segment.stride.is_multiple_of(2) && segment.lines.len() >= tiles.end * segment.stride);
    }
    // SAFETY: the CPU was asked for what the kernel needs; the lengths are asserted above.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        super::codes::weigh(weights, group, segments, tiles, next, out, row);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = next;
}

for_each_isa! {
    /// Scores of a group with one run of keys.
    fn score_run(numbers: Numbers, q: &[u32], group: usize, run: &[Line], out: &mut [f32]) => score_run_body
}

#[inline(always)]
fn score_run_body(numbers: Numbers, q: &[u32], group: usize, run: &[Line], out: &mut [f32]) {
    match (numbers, group) {
        (Numbers::F32, 1) => score_lines::<1, false>(q, run, out),
        (Numbers::F32, 2) => score_lines::<2, false>(q, run, out),
        (Numbers::F32, 3) => score_lines::<3, false>(q, run, out),
        (Numbers::F32, 4) => score_lines::<4, false>(q, run, out),
        (Numbers::F32, 5) => score_lines::<5, false>(q, run, out),
        (Numbers::F32, _) => score_lines::<6, false>(q, run, out),
        (Numbers::Pairs, 1) => score_lines::<1, true>(q, run, out),
        (Numbers::Pairs, 2) => score_lines::<2, true>(q, run, out),
        (Numbers::Pairs, 3) => score_lines::<3, true>(q, run, out),
        (Numbers::Pairs, _) => score_lines::<4, true>(q, run, out),
    }
}

#[inline(always)]
fn score_lines<const R: usize, const PAIRS: bool>(q: &[u32], run: &[Line], out: &mut [f32]) {
    let mut sums = [[0f32; LANES]; R];
    for (q, keys) in q.as_chunks::<R>().0.iter().zip(run) {
        for (sum, q) in sums.iter_mut().zip(q) {
            step::<PAIRS>(sum, *q, keys);
        }
    }
    for (line, sum) in sums.iter().enumerate() {
        out[line * ROW..][..LANES].copy_from_slice(sum);
    }
}

/// Adds the products of a number (or pair) with a line of them.
#[inline(always)]
fn step<const PAIRS: bool>(sum: &mut [f32; LANES], number: u32, line: &Line) {
    if PAIRS {
        let (first, second) = (f32::from_bits(number << 16), f32::from_bits(number & 0xffff_0000));
        for (sum, pair) in sum.iter_mut().zip(line.0) {
            *sum = second.mul_add(f32::from_bits(pair & 0xffff_0000), *sum);
            *sum = first.mul_add(f32::from_bits(pair << 16), *sum);
        }
    } else {
        let number = f32::from_bits(number);
        for (sum, other) in sum.iter_mut().zip(line.0) {
            *sum = number.mul_add(f32::from_bits(other), *sum);
        }
    }
}

/// Weighted values of a group in the tiles of the segments; `weights` are rows of [`Numbers::weights_row`]. With `half`
/// the last step's second token is left out, whatever it holds. The sum of line r and dimension d of the tiles goes to
/// `out[r · row + d - 16 · tiles.start]`. `next` is what is read after the last segment: as much is fetched meanwhile.
#[allow(clippy::too_many_arguments, reason = "a kernel's inner call")]
pub(super) fn weigh(
    isa: Isa,
    numbers: Numbers,
    weights: &[u32],
    group: usize,
    segments: &[Segment<'_>],
    tiles: Range<usize>,
    half: bool,
    next: Option<&[u8]>,
    out: &mut [f32],
    row: usize,
) {
    assert!(out.len() >= (group - 1) * row + tiles.len() * LANES && !tiles.is_empty() && group > 0);
    check(numbers, weights, group, segments, tiles.end);
    #[cfg(target_arch = "x86_64")]
    if has_bf16(isa, numbers) {
        // SAFETY: the token says that the CPU has AVX-512 with BF16; the lengths are asserted above.
        return unsafe { super::bf16::weigh(weights, group, segments, tiles, half, next, out, row) };
    }
    let _ = next;
    for (index, tile) in tiles.enumerate() {
        weigh_tile(isa, numbers, weights, group, segments, tile, half, &mut out[index * LANES..], row);
    }
}

/// # Panics
/// When weights or values of a segment's steps are missing in a line or a tile.
fn check<T>(numbers: Numbers, weights: &[u32], group: usize, segments: &[Segment<'_, T>], tiles: usize) {
    for segment in segments {
        let end = segment.weight + segment.steps;
        assert!(end <= numbers.weights_row() && weights.len() >= (group - 1) * numbers.weights_row() + end);
        assert!(segment.lines.len() >= (tiles - 1) * segment.stride + segment.from + segment.steps);
    }
}

for_each_isa! {
    /// Weighted values of a group in one tile.
    fn weigh_tile(
        numbers: Numbers,
        weights: &[u32],
        group: usize,
        segments: &[Segment<'_>],
        tile: usize,
        half: bool,
        out: &mut [f32],
        row: usize,
    ) => weigh_tile_body
}

#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "a kernel's inner call")]
fn weigh_tile_body(
    numbers: Numbers,
    weights: &[u32],
    group: usize,
    segments: &[Segment<'_>],
    tile: usize,
    half: bool,
    out: &mut [f32],
    row: usize,
) {
    match (numbers, group) {
        (Numbers::F32, 1) => weigh_lines::<1, false>(weights, segments, tile, half, out, row),
        (Numbers::F32, 2) => weigh_lines::<2, false>(weights, segments, tile, half, out, row),
        (Numbers::F32, 3) => weigh_lines::<3, false>(weights, segments, tile, half, out, row),
        (Numbers::F32, 4) => weigh_lines::<4, false>(weights, segments, tile, half, out, row),
        (Numbers::F32, 5) => weigh_lines::<5, false>(weights, segments, tile, half, out, row),
        (Numbers::F32, _) => weigh_lines::<6, false>(weights, segments, tile, half, out, row),
        (Numbers::Pairs, 1) => weigh_lines::<1, true>(weights, segments, tile, half, out, row),
        (Numbers::Pairs, 2) => weigh_lines::<2, true>(weights, segments, tile, half, out, row),
        (Numbers::Pairs, 3) => weigh_lines::<3, true>(weights, segments, tile, half, out, row),
        (Numbers::Pairs, _) => weigh_lines::<4, true>(weights, segments, tile, half, out, row),
    }
}

#[inline(always)]
fn weigh_lines<const R: usize, const PAIRS: bool>(
    weights: &[u32],
    segments: &[Segment<'_>],
    tile: usize,
    half: bool,
    out: &mut [f32],
    row: usize,
) {
    let weights_row = if PAIRS { PAIR_ROW } else { ROW };
    let mut sums = [[0f32; LANES]; R];
    for (index, segment) in segments.iter().enumerate() {
        let lines = &segment.lines[tile * segment.stride + segment.from..][..segment.steps];
        let weights: [&[u32]; R] =
            std::array::from_fn(|line| &weights[line * weights_row + segment.weight..][..segment.steps]);
        let halved = half && index + 1 == segments.len();
        let whole = segment.steps - usize::from(halved);
        for (at, values) in lines[..whole].iter().enumerate() {
            for (sum, weights) in sums.iter_mut().zip(&weights) {
                step::<PAIRS>(sum, weights[at], values);
            }
        }
        if halved {
            let values = Line(lines[whole].0.map(|pair| pair & 0xffff));
            for (sum, weights) in sums.iter_mut().zip(&weights) {
                step::<PAIRS>(sum, weights[whole], &values);
            }
        }
    }
    for (line, sum) in sums.iter().enumerate() {
        out[line * row..][..LANES].copy_from_slice(sum);
    }
}
