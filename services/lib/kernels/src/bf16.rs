//! bfloat16, as the kernels read and write it: the upper half of an f32.
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m512, __m512bh, __m512i, _mm512_dpbf16_ps};
#[cfg(target_arch = "x86_64")]
use std::mem::transmute;

/// The upper half of the result is `x` rounded to bf16.
#[inline(always)]
pub(crate) fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    // to the nearest, ties to even; a NaN must not be carried into an infinity or a zero
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    if x.is_nan() { bits | 0x0040_0000 } else { rounded }
}

/// A number of a row of x, and the order in which the columns of such rows are multiplied.
pub(crate) trait Number: bytemuck::Pod {
    /// Which of `k` columns comes i-th.
    fn column(i: usize, k: usize) -> usize;

    /// The number.
    fn widen(self) -> f32;
}

impl Number for f32 {
    #[inline(always)]
    fn column(i: usize, _: usize) -> usize {
        i
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

/// The bits of a bf16; of a pair the second comes first, as `vdpbf16ps` takes them.
impl Number for u16 {
    #[inline(always)]
    fn column(i: usize, k: usize) -> usize {
        if i ^ 1 < k { i ^ 1 } else { i }
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }
}

/// `sum + x · weights` of pairs, by lanes; of each pair the second product comes first, and denormals count as zeros.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
pub(crate) fn multiply(sum: __m512, x: __m512i, weights: __m512i) -> __m512 {
    // SAFETY: all three types are 64 plain bytes.
    let (x, weights) = unsafe { (transmute::<__m512i, __m512bh>(x), transmute::<__m512i, __m512bh>(weights)) };
    _mm512_dpbf16_ps(sum, x, weights)
}
