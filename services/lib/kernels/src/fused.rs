//! `avx512-bf16-fused`: tiles of up to 8 rows of x against one packed bf16 panel, the weights widened in registers.
//!
//! Shapes: x M rows of k f32, panel of 32 rows, tile `[M][32]` f32. Products are accumulated k ascending by fused
//! multiply-add: the bits are those of the portable path, which expands the panel first. Outline: per k one line of 64
//! bytes becomes two vectors of 16 weights, which all rows of the tile share.
use crate::gemm::Tile;
use crate::packed::PANEL;
use std::arch::x86_64::{
    __m256i, __m512, _mm256_load_si256, _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_fmadd_ps, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_slli_epi32, _mm512_storeu_ps,
};

/// Multiplies up to 8 rows of k values with a bf16 panel.
///
/// # Safety
/// The CPU must have AVX-512 F, BW, VL and DQ.
pub(crate) unsafe fn tile(panel: &[u8], rows: &[&[f32]], k: usize, out: &mut Tile) {
    macro_rules! run {
        ($($rows:literal)*) => {
            match rows.len() {
                0 => {}
                // SAFETY: the caller says that the CPU has the instructions; lengths are asserted inside.
                $($rows => unsafe { bf16::<$rows>(panel, rows, k, out) },)*
                rows => unreachable!("{rows} rows"),
            }
        };
    }
    run!(1 2 3 4 5 6 7 8)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn bf16<const R: usize>(panel: &[u8], x: &[&[f32]], k: usize, out: &mut Tile) {
    assert!(panel.len() >= k * PANEL * 2 && x.iter().all(|x| x.len() >= k), "x and panel have k columns");
    assert!((panel.as_ptr() as usize).is_multiple_of(64), "a panel starts on a 64-byte bound");
    let rows: [*const f32; R] = std::array::from_fn(|r| x[r].as_ptr());
    let mut accumulators: [[__m512; 2]; R] = [[_mm512_setzero_ps(); 2]; R];
    for i in 0..k {
        // SAFETY: the panel has k lines of 64 bytes, and each row k values.
        unsafe {
            let at = panel.as_ptr().add(i * PANEL * 2).cast::<__m256i>();
            let (low, high) = (_mm256_load_si256(at), _mm256_load_si256(at.add(1)));
            let low = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(low)));
            let high = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high)));
            for (r, accumulators) in accumulators.iter_mut().enumerate() {
                let value = _mm512_set1_ps(*rows[r].add(i));
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
