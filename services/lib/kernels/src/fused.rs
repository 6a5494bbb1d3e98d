//! `avx512-{bf16,q8,q4}-fused`: tiles of up to 8 rows of x against one packed panel, the weights expanded in registers.
//!
//! Shapes: x `[rows, k]` f32, panel of 32 rows, tile `[8][32]` f32. Every weight is expanded to the f32 value that
//! `expand_panel` gives, and products are accumulated k ascending by fused multiply-add: the bits are those of the
//! portable path. Outline: per k one 16, 32 or 64 byte line becomes two vectors of 16 weights (q4 by a table of 16
//! values in a register), which all rows of the tile share.
use crate::packed::{Format, PANEL};
use std::arch::x86_64::{
    __m128i, __m256i, __m512, _mm_and_si128, _mm_loadu_si128, _mm_set1_epi8, _mm_srli_epi16, _mm256_loadu_si256,
    _mm512_castsi512_ps, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_cvtepu8_epi32, _mm512_cvtepu16_epi32,
    _mm512_cvtph_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mul_ps, _mm512_permutexvar_ps, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_slli_epi32, _mm512_storeu_ps,
};

/// Rows of x in a tile at most.
pub(crate) const ROWS: usize = 8;

/// The values of the nibbles.
static NIBBLES: [f32; 16] = [-8., -7., -6., -5., -4., -3., -2., -1., 0., 1., 2., 3., 4., 5., 6., 7.];

/// Multiplies `rows` rows of x with a panel; false, and nothing done, where there is no fused kernel: for f32, and for
/// more than 8 rows.
///
/// # Safety
/// The CPU must have AVX-512 F, BW, VL and DQ.
pub(crate) unsafe fn tile(
    format: Format,
    panel: &[u8],
    x: &[f32],
    k: usize,
    rows: usize,
    tile: &mut [[f32; PANEL]; ROWS],
) -> bool {
    macro_rules! run {
        ($rows:literal) => {
            // SAFETY: the caller says that the CPU has the instructions; lengths are asserted inside.
            unsafe {
                match format {
                    Format::F32 => return false,
                    Format::Bf16 => bf16::<$rows>(panel, x, k, tile),
                    Format::Q8 => q8::<$rows>(panel, x, k, tile),
                    Format::Q4 { group } => q4::<$rows>(panel, usize::from(group), x, k, tile),
                }
            }
        };
    }
    match rows {
        0 => {}
        1 => run!(1),
        2 => run!(2),
        3 => run!(3),
        4 => run!(4),
        5 => run!(5),
        6 => run!(6),
        7 => run!(7),
        8 => run!(8),
        _ => return false,
    }
    true
}

/// Two vectors of 16 rows' accumulators for each row of x.
type Accumulators<const R: usize> = [[__m512; 2]; R];

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
fn zero<const R: usize>() -> Accumulators<R> {
    [[_mm512_setzero_ps(); 2]; R]
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
fn step<const R: usize>(acc: &mut Accumulators<R>, low: __m512, high: __m512, x: &[f32], k: usize, i: usize) {
    for (r, acc) in acc.iter_mut().enumerate() {
        let value = _mm512_set1_ps(x[r * k + i]);
        acc[0] = _mm512_fmadd_ps(value, low, acc[0]);
        acc[1] = _mm512_fmadd_ps(value, high, acc[1]);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
fn store<const R: usize>(acc: &Accumulators<R>, tile: &mut [[f32; PANEL]; ROWS]) {
    for (acc, row) in acc.iter().zip(tile) {
        // SAFETY: a row has 32 values, two vectors.
        unsafe {
            _mm512_storeu_ps(row.as_mut_ptr(), acc[0]);
            _mm512_storeu_ps(row.as_mut_ptr().add(16), acc[1]);
        }
    }
}

/// The scales of rows 0..16 and 16..32 at the start of a group.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
fn scales(group: &[u8]) -> (__m512, __m512) {
    let halves = &group[..PANEL * 2];
    // SAFETY: 64 bytes are there.
    unsafe {
        let at = halves.as_ptr().cast::<__m256i>();
        (_mm512_cvtph_ps(_mm256_loadu_si256(at)), _mm512_cvtph_ps(_mm256_loadu_si256(at.add(1))))
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn bf16<const R: usize>(panel: &[u8], x: &[f32], k: usize, tile: &mut [[f32; PANEL]; ROWS]) {
    assert!(x.len() >= R * k && panel.len() >= k * PANEL * 2, "x and panel have k columns");
    let mut acc = zero::<R>();
    for (i, line) in panel.as_chunks::<{ PANEL * 2 }>().0[..k].iter().enumerate() {
        // SAFETY: a line has 64 bytes.
        let (low, high) = unsafe {
            let at = line.as_ptr().cast::<__m256i>();
            (_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1)))
        };
        let low = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(low)));
        let high = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high)));
        step::<R>(&mut acc, low, high, x, k, i);
    }
    store::<R>(&acc, tile);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn q8<const R: usize>(panel: &[u8], x: &[f32], k: usize, tile: &mut [[f32; PANEL]; ROWS]) {
    let group_bytes = Format::Q8.group_bytes();
    assert!(x.len() >= R * k && panel.len() >= k.div_ceil(32) * group_bytes, "x and panel have k columns");
    let mut acc = zero::<R>();
    for (g, group) in panel.chunks_exact(group_bytes).enumerate().take(k.div_ceil(32)) {
        let (scale_low, scale_high) = scales(group);
        let lines = group[PANEL * 2..].as_chunks::<PANEL>().0;
        for (i, line) in lines.iter().enumerate().take(k - g * 32) {
            // SAFETY: a line has 32 bytes.
            let (low, high) = unsafe {
                let at = line.as_ptr().cast::<__m128i>();
                (_mm_loadu_si128(at), _mm_loadu_si128(at.add(1)))
            };
            let low = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(low)), scale_low);
            let high = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(high)), scale_high);
            step::<R>(&mut acc, low, high, x, k, g * 32 + i);
        }
    }
    store::<R>(&acc, tile);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn q4<const R: usize>(panel: &[u8], size: usize, x: &[f32], k: usize, tile: &mut [[f32; PANEL]; ROWS]) {
    let group_bytes = PANEL * 2 + size * PANEL / 2;
    assert!(x.len() >= R * k && panel.len() >= k.div_ceil(size) * group_bytes, "x and panel have k columns");
    // SAFETY: the table has 16 values.
    let table = unsafe { _mm512_loadu_ps(NIBBLES.as_ptr()) };
    let mask = _mm_set1_epi8(15);
    let mut acc = zero::<R>();
    for (g, group) in panel.chunks_exact(group_bytes).enumerate().take(k.div_ceil(size)) {
        let (scale_low, scale_high) = scales(group);
        let lines = group[PANEL * 2..].as_chunks::<{ PANEL / 2 }>().0;
        for (i, line) in lines.iter().enumerate().take(k - g * size) {
            // SAFETY: a line has 16 bytes.
            let bytes = unsafe { _mm_loadu_si128(line.as_ptr().cast::<__m128i>()) };
            let low = _mm512_cvtepu8_epi32(_mm_and_si128(bytes, mask));
            let high = _mm512_cvtepu8_epi32(_mm_and_si128(_mm_srli_epi16::<4>(bytes), mask));
            let low = _mm512_mul_ps(_mm512_permutexvar_ps(low, table), scale_low);
            let high = _mm512_mul_ps(_mm512_permutexvar_ps(high, table), scale_high);
            step::<R>(&mut acc, low, high, x, k, g * size + i);
        }
    }
    store::<R>(&acc, tile);
}
