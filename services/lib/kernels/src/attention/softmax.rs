//! The softmax of a chunk of one line's scores, and how chunks' results are joined.
//!
//! Scores are multiplied with log2(e) at the same time as with their scale, and weights are powers of two:
//! `p = 2^(s - max)`, by a polynomial of degree 6 (largest relative error 1.3 · 2⁻²³; 0 below 2⁻¹²⁵). With keys and
//! values in bf16 the weights are rounded to bf16 before they are summed, so that what is applied sums up to 1; with
//! int8 they are rounded after they are multiplied with their token's scale. The sum has 16 lanes and one order.
//! Chunks are joined in order: `max`, `sum` and outputs of both are brought to the larger maximum. A chunk of which a
//! line sees nothing changes nothing in it.
use super::layout::{BLOCK, LANES};
use crate::bf16::round;
use crate::isa::for_each_isa;
use std::f32::consts::LN_2;
use std::ops::Range;

/// Stands for the maximum of no scores: finite, so that it can be subtracted from itself.
pub(super) const NONE: f32 = f32::MIN;

/// What is done to a line's scores of a chunk.
pub(super) struct Line {
    /// Runs of 16 tokens that the line's tile works on, counted from the chunk's start.
    pub(super) runs: Range<usize>,
    /// Tokens that the line sees, counted from there.
    pub(super) visible: Range<usize>,
    /// The score's scale times log2(e).
    pub(super) factor: f32,
    /// ALiBi's slope times log2(e).
    pub(super) slope: f32,
    /// Position of the chunk's start less the query's.
    pub(super) distance: f32,
}

/// A line's largest score and sum of weights.
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Stats {
    pub(super) max: f32,
    pub(super) sum: f32,
}

/// `2^x` for x up to 0. A NaN stays one where its 9 lowest bits are 0, as in all that arithmetic or bf16 makes.
#[inline(always)]
pub(super) fn exp2(x: f32) -> f32 {
    // adding it leaves no bits for a fraction: they are rounded away
    const WHOLE: f32 = 12_582_912.0;
    let shifted = x + WHOLE;
    let fraction = x - (shifted - WHOLE);
    let mut sum = 1.545_336_3e-4f32;
    for coefficient in [1.339_086_3e-3, 9.618_083e-3, 5.550_357e-2, 0.240_226_5, LN_2, 1.0] {
        sum = sum.mul_add(fraction, coefficient);
    }
    let power = f32::from_bits(sum.to_bits().wrapping_add(shifted.to_bits() << 23));
    if x < -125.0 { 0.0 } else { power }
}

/// A run's lanes.
#[inline(always)]
fn lanes(numbers: &[f32], run: usize) -> &[f32; LANES] {
    &numbers.as_chunks::<LANES>().0[run]
}

for_each_isa! {
    /// Weights and statistics of one line's chunk. `scores` becomes scratch; `weights` are u32 for f32 numbers and
    /// pairs otherwise; `scales` are those of the chunk's keys and values in int8.
    pub(super) fn soften(
        line: &Line,
        scores: &mut [f32],
        scales: Option<(&[f32], &[f32])>,
        pairs: bool,
        weights: &mut [u32],
        stats: &mut Stats,
    ) => soften_body
}

#[inline(always)]
fn soften_body(
    line: &Line,
    scores: &mut [f32],
    scales: Option<(&[f32], &[f32])>,
    pairs: bool,
    weights: &mut [u32],
    stats: &mut Stats,
) {
    let runs = if line.visible.is_empty() {
        line.runs.start..line.runs.start
    } else {
        line.visible.start / LANES..line.visible.end.div_ceil(LANES)
    };
    // in units of weights
    let width = if pairs { LANES / 2 } else { LANES };
    weights[line.runs.start * width..runs.start * width].fill(0);
    weights[runs.end * width..line.runs.end * width].fill(0);
    let scores = scores.as_chunks_mut::<LANES>().0;
    let mut largest = [NONE; LANES];
    for run in runs.clone() {
        let first = run * LANES;
        // a copy: what may lie over the scales would be worked off one by one
        let mut here = scores[run].map(|s| s * line.factor);
        if let Some((keys, _)) = scales {
            here.iter_mut().zip(lanes(keys, run)).for_each(|(s, scale)| *s *= scale);
        }
        if line.slope != 0.0 {
            for (lane, s) in here.iter_mut().enumerate() {
                *s = line.slope.mul_add(line.distance + (first + lane) as f32, *s);
            }
        }
        if first < line.visible.start || first + LANES > line.visible.end {
            for (lane, s) in here.iter_mut().enumerate() {
                *s = if line.visible.contains(&(first + lane)) { *s } else { f32::NEG_INFINITY };
            }
        }
        for (largest, s) in largest.iter_mut().zip(here) {
            *largest = if s > *largest { s } else { *largest };
        }
        scores[run] = here;
    }
    let max = largest.into_iter().fold(NONE, |a, b| if b > a { b } else { a });
    let mut sums = [0f32; LANES];
    for run in runs {
        let mut powers = [0f32; LANES];
        for (power, s) in powers.iter_mut().zip(&scores[run]) {
            *power = exp2(*s - max);
        }
        if !pairs {
            let weights = &mut weights[run * LANES..][..LANES];
            for ((weight, sum), power) in weights.iter_mut().zip(&mut sums).zip(powers) {
                *weight = power.to_bits();
                *sum += power;
            }
            continue;
        }
        let mut rounded = [0u32; LANES];
        if let Some((_, values)) = scales {
            let tokens = scores[run].iter().zip(lanes(values, run));
            for ((sum, power), (score, scale)) in sums.iter_mut().zip(&mut powers).zip(tokens) {
                *sum += *power;
                // a token that is not seen may have any scale, even NaN; one that is seen has it whatever its weight
                let scaled = *power * scale;
                *power = if *score == f32::NEG_INFINITY { 0.0 } else { scaled };
            }
            rounded.iter_mut().zip(powers).for_each(|(rounded, power)| *rounded = round(power));
        } else {
            for ((rounded, sum), power) in rounded.iter_mut().zip(&mut sums).zip(powers) {
                *rounded = round(power);
                *sum += f32::from_bits(*rounded & 0xffff_0000);
            }
        }
        let halves: &mut [u16] = bytemuck::cast_slice_mut(&mut weights[run * width..][..width]);
        halves.iter_mut().zip(rounded).for_each(|(half, rounded)| *half = (rounded >> 16) as u16);
    }
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
    }
    *stats = Stats { max, sum: sums[0] };
}

for_each_isa! {
    /// Joins a chunk's outputs of one line to what came before it.
    pub(super) fn join(total: &mut [f32], total_stats: &mut Stats, part: &[f32], part_stats: &Stats) => join_body
}

#[inline(always)]
fn join_body(total: &mut [f32], total_stats: &mut Stats, part: &[f32], part_stats: &Stats) {
    let max = if part_stats.max > total_stats.max { part_stats.max } else { total_stats.max };
    let (before, now) = (exp2(total_stats.max - max), exp2(part_stats.max - max));
    *total_stats = Stats { max, sum: total_stats.sum.mul_add(before, part_stats.sum * now) };
    for (total, part) in total.iter_mut().zip(part) {
        *total = total.mul_add(before, part * now);
    }
}

for_each_isa! {
    /// Divides by the sum of the weights.
    pub(super) fn finish(total: &[f32], stats: &Stats, out: &mut [f32]) => finish_body
}

#[inline(always)]
fn finish_body(total: &[f32], stats: &Stats, out: &mut [f32]) {
    let inverse = 1.0 / stats.sum;
    for (out, total) in out.iter_mut().zip(total) {
        // adding zero makes -0 a 0: the sign could tell of chunks and tokens that the line does not see
        *out = total.mul_add(inverse, 0.0);
    }
}

for_each_isa! {
    /// A query's numbers, rounded to pairs of bf16 with a zero behind an odd one, or as they are; number i goes to
    /// `out[i · group]`.
    pub(super) fn prepare(q: &[f32], pairs: bool, group: usize, out: &mut [u32]) => prepare_body
}

#[inline(always)]
fn prepare_body(q: &[f32], pairs: bool, group: usize, out: &mut [u32]) {
    if !pairs {
        return out.iter_mut().step_by(group).zip(q).for_each(|(out, q)| *out = q.to_bits());
    }
    for (index, q) in q.chunks(BLOCK).enumerate() {
        let mut rounded = [0u32; BLOCK];
        rounded.iter_mut().zip(q).for_each(|(rounded, q)| *rounded = round(*q));
        let out = &mut out[index * BLOCK / 2 * group..];
        for (out, pair) in out.iter_mut().step_by(group).zip(rounded[..q.len().next_multiple_of(2)].as_chunks().0) {
            let [first, second]: &[u32; 2] = pair;
            *out = first >> 16 | second & 0xffff_0000;
        }
    }
}
