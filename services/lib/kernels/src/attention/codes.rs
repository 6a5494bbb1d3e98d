//! `avx512-bf16-pairs` of int8: codes are widened in registers on their way into `vdpbf16ps`.
//!
//! Shapes and results as in `dots`, to the bit those of codes that are widened beforehand, which many lines share. A few
//! lines are bound by the memory, and do without a buffer of widened numbers, twice what is read. Up to 4 lines take
//! four vectors at a time, whose sums wait less for one another (Zen 4, one thread, 4 lines: 12.2 in place of 10.8 GB/s).
use super::bf16::{store, widest};
use super::dots::Segment;
use super::expand::Widener;
use super::layout::{Codes, LANES};
use super::{PAIR_ROW, ROW};
use crate::bf16::multiply;
use std::arch::x86_64::{
    __m512, __m512i, _MM_HINT_T1, _mm_prefetch, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps,
    _mm512_setzero_si512,
};
use std::ops::Range;

/// As `dots::score_codes`.
///
/// # Safety
/// The CPU must have AVX-512 F, BW, VBMI and BF16; lengths as asserted there.
pub(super) unsafe fn score(
    q: &[u32],
    group: usize,
    keys: &[Codes],
    steps: usize,
    runs: Range<usize>,
    next: Option<&[u8]>,
    out: &mut [f32],
) {
    let ahead = next.map_or(keys.as_ptr(), |next| next.as_ptr().cast());
    let mut run = runs.start;
    while run < runs.end {
        let (keys, ahead) = (&keys[run * steps..], ahead.wrapping_add(run * steps));
        let out = &mut out[(run - runs.start) * LANES..];
        run += widest!(score_lines, group, runs.end - run, [1 2 3 4] 4, [5 6 7 8 9 10 11 12] 1,
            (q, keys, steps, ahead, out));
    }
}

/// # Safety
/// The CPU must have AVX-512 F, BW, VBMI and BF16; `q [steps][R]`, `keys [C][steps]` with an even number of steps,
/// out `[R][ROW]` but for what follows the last line's C vectors.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
unsafe fn score_lines<const R: usize, const C: usize>(
    q: &[u32],
    keys: &[Codes],
    steps: usize,
    ahead: *const Codes,
    out: &mut [f32],
) {
    debug_assert!(q.len() >= steps * R && keys.len() >= steps * C && out.len() >= (R - 1) * ROW + C * LANES);
    let widener = Widener::new();
    let (q, keys) = (q.as_ptr(), keys.as_ptr());
    let mut sums = [[_mm512_setzero_ps(); C]; R];
    for i in (0..steps).step_by(2) {
        // SAFETY: a run has an even number of steps, so that two are there.
        let codes = std::array::from_fn(|c| unsafe { keys.add(c * steps + i) });
        let ahead = std::array::from_fn(|c| ahead.wrapping_add(c * steps + i));
        // SAFETY: as above.
        let lines = unsafe { widen::<C>(&widener, codes, ahead) };
        // SAFETY: each step has R pairs.
        unsafe {
            add(&mut sums, q.add(i * R), 1, lines.map(|lines| lines[0]));
            add(&mut sums, q.add((i + 1) * R), 1, lines.map(|lines| lines[1]));
        }
    }
    // SAFETY: `out` has R rows of C vectors.
    unsafe { store(&sums, out.as_mut_ptr(), ROW) };
}

/// As `dots::weigh_codes`.
///
/// # Safety
/// The CPU must have AVX-512 F, BW, VBMI and BF16; lengths as asserted there.
#[allow(clippy::too_many_arguments, reason = "a kernel's inner call")]
pub(super) unsafe fn weigh(
    weights: &[u32],
    group: usize,
    segments: &[Segment<'_, Codes>],
    tiles: Range<usize>,
    next: Option<&[u8]>,
    out: &mut [f32],
    row: usize,
) {
    let mut tile = tiles.start;
    while tile < tiles.end {
        let out = &mut out[(tile - tiles.start) * LANES..];
        tile += widest!(weigh_lines, group, tiles.end - tile, [1 2 3 4] 4, [5 6 7 8 9 10 11 12] 1,
            (weights, segments, tile, next, out, row));
    }
}

/// # Safety
/// The CPU must have AVX-512 F, BW, VBMI and BF16; `weights` has R rows of `PAIR_ROW` but for what follows the last step;
/// each segment has C whole tiles of an even stride from `tile` and its steps in them; out has R rows, `row` numbers
/// apart, of C vectors.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512bf16")]
unsafe fn weigh_lines<const R: usize, const C: usize>(
    weights: &[u32],
    segments: &[Segment<'_, Codes>],
    tile: usize,
    next: Option<&[u8]>,
    out: &mut [f32],
    row: usize,
) {
    debug_assert!(out.len() >= (R - 1) * row + C * LANES);
    let widener = Widener::new();
    let mut sums = [[_mm512_setzero_ps(); C]; R];
    for (index, segment) in segments.iter().enumerate() {
        let stride = segment.stride;
        debug_assert!(segment.lines.len() >= (tile + C) * stride);
        let lines = segment.lines[tile * stride..].as_ptr();
        let ahead = match (segments.get(index + 1), next) {
            (Some(next), _) => next.lines.as_ptr().wrapping_add(tile * next.stride),
            (None, Some(next)) => next.as_ptr().cast::<Codes>().wrapping_add(tile * stride),
            (None, None) => lines,
        };
        let (from, end) = (segment.from, segment.from + segment.steps);
        for i in (from & !1..end).step_by(2) {
            // SAFETY: the stride is even and the step inside, and so are both lines.
            let codes = std::array::from_fn(|c| unsafe { lines.add(c * stride + i) });
            let ahead = std::array::from_fn(|c| ahead.wrapping_add(c * stride + i));
            // SAFETY: as above.
            let both = unsafe { widen::<C>(&widener, codes, ahead) };
            for at in 0..2 {
                let step = i + at;
                if step < from || step >= end {
                    continue;
                }
                let lines = both.map(|lines| lines[at]);
                // SAFETY: R rows have a weight for each step, of which the first is `segment.weight`.
                unsafe { add(&mut sums, weights.as_ptr().add(segment.weight + step - from), PAIR_ROW, lines) };
            }
        }
    }
    // SAFETY: by the caller's word.
    unsafe { store(&sums, out.as_mut_ptr(), row) };
}

/// Two lines of each of C places; what is `ahead` is asked for.
///
/// # Safety
/// The CPU must have AVX-512 F, BW and VBMI; two lines can be read at each place.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
#[inline]
unsafe fn widen<const C: usize>(
    widener: &Widener,
    places: [*const Codes; C],
    ahead: [*const Codes; C],
) -> [[__m512i; 2]; C] {
    let mut lines = [[_mm512_setzero_si512(); 2]; C];
    for ((lines, place), ahead) in lines.iter_mut().zip(places).zip(ahead) {
        // SAFETY: by the caller's word.
        *lines = widener.widen(unsafe { _mm512_loadu_si512(place.cast()) });
        _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
    }
    lines
}

/// Adds the lines times each row's pair of numbers, which are `stride` apart.
///
/// # Safety
/// The CPU must have AVX-512 F and BF16; the R pairs can be read.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
unsafe fn add<const R: usize, const C: usize>(
    sums: &mut [[__m512; C]; R],
    pairs: *const u32,
    stride: usize,
    lines: [__m512i; C],
) {
    for (r, sums) in sums.iter_mut().enumerate() {
        // SAFETY: by the caller's word.
        let pair = _mm512_set1_epi32(unsafe { *pairs.add(r * stride) } as i32);
        for (sum, line) in sums.iter_mut().zip(lines) {
            *sum = multiply(*sum, pair, line);
        }
    }
}
