//! AVX2. q4: maddubs adds two products in 16 bits, of at most 2 · 15 · 127; a chain over exactly 32 values stays below
//! 2¹⁵ and is then widened. q8: codes are brought back to signed, and maddubs takes |w| and a · sign(w), of at most
//! 2 · 128 · 127, so it does not saturate. A vector has 8 rows x 4 bytes: half of a line, two row sets of q4.
use super::{Ahead, Call};
use crate::activations::HEAD;
use crate::gemm::Tile;
use crate::packed::{Format, LINE, PANEL, Q8_LINES};
use std::arch::x86_64::{
    __m128i, __m256, __m256i, _MM_HINT_T0, _mm_load_si128, _mm_prefetch, _mm256_abs_epi8, _mm256_add_epi16,
    _mm256_add_epi32, _mm256_and_si256, _mm256_cvtepi32_ps, _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_load_si256,
    _mm256_loadu_ps, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_mul_ps, _mm256_set1_epi8, _mm256_set1_epi16,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_si256, _mm256_sign_epi8, _mm256_slli_epi32, _mm256_srli_epi16,
    _mm256_storeu_ps, _mm256_xor_si256,
};

/// # Safety
/// The CPU must have AVX2, FMA and F16C, and the call's lengths must be checked.
pub(super) unsafe fn multiply(format: Format, call: Call<'_>, ahead: Ahead, outs: &mut [Tile]) {
    for out in &mut *outs {
        out.0[..call.rows.len()].as_flattened_mut().fill(0.0);
    }
    macro_rules! run {
        ($kernel:ident: $($rows:literal)*) => {
            match call.rows.len() {
                0 => {}
                // SAFETY: what is asked for is what the caller says.
                $($rows => unsafe { $kernel::<$rows>(call, ahead, outs) },)*
                rows => unreachable!("{rows} rows"),
            }
        };
    }
    match format {
        Format::Q8 => run!(q8: 1 2 3 4),
        Format::Q4 { group: 32 | 64 | 128 } => run!(q4: 1 2 3 4),
        format => unreachable!("no matrix with codes is packed as {format:?}"),
    }
}

/// Four bytes of a row, as an integer.
///
/// # Safety
/// They must be there.
#[inline(always)]
unsafe fn word(row: *const u8, at: usize) -> i32 {
    // SAFETY: by the caller's word.
    unsafe { row.add(at).cast::<i32>().read_unaligned() }
}

/// `out[first..first + 8] = fma(sums, weights · scale, itself)`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn accumulate(out: &mut [f32; PANEL], first: usize, sums: __m256i, weights: __m256, scale: __m256) {
    let out = &mut out[first..first + 8];
    // SAFETY: `out` has 8 values.
    unsafe {
        let sum =
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), _mm256_mul_ps(weights, scale), _mm256_loadu_ps(out.as_ptr()));
        _mm256_storeu_ps(out.as_mut_ptr(), sum);
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q4<const M: usize>(call: Call<'_>, ahead: Ahead, outs: &mut [Tile]) {
    let rows: [*const u8; M] = std::array::from_fn(|m| call.rows[m].as_ptr());
    let (mask, ones, sixteenth) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1), _mm256_set1_ps(0.0625));
    let group_bytes = PANEL * 2 + call.group / 4 * LINE;
    let mut next = ahead.from;
    for g in 0..call.groups {
        let offset = g * (HEAD + call.group);
        for (panel, out) in call.panels.iter().zip(outs.iter_mut()) {
            for half in [0, 1] {
                // SAFETY: the caller checked that the panel and each row have this group; a panel and its groups start on
                // 64-byte bounds; a group of weights has 64 bytes of scales, then a line for each quad; a group of a row has
                // 16 bytes, then 4 for each quad.
                unsafe {
                    let weights = panel.as_ptr().add(g * group_bytes);
                    let mut sums = [[_mm256_setzero_si256(); 2]; M];
                    for (sums, row) in sums.iter_mut().zip(rows) {
                        *sums = [_mm256_set1_epi32(word(row, offset + 4)), _mm256_set1_epi32(word(row, offset + 8))];
                    }
                    for part in 0..call.group / 32 {
                        let mut pairs = [[_mm256_setzero_si256(); 2]; M];
                        for quad in part * 8..part * 8 + 8 {
                            if half == 0 {
                                _mm_prefetch::<_MM_HINT_T0>(next.cast());
                                next = next.wrapping_add(ahead.step);
                            }
                            let line = _mm256_load_si256(weights.add(PANEL * 2 + quad * LINE + half * 32).cast());
                            let low = _mm256_and_si256(line, mask);
                            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(line), mask);
                            for (pairs, row) in pairs.iter_mut().zip(rows) {
                                let codes = _mm256_set1_epi32(word(row, offset + HEAD + quad * 4));
                                pairs[0] = _mm256_add_epi16(pairs[0], _mm256_maddubs_epi16(low, codes));
                                pairs[1] = _mm256_add_epi16(pairs[1], _mm256_maddubs_epi16(high, codes));
                            }
                        }
                        for (sums, pairs) in sums.iter_mut().zip(pairs) {
                            let high = _mm256_slli_epi32::<4>(_mm256_madd_epi16(pairs[1], ones));
                            sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(pairs[0], ones));
                            sums[1] = _mm256_add_epi32(sums[1], high);
                        }
                    }
                    let low = _mm256_cvtph_ps(_mm_load_si128(weights.add(half * 16).cast()));
                    let high = _mm256_cvtph_ps(_mm_load_si128(weights.add(32 + half * 16).cast()));
                    let high = _mm256_mul_ps(high, sixteenth);
                    for (m, sums) in sums.into_iter().enumerate() {
                        let scale = _mm256_set1_ps(f32::from_bits(word(rows[m], offset) as u32));
                        accumulate(&mut out.0[m], half * 8, sums[0], low, scale);
                        accumulate(&mut out.0[m], 16 + half * 8, sums[1], high, scale);
                    }
                }
            }
        }
        next = next.wrapping_add(ahead.step);
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q8<const M: usize>(call: Call<'_>, ahead: Ahead, outs: &mut [Tile]) {
    let rows: [*const u8; M] = std::array::from_fn(|m| call.rows[m].as_ptr());
    let (sign, ones) = (_mm256_set1_epi8(-128), _mm256_set1_epi16(1));
    let group_bytes = Format::Q8.group_bytes();
    let mut next = ahead.from;
    for g in 0..call.groups {
        let offset = g * (HEAD + 32);
        // rows 0..16, then 16..32: two vectors each
        for (panel, out) in call.panels.iter().zip(outs.iter_mut()) {
            for half in [0, 1] {
                // SAFETY: as in `q4`, with two lines for each quad and groups of 32.
                unsafe {
                    let weights = panel.as_ptr().add(g * group_bytes);
                    let mut sums = [[_mm256_setzero_si256(); 2]; M];
                    for quad in 0..8 {
                        _mm_prefetch::<_MM_HINT_T0>(next.cast());
                        next = next.wrapping_add(ahead.step);
                        let line = weights.add(PANEL * 2 + quad * Q8_LINES + half * LINE).cast::<__m256i>();
                        let first = _mm256_xor_si256(_mm256_load_si256(line), sign);
                        let second = _mm256_xor_si256(_mm256_load_si256(line.add(1)), sign);
                        let codes = [(first, _mm256_abs_epi8(first)), (second, _mm256_abs_epi8(second))];
                        for (sums, row) in sums.iter_mut().zip(rows) {
                            let x = _mm256_set1_epi32(word(row, offset + HEAD + quad * 4));
                            for (sum, (code, size)) in sums.iter_mut().zip(codes) {
                                let pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(x, code));
                                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
                            }
                        }
                    }
                    let scales = weights.add(half * 32).cast::<__m128i>();
                    let first = _mm256_cvtph_ps(_mm_load_si128(scales));
                    let second = _mm256_cvtph_ps(_mm_load_si128(scales.add(1)));
                    for (m, sums) in sums.into_iter().enumerate() {
                        let scale = _mm256_set1_ps(f32::from_bits(word(rows[m], offset) as u32));
                        accumulate(&mut out.0[m], half * 16, sums[0], first, scale);
                        accumulate(&mut out.0[m], half * 16 + 8, sums[1], second, scale);
                    }
                }
            }
        }
        next = next.wrapping_add(ahead.step);
    }
}
