//! `avx512-bf16-{pairs,widened}`: tiles of up to 8 rows of x against one packed bf16 panel.
//!
//! Shapes: x M rows of k numbers, panel of 32 rows, tile `[M][32]` f32. `pairs`: the lines of two columns are woven into
//! two vectors of pairs, one for each row of the panel, which all rows of the tile share; `vdpbf16ps` multiplies them, the
//! second of a pair first, and takes denormals for zeros. `widened`: the weights become f32 in registers and are
//! multiplied by fused multiply-add, in the order of [`Number::column`]: the bits are those of the portable path, which
//! expands the panel first. Accumulation is f32; largest error against f64 of the rounded inputs: k · 2⁻²⁴ relative to
//! Σ|x·w|. Source: Intel's manual on `vdpbf16ps`.
use crate::bf16::{Number, multiply};
use crate::gemm::Tile;
use crate::packed::PANEL;
use std::arch::x86_64::{
    __m256i, __m512, _mm256_load_si256, _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_fmadd_ps, _mm512_load_si512,
    _mm512_permutex2var_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setr_epi32, _mm512_setzero_ps,
    _mm512_setzero_si512, _mm512_slli_epi32, _mm512_storeu_ps, _mm512_unpackhi_epi16, _mm512_unpacklo_epi16,
};

/// Bytes of a column.
const COLUMN: usize = PANEL * 2;

/// A call with a constant for the number of rows, 1 to 8.
macro_rules! for_rows {
    ($rows:expr, $constant:ident => $call:expr) => { for_rows!($rows, $constant => $call, 1 2 3 4 5 6 7 8) };
    ($rows:expr, $constant:ident => $call:expr, $($count:literal)*) => {
        match $rows {
            0 => {}
            $($count => {
                const $constant: usize = $count;
                $call
            })*
            rows => unreachable!("{rows} rows"),
        }
    };
}

/// Multiplies up to 8 rows of k bf16 numbers, given as bytes, with a bf16 panel.
///
/// # Safety
/// The CPU must have AVX-512 F, BW and BF16.
pub(crate) unsafe fn pairs(panel: &[u8], rows: &[&[u8]], k: usize, out: &mut Tile) {
    // SAFETY: the caller says that the CPU has the instructions; lengths are asserted inside.
    for_rows!(rows.len(), R => unsafe { pairs_of::<R>(panel, rows, k, out) });
}

/// Multiplies up to 8 rows of k values with a bf16 panel.
///
/// # Safety
/// The CPU must have AVX-512 F, BW, VL and DQ.
pub(crate) unsafe fn widened<T: Number>(panel: &[u8], rows: &[&[T]], k: usize, out: &mut Tile) {
    // SAFETY: the caller says that the CPU has the instructions; lengths are asserted inside.
    for_rows!(rows.len(), R => unsafe { widened_of::<T, R>(panel, rows, k, out) });
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pairs_of<const R: usize>(panel: &[u8], x: &[&[u8]], k: usize, out: &mut Tile) {
    assert!(panel.len() >= k * COLUMN && x.iter().all(|x| x.len() >= k.next_multiple_of(2) * 2), "k columns");
    assert!((panel.as_ptr() as usize).is_multiple_of(64), "a panel starts on a 64-byte bound");
    let rows: [*const i32; R] = std::array::from_fn(|r| x[r].as_ptr().cast());
    let mut sums: [[__m512; 2]; R] = [[_mm512_setzero_ps(); 2]; R];
    for pair in 0..k.div_ceil(2) {
        // SAFETY: the panel has k lines of 64 bytes, of which 2 · pair is one; each row has k numbers, and one more where
        // k is odd.
        unsafe {
            let first = panel.as_ptr().add(pair * 2 * COLUMN);
            let second =
                if pair * 2 + 1 < k { _mm512_load_si512(first.add(COLUMN).cast()) } else { _mm512_setzero_si512() };
            let first = _mm512_load_si512(first.cast());
            // by 128 bits: rows 8 i .. 8 i + 4, and rows 8 i + 4 .. 8 i + 8
            let (low, high) = (_mm512_unpacklo_epi16(first, second), _mm512_unpackhi_epi16(first, second));
            for (sums, row) in sums.iter_mut().zip(rows) {
                let x = _mm512_set1_epi32(row.add(pair).read_unaligned());
                sums[0] = multiply(sums[0], x, low);
                sums[1] = multiply(sums[1], x, high);
            }
        }
    }
    let lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    let upper = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for ([low, high], out) in sums.into_iter().zip(&mut out.0) {
        // SAFETY: a row of a tile has 32 values, two vectors.
        unsafe {
            _mm512_storeu_ps(out.as_mut_ptr(), _mm512_permutex2var_ps(low, lower, high));
            _mm512_storeu_ps(out.as_mut_ptr().add(16), _mm512_permutex2var_ps(low, upper, high));
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn widened_of<T: Number, const R: usize>(panel: &[u8], x: &[&[T]], k: usize, out: &mut Tile) {
    assert!(panel.len() >= k * COLUMN && x.iter().all(|x| x.len() >= k), "x and panel have k columns");
    assert!((panel.as_ptr() as usize).is_multiple_of(64), "a panel starts on a 64-byte bound");
    let rows: [*const T; R] = std::array::from_fn(|r| x[r].as_ptr());
    let mut accumulators: [[__m512; 2]; R] = [[_mm512_setzero_ps(); 2]; R];
    for i in 0..k {
        let column = T::column(i, k);
        // SAFETY: the panel has k lines of 64 bytes, and each row k values; the column is less than k.
        unsafe {
            let at = panel.as_ptr().add(column * COLUMN).cast::<__m256i>();
            let (low, high) = (_mm256_load_si256(at), _mm256_load_si256(at.add(1)));
            let low = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(low)));
            let high = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high)));
            for (r, accumulators) in accumulators.iter_mut().enumerate() {
                let value = _mm512_set1_ps((*rows[r].add(column)).widen());
                accumulators[0] = _mm512_fmadd_ps(value, low, accumulators[0]);
                accumulators[1] = _mm512_fmadd_ps(value, high, accumulators[1]);
            }
        }
    }
    for (accumulators, out) in accumulators.iter().zip(&mut out.0) {
        // SAFETY: a row of a tile has 32 values, two vectors.
        unsafe {
            _mm512_storeu_ps(out.as_mut_ptr(), accumulators[0]);
            _mm512_storeu_ps(out.as_mut_ptr().add(16), accumulators[1]);
        }
    }
}
