//! `{avx512vnni,avx2,portable}-{q4,q8}-int8`: a few rows of int8 activations against one packed panel.
//!
//! Shapes: M rows of `activations` (int8 codes in groups), a panel of 32 rows of `packed` weights (q4 or q8, the same
//! groups), tile `[M][32]` f32. For each group the products of codes are summed as 32-bit integers, which is exact; then
//! `acc = fma(sum as f32, weight scale · activation scale, acc)`, groups ascending. The rows 16..32 of q4 stand in the
//! high nibble: their sums are 16 times too large, and their weight scales are taken as 1/16. Every instruction set does
//! just this, so all agree to the bit, and a row's bits do not depend on M. Largest error against the exact product of
//! the codes: (groups + 2) · 2⁻²⁴ relative to Σ|x·w|; that of the codes themselves is stated in `activations`.
//! Source: vpdpbusd and maddubs multiply unsigned with signed bytes, hence the offsets of packed weights.
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod vnni;

use crate::activations::HEAD;
use crate::gemm::Tile;
use crate::isa::Isa;
#[cfg(target_arch = "x86_64")]
use crate::isa::Kind;
use crate::packed::{Format, LINE, PANEL, Q8_LINES};
use half::f16;

/// Memory that will be read next: each line of the panel that is read asks for `step` bytes of it. None of it is ever
/// read through these pointers, so they may lie anywhere.
#[derive(Clone, Copy)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "portable code leaves it to the processor"))]
pub(crate) struct Ahead {
    /// Where it begins.
    pub(crate) from: *const u8,
    /// Bytes for each line.
    pub(crate) step: usize,
}

/// The most rows of a tile.
pub(crate) fn rows_at_most(isa: Isa, format: Format) -> usize {
    #[cfg(target_arch = "x86_64")]
    match isa.kind() {
        Kind::Avx512Vnni | Kind::Avx512Bf16 if matches!(format, Format::Q4 { group } if group > 32) => return 8,
        Kind::Avx512Vnni | Kind::Avx512Bf16 => return 6,
        Kind::Avx512 | Kind::Avx2 => return 4,
        Kind::Scalar => {}
    }
    let _ = (isa, format);
    8
}

/// Panels that are read at once at most.
pub(crate) const STREAMS: usize = 4;

/// How many panels a few rows are best multiplied with at once. Each is a stream of its own for the processor's
/// prefetcher. Where one stream does not fill the memory's latency several are faster (Zen 3 with AVX2, one row, two
/// threads: 15 GB/s with one panel after another, 17 to 23 with two at once, 18 to 25 with four); with 512-bit loads one
/// is (Zen 4, one thread: 24 GB/s with one, 16 to 19 with two or four), and so with q8 (an output matrix of 35 MB: 2.5 ms
/// with one, 4.3 with four).
pub(crate) fn streams(isa: Isa, format: Format) -> usize {
    #[cfg(target_arch = "x86_64")]
    if matches!(isa.kind(), Kind::Avx512 | Kind::Avx2) && matches!(format, Format::Q4 { .. }) {
        return STREAMS;
    }
    let _ = (isa, format);
    1
}

/// What a kernel reads, with its lengths checked.
#[derive(Clone, Copy)]
struct Call<'a> {
    panels: &'a [&'a [u8]],
    rows: &'a [&'a [u8]],
    /// Values of a group.
    group: usize,
    groups: usize,
}

/// Multiplies up to `rows_at_most` rows of k values with some panels, each to its own tile.
///
/// # Panics
/// When a slice is too short, or the format has no codes.
pub(crate) fn multiply(
    isa: Isa,
    format: Format,
    panels: &[&[u8]],
    rows: &[&[u8]],
    k: usize,
    ahead: Ahead,
    outs: &mut [Tile],
) {
    let group = format.group();
    let groups = k.div_ceil(group);
    assert!(matches!(format, Format::Q8 | Format::Q4 { .. }) && rows.len() <= rows_at_most(isa, format));
    assert!(panels.len() == outs.len(), "a tile for each panel");
    let panel_bytes = groups * format.group_bytes();
    assert!(panels.iter().all(|panel| panel.len() >= panel_bytes), "a panel has {groups} groups");
    assert!(rows.iter().all(|row| row.len() >= groups * (HEAD + group)), "a row has {groups} groups");
    let call = Call { panels, rows, group, groups };
    #[cfg(target_arch = "x86_64")]
    if matches!(isa.kind(), Kind::Avx512 | Kind::Avx2) {
        // SAFETY: a token of these kinds is made only where the CPU has AVX2, FMA and F16C; lengths are checked above.
        return unsafe { avx2::multiply(format, call, ahead, outs) };
    }
    for (panel, out) in panels.iter().zip(outs) {
        let call = Call { panels: std::slice::from_ref(panel), ..call };
        #[cfg(target_arch = "x86_64")]
        if matches!(isa.kind(), Kind::Avx512Vnni | Kind::Avx512Bf16) {
            // SAFETY: a token of these kinds is made only where the CPU has VNNI; the lengths are checked above.
            unsafe { vnni::multiply(format, call, ahead, out) };
            continue;
        }
        for (row, out) in call.rows.iter().zip(&mut out.0) {
            *out = if format == Format::Q8 { portable::<true>(call, row) } else { portable::<false>(call, row) };
        }
    }
    let _ = ahead;
}

/// The definition, in plain code.
fn portable<const Q8: bool>(call: Call<'_>, row: &[u8]) -> [f32; PANEL] {
    let lines = call.group / 4 * if Q8 { Q8_LINES } else { LINE };
    let mut accumulators = [0f32; PANEL];
    let weights = call.panels[0].chunks_exact(PANEL * 2 + lines).take(call.groups);
    for (weights, row) in weights.zip(row.chunks_exact(HEAD + call.group)) {
        let (scales, lines) = weights.split_at(PANEL * 2);
        let word = |i: usize| [0, 1, 2, 3].map(|b| row[i * 4 + b]);
        let scale = f32::from_le_bytes(word(0));
        let (offset_8, offset_128) = (i32::from_le_bytes(word(1)), i32::from_le_bytes(word(2)));
        let mut sums = [offset_128; PANEL];
        let quads = row[HEAD..].as_chunks::<4>().0;
        if Q8 {
            for (line, quad) in lines.as_chunks::<Q8_LINES>().0.iter().zip(quads) {
                for (sum, bytes) in sums.iter_mut().zip(line.as_chunks::<4>().0) {
                    for (w, a) in bytes.iter().zip(quad) {
                        *sum += i32::from(*w) * i32::from(*a as i8);
                    }
                }
            }
        } else {
            let (low, high) = sums.split_at_mut(16);
            low.fill(offset_8);
            for (line, quad) in lines.as_chunks::<LINE>().0.iter().zip(quads) {
                for ((low, high), bytes) in low.iter_mut().zip(high.iter_mut()).zip(line.as_chunks::<4>().0) {
                    for (w, a) in bytes.iter().zip(quad) {
                        *low += i32::from(*w & 0x0f) * i32::from(*a as i8);
                        *high += i32::from(*w & 0xf0) * i32::from(*a as i8);
                    }
                }
            }
        }
        for (r, (accumulator, bytes)) in accumulators.iter_mut().zip(scales.as_chunks::<2>().0).enumerate() {
            let weight = f16::from_le_bytes(*bytes).to_f32();
            let weight = if Q8 || r < 16 { weight } else { weight * 0.0625 };
            *accumulator = (sums[r] as f32).mul_add(weight * scale, *accumulator);
        }
    }
    accumulators
}
