//! `avx512-bf16-pairs`: both products by `vdpbf16ps`.
//!
//! Shapes and results as in `dots`. A group of up to 12 lines by 2 vectors has its accumulators in registers: 24 products
//! for 14 loads. Up to 6 lines are bound by the memory, which is read as it lies, one vector after another: four at a time
//! would be four streams, each too short for the processor's prefetcher (measured on Zen 4, two threads: 30 for 35 GB/s).
//! What is read next is fetched into the second-level cache: fetched into the first, it would wait for one of its few
//! places for lines on their way (measured on Zen 4: 11 for 16 GB/s a thread). `vdpbf16ps` takes denormal inputs and
//! results for zeros, so the results differ from the portable body's by less than n · 2⁻¹²⁶ for n products where these are
//! below the normal range.
use super::PAIR_ROW;
use super::ROW;
use super::dots::Segment;
use super::layout::{LANES, Line};
use crate::bf16::multiply;
use std::arch::x86_64::{
    __m512, _MM_HINT_T1, _mm_prefetch, _mm512_and_si512, _mm512_load_si512, _mm512_set1_epi32, _mm512_setzero_ps,
    _mm512_setzero_si512, _mm512_storeu_ps,
};
use std::ops::Range;

/// Lines of a group that is bound by the memory.
const FEW: usize = 6;

/// Calls a kernel for a group of lines and so many vectors of what is left, and says how many: for a few lines `$few`
/// vectors where there are as many, for many lines `$most`, and otherwise one.
macro_rules! widest {
    (
        $kernel:ident, $group:expr, $left:expr,
        [$($few_lines:literal)*] $few:literal, [$($lines:literal)*] $most:literal, $args:tt
    ) => {
        match ($group, $left) {
            $(($few_lines, $few..) => { widest!(@call $kernel, $few_lines, $few, $args); $few })*
            $(($lines, $most..) => { widest!(@call $kernel, $lines, $most, $args); $most })*
            $(($few_lines, _) => { widest!(@call $kernel, $few_lines, 1, $args); 1 })*
            $(($lines, _) => { widest!(@call $kernel, $lines, 1, $args); 1 })*
            _ => unreachable!("a group has 1 to 12 lines"),
        }
    };
    (@call $kernel:ident, $group:literal, $vectors:literal, ($($arg:expr),*)) => {
        // SAFETY: the caller of the function around this has stated what the kernel asks for.
        unsafe { $kernel::<$group, $vectors>($($arg),*) }
    };
}
pub(super) use widest;

/// As `dots::score`.
///
/// # Safety
/// The CPU must have AVX-512 F and BF16; lengths as asserted there.
pub(super) unsafe fn score(
    q: &[u32],
    group: usize,
    keys: &[Line],
    steps: usize,
    runs: Range<usize>,
    next: Option<&[u8]>,
    out: &mut [f32],
) {
    // what is not there to be read ahead is replaced by what is read anyway
    let ahead = next.map_or(keys.as_ptr(), |next| next.as_ptr().cast());
    let mut run = runs.start;
    while run < runs.end {
        let (keys, ahead) = (&keys[run * steps..], ahead.wrapping_add(run * steps));
        let out = &mut out[(run - runs.start) * LANES..];
        run += widest!(score_lines, group, runs.end - run, [1 2 3 4 5 6] 1, [7 8 9 10 11 12] 2,
            (q, keys, steps, ahead, out));
    }
}

/// # Safety
/// The CPU must have AVX-512 F and BF16; `q [steps][R]`, `keys [C][steps]`, out `[R][ROW]` but for what follows the last
/// line's C vectors.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn score_lines<const R: usize, const C: usize>(
    q: &[u32],
    keys: &[Line],
    steps: usize,
    ahead: *const Line,
    out: &mut [f32],
) {
    debug_assert!(q.len() >= steps * R && keys.len() >= steps * C);
    debug_assert!(out.len() >= (R - 1) * ROW + C * LANES);
    let mut sums = [[_mm512_setzero_ps(); C]; R];
    let (q, keys) = (q.as_ptr(), keys.as_ptr());
    for i in 0..steps {
        let mut lines = [_mm512_setzero_si512(); C];
        for (c, line) in lines.iter_mut().enumerate() {
            // SAFETY: c < C and i < steps; a line is aligned.
            *line = unsafe { _mm512_load_si512(keys.add(c * steps + i).cast()) };
            _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(c * steps + i).cast());
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: i < steps and r < R.
            let pair = _mm512_set1_epi32(unsafe { *q.add(i * R + r) } as i32);
            for (sum, line) in sums.iter_mut().zip(&lines) {
                *sum = multiply(*sum, pair, *line);
            }
        }
    }
    // SAFETY: `out` has R rows of C vectors.
    unsafe { store(&sums, out.as_mut_ptr(), ROW) };
}

/// # Safety
/// `out` has R rows, `row` numbers apart, of C vectors.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) unsafe fn store<const R: usize, const C: usize>(sums: &[[__m512; C]; R], out: *mut f32, row: usize) {
    for (r, sums) in sums.iter().enumerate() {
        for (c, sum) in sums.iter().enumerate() {
            // SAFETY: by the caller's word.
            unsafe { _mm512_storeu_ps(out.add(r * row + c * LANES), *sum) };
        }
    }
}

/// As `dots::weigh`.
///
/// # Safety
/// The CPU must have AVX-512 F and BF16; lengths as asserted there.
#[allow(clippy::too_many_arguments, reason = "a kernel's inner call")]
pub(super) unsafe fn weigh(
    weights: &[u32],
    group: usize,
    segments: &[Segment<'_>],
    tiles: Range<usize>,
    half: bool,
    next: Option<&[u8]>,
    out: &mut [f32],
    row: usize,
) {
    let mut tile = tiles.start;
    while tile < tiles.end {
        let out = &mut out[(tile - tiles.start) * LANES..];
        tile += widest!(weigh_lines, group, tiles.end - tile, [1 2 3 4 5 6] 4, [7 8 9 10 11 12] 2,
            (weights, segments, tile, half, next, out, row));
    }
}

/// # Safety
/// The CPU must have AVX-512 F and BF16; `weights` has R rows of `PAIR_ROW` but for what follows the last step, each
/// segment has its steps in C tiles from `tile`, `out` has R rows, `row` numbers apart, of C vectors.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn weigh_lines<const R: usize, const C: usize>(
    weights: &[u32],
    segments: &[Segment<'_>],
    tile: usize,
    half: bool,
    next: Option<&[u8]>,
    out: &mut [f32],
    row: usize,
) {
    debug_assert!(out.len() >= (R - 1) * row + C * LANES);
    let mut sums = [[_mm512_setzero_ps(); C]; R];
    for (index, segment) in segments.iter().enumerate() {
        let (stride, first) = (segment.stride, tile * segment.stride + segment.from);
        debug_assert!(segment.lines.len() >= first + (C - 1) * stride + segment.steps);
        debug_assert!(weights.len() >= (R - 1) * PAIR_ROW + segment.weight + segment.steps);
        // SAFETY: both are inside, by the caller's word.
        let (lines, weights) = unsafe { (segment.lines.as_ptr().add(first), weights.as_ptr().add(segment.weight)) };
        // what the next segment holds of these tiles is fetched meanwhile
        let ahead = match (segments.get(index + 1), next) {
            (Some(next), _) => next.lines.as_ptr().wrapping_add(tile * next.stride),
            (None, Some(next)) => next.as_ptr().cast(),
            (None, None) => lines,
        };
        let halved = usize::from(half && index + 1 == segments.len());
        let whole = segment.steps - halved;
        if R <= FEW {
            // one tile after another, as they lie in memory
            for c in 0..C {
                for i in 0..whole {
                    // SAFETY: i is one of the segment's steps and c one of its tiles.
                    let line = unsafe { _mm512_load_si512(lines.add(c * stride + i).cast()) };
                    _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(c * stride + i).cast());
                    for (r, sums) in sums.iter_mut().enumerate() {
                        // SAFETY: R rows have a weight for each step.
                        let pair = _mm512_set1_epi32(unsafe { *weights.add(r * PAIR_ROW + i) } as i32);
                        sums[c] = multiply(sums[c], pair, line);
                    }
                }
            }
        } else {
            for i in 0..whole {
                // SAFETY: i is one of the segment's steps.
                unsafe { weigh_step(&mut sums, weights, lines, stride, i, ahead, -1) };
            }
        }
        if halved == 1 {
            // SAFETY: as above.
            unsafe { weigh_step(&mut sums, weights, lines, stride, whole, lines, 0xffff) };
        }
    }
    // SAFETY: by the caller's word.
    unsafe { store(&sums, out.as_mut_ptr(), row) };
}

/// # Safety
/// Step i of R rows of weights and of C tiles can be read; `ahead` is a pointer that may be fetched from.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
unsafe fn weigh_step<const R: usize, const C: usize>(
    sums: &mut [[__m512; C]; R],
    weights: *const u32,
    tiles: *const Line,
    stride: usize,
    i: usize,
    ahead: *const Line,
    mask: i32,
) {
    let mut lines = [_mm512_setzero_si512(); C];
    for (c, line) in lines.iter_mut().enumerate() {
        // SAFETY: by the caller's word; a line is aligned.
        *line = unsafe { _mm512_load_si512(tiles.add(c * stride + i).cast()) };
        if mask != -1 {
            *line = _mm512_and_si512(*line, _mm512_set1_epi32(mask));
        }
        _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(c * stride + i).cast());
    }
    for (r, sums) in sums.iter_mut().enumerate() {
        // SAFETY: by the caller's word.
        let pair = _mm512_set1_epi32(unsafe { *weights.add(r * PAIR_ROW + i) } as i32);
        for (sum, line) in sums.iter_mut().zip(&lines) {
            *sum = multiply(*sum, pair, *line);
        }
    }
}
