//! AVX-512 VNNI. Per quad one line is loaded (q8: two), split into two vectors of 16 rows x 4 bytes, and multiplied with
//! each row's four codes, broadcast from memory. The accumulators of up to 6 rows stand in 24 registers; with more rows
//! (groups of 64 and 128) those in f32 are moved out once a group, which the longer group pays for.
use super::{Ahead, Call};
use crate::activations::HEAD;
use crate::gemm::Tile;
use crate::packed::{Format, LINE, PANEL};
use std::arch::x86_64::{
    _MM_HINT_T0, _mm_prefetch, _mm256_load_si256, _mm512_and_si512, _mm512_andnot_si512, _mm512_cvtepi32_ps,
    _mm512_cvtph_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_load_si512, _mm512_mul_ps, _mm512_set1_epi8,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};

/// # Safety
/// The CPU must have AVX-512 F, BW, VL, DQ and VNNI, and the call's lengths must be checked.
pub(super) unsafe fn multiply(format: Format, call: Call<'_>, ahead: Ahead, out: &mut Tile) {
    macro_rules! run {
        ($parts:literal, $q8:literal: $($rows:literal)*) => {
            match call.rows.len() {
                0 => {}
                // SAFETY: what is asked for is what the caller says.
                $($rows => unsafe { tile::<$rows, $parts, $q8>(call, ahead, out) },)*
                rows => unreachable!("{rows} rows"),
            }
        };
    }
    match format {
        Format::Q8 => run!(1, true: 1 2 3 4 5 6),
        Format::Q4 { group: 32 } => run!(1, false: 1 2 3 4 5 6),
        Format::Q4 { group: 64 } => run!(2, false: 1 2 3 4 5 6 7 8),
        Format::Q4 { group: 128 } => run!(4, false: 1 2 3 4 5 6 7 8),
        format => unreachable!("no matrix with codes is packed as {format:?}"),
    }
}

/// M rows; a group has `PARTS` parts of 32 values.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn tile<const M: usize, const PARTS: usize, const Q8: bool>(call: Call<'_>, ahead: Ahead, out: &mut Tile) {
    let lines = if Q8 { 2 } else { 1 };
    let rows: [*const u8; M] = std::array::from_fn(|m| call.rows[m].as_ptr());
    let mask = _mm512_set1_epi8(0x0f);
    let high_factor = _mm512_set1_ps(if Q8 { 1.0 } else { 0.0625 });
    let mut weights = call.panels[0].as_ptr();
    let mut next = ahead.from;
    let mut offset = 0;
    let mut accumulators = [[_mm512_setzero_ps(); 2]; M];
    for _ in 0..call.groups {
        // SAFETY: the caller checked that the panel and each row have this group; a panel and its groups start on
        // 64-byte bounds; a group of weights has 64 bytes of scales, then its lines; a group of a row has 16 bytes, then
        // 4 for each quad.
        unsafe {
            let scales = weights;
            _mm_prefetch::<_MM_HINT_T0>(next.cast());
            next = next.wrapping_add(ahead.step);
            let word = |m: usize, at: usize| rows[m].add(offset + at).cast::<i32>().read_unaligned();
            let mut sums = [[_mm512_set1_epi32(0); 2]; M];
            for (m, sums) in sums.iter_mut().enumerate() {
                let offset_128 = _mm512_set1_epi32(word(m, 8));
                *sums = [if Q8 { offset_128 } else { _mm512_set1_epi32(word(m, 4)) }, offset_128];
            }
            let mut line = weights.add(PANEL * 2);
            let mut at = HEAD;
            for _ in 0..PARTS {
                for _ in 0..8 {
                    let first = _mm512_load_si512(line.cast());
                    let (low, high) = if Q8 {
                        _mm_prefetch::<_MM_HINT_T0>(next.cast());
                        next = next.wrapping_add(ahead.step);
                        (first, _mm512_load_si512(line.add(LINE).cast()))
                    } else {
                        (_mm512_and_si512(first, mask), _mm512_andnot_si512(mask, first))
                    };
                    _mm_prefetch::<_MM_HINT_T0>(next.cast());
                    next = next.wrapping_add(ahead.step);
                    for (m, sums) in sums.iter_mut().enumerate() {
                        let codes = _mm512_set1_epi32(word(m, at));
                        sums[0] = _mm512_dpbusd_epi32(sums[0], low, codes);
                        sums[1] = _mm512_dpbusd_epi32(sums[1], high, codes);
                    }
                    line = line.add(lines * LINE);
                    at += 4;
                }
            }
            weights = line;
            let low = _mm512_cvtph_ps(_mm256_load_si256(scales.cast()));
            let high = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_load_si256(scales.add(32).cast())), high_factor);
            for (m, (accumulators, sums)) in accumulators.iter_mut().zip(sums).enumerate() {
                let scale = _mm512_set1_ps(f32::from_bits(word(m, 0) as u32));
                let sum = [_mm512_cvtepi32_ps(sums[0]), _mm512_cvtepi32_ps(sums[1])];
                accumulators[0] = _mm512_fmadd_ps(sum[0], _mm512_mul_ps(low, scale), accumulators[0]);
                accumulators[1] = _mm512_fmadd_ps(sum[1], _mm512_mul_ps(high, scale), accumulators[1]);
            }
        }
        offset += HEAD + PARTS * 32;
    }
    for (accumulators, out) in accumulators.iter().zip(&mut out.0) {
        // SAFETY: a row of a tile has 32 values, two vectors.
        unsafe {
            _mm512_storeu_ps(out.as_mut_ptr(), accumulators[0]);
            _mm512_storeu_ps(out.as_mut_ptr().add(16), accumulators[1]);
        }
    }
}
