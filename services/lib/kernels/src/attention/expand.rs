//! Keys and values that are not stored as the products take them: int8 is widened to pairs of bf16 (exactly: 7 bits of
//! a number fit, -128 not being among them: see `layout`), and with `v_in_k` the values are turned out of the keys.
use super::layout::{LANES, Line};
use crate::isa::{Isa, for_each_isa};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m512i, _mm512_abs_epi8, _mm512_loadu_si512, _mm512_permutex2var_epi8, _mm512_permutexvar_epi64, _mm512_set_epi64,
    _mm512_set1_epi8, _mm512_ternarylogic_epi32, _mm512_unpackhi_epi8, _mm512_unpacklo_epi8,
};

/// Lines of keys that hold a tile's dimensions as pairs.
const PAIRS: usize = LANES / 2;

/// int8 numbers to bf16, 32 for each line. `ahead` is what is read next: as much of it is fetched meanwhile.
pub(super) fn widen(isa: Isa, bytes: &[u8], ahead: &[u8], lines: &mut [Line]) {
    assert!(bytes.len() >= lines.len() * 2 * LANES);
    let done = 0;
    #[cfg(target_arch = "x86_64")]
    let done = if isa.kind() >= crate::isa::Kind::Avx512 && std::is_x86_feature_detected!("avx512vbmi") {
        // SAFETY: tokens from this kind on are made only where the CPU has AVX-512 F and BW; VBMI is looked up.
        unsafe { widen_vectors(bytes, ahead, lines) }
    } else {
        done
    };
    let _ = ahead;
    widen_portable(isa, &bytes[done * 2 * LANES..], &mut lines[done..]);
}

for_each_isa! {
    /// As [`widen`].
    fn widen_portable(bytes: &[u8], lines: &mut [Line]) => widen_body
}

/// As [`widen`]; returns how many lines are done: all but an odd one.
///
/// # Safety
/// The CPU must have AVX-512 F, BW and VBMI; there are 32 bytes for each line.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
unsafe fn widen_vectors(bytes: &[u8], ahead: &[u8], lines: &mut [Line]) -> usize {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch, _mm512_store_si512};
    let widener = Widener::new();
    let pairs = lines.len() / 2;
    for pair in 0..pairs {
        _mm_prefetch::<_MM_HINT_T1>(ahead.as_ptr().wrapping_add(pair * 64).cast());
        // SAFETY: 64 bytes for each two lines, and two aligned lines.
        unsafe {
            let [first, second] = widener.widen(_mm512_loadu_si512(bytes.as_ptr().add(pair * 64).cast()));
            let lines = lines.as_mut_ptr().add(pair * 2);
            _mm512_store_si512(lines.cast(), first);
            _mm512_store_si512(lines.add(1).cast(), second);
        }
    }
    pairs * 2
}

/// Widens int8 by tables of the bytes of the numbers 0 to 127 in bf16 (-128 would become -0).
#[cfg(target_arch = "x86_64")]
pub(super) struct Widener {
    low: [__m512i; 2],
    high: [__m512i; 2],
    sign: __m512i,
    order: __m512i,
}

#[cfg(target_arch = "x86_64")]
impl Widener {
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    #[inline]
    pub(super) fn new() -> Self {
        static TABLES: [[u8; 128]; 2] = {
            let mut tables = [[0; 128]; 2];
            let mut number = 0;
            while number < 128 {
                let bits = (number as f32).to_bits();
                tables[0][number] = (bits >> 16) as u8;
                tables[1][number] = (bits >> 24) as u8;
                number += 1;
            }
            tables
        };
        let table = |byte: usize, half: usize| {
            // SAFETY: a half of a table is 64 bytes.
            unsafe { _mm512_loadu_si512(TABLES[byte][half * 64..].as_ptr().cast()) }
        };
        Self {
            low: [table(0, 0), table(0, 1)],
            high: [table(1, 0), table(1, 1)],
            sign: _mm512_set1_epi8(-128),
            // what is unpacked from the lower halves of the 128-bit parts becomes the first line
            order: _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0),
        }
    }

    /// Two lines' numbers.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    #[inline]
    pub(super) fn widen(&self, numbers: __m512i) -> [__m512i; 2] {
        let numbers = _mm512_permutexvar_epi64(self.order, numbers);
        let size = _mm512_abs_epi8(numbers);
        let first = _mm512_permutex2var_epi8(self.low[0], size, self.low[1]);
        let second = _mm512_permutex2var_epi8(self.high[0], size, self.high[1]);
        // the sign's bit of the number, the others of the table
        let second = _mm512_ternarylogic_epi32::<0xd8>(second, numbers, self.sign);
        [_mm512_unpacklo_epi8(first, second), _mm512_unpackhi_epi8(first, second)]
    }
}

#[inline(always)]
fn widen_body(bytes: &[u8], lines: &mut [Line]) {
    for (line, bytes) in lines.iter_mut().zip(bytes.as_chunks::<{ 2 * LANES }>().0) {
        let numbers: &mut [u16] = bytemuck::cast_slice_mut(&mut line.0);
        for (number, byte) in numbers.iter_mut().zip(bytes) {
            *number = (f32::from(*byte as i8).to_bits() >> 16) as u16;
        }
    }
}

for_each_isa! {
    /// Turns a run of keys in f32 `[k_dim][16 tokens]` into one tile's values `[16 tokens][16 dimensions]`.
    pub(super) fn turn_floats(keys: &[Line], tile: usize, out: &mut [Line]) => turn_floats_body
}

#[inline(always)]
fn turn_floats_body(keys: &[Line], tile: usize, out: &mut [Line]) {
    let keys = &keys[tile * LANES..];
    let mut floats = [Line::ZERO; LANES];
    let count = keys.len().min(LANES);
    floats[..count].copy_from_slice(&keys[..count]);
    let out = out.first_chunk_mut::<LANES>().expect("a tile has room for a run");
    for (token, out) in out.iter_mut().enumerate() {
        out.0.iter_mut().zip(&floats).for_each(|(out, keys)| *out = keys.0[token]);
    }
}

/// Turns a run of keys in pairs `[k_dim / 2][16 tokens][2 dimensions]` into one tile's values
/// `[8 pairs of tokens][16 dimensions][2 tokens]`.
pub(super) fn turn_pairs(isa: Isa, keys: &[Line], tile: usize, out: &mut [Line]) {
    let keys = &keys[tile * PAIRS..];
    let mut pairs = [Line::ZERO; PAIRS];
    let count = keys.len().min(PAIRS);
    pairs[..count].copy_from_slice(&keys[..count]);
    turn(isa, &pairs, out);
}

/// As [`turn_pairs`] with keys in int8.
pub(super) fn turn_bytes(isa: Isa, keys: &[u8], tile: usize, out: &mut [Line]) {
    let mut pairs = [Line::ZERO; PAIRS];
    let keys = &keys[tile * PAIRS * 2 * LANES..];
    let count = (keys.len() / (2 * LANES)).min(PAIRS);
    widen(isa, keys, keys, &mut pairs[..count]);
    turn(isa, &pairs, out);
}

fn turn(isa: Isa, pairs: &[Line; PAIRS], out: &mut [Line]) {
    let out = out.first_chunk_mut::<PAIRS>().expect("a tile has room for a run");
    #[cfg(target_arch = "x86_64")]
    if isa.kind() >= crate::isa::Kind::Avx512 {
        // SAFETY: tokens from this kind on are made only where the CPU has AVX-512 F and BW.
        return unsafe { turn_vectors(pairs, out) };
    }
    let _ = isa;
    for (token, out) in out.iter_mut().enumerate() {
        for (pair, out) in pairs.iter().zip(out.0.as_chunks_mut::<2>().0) {
            let (first, second) = (pair.0[2 * token], pair.0[2 * token + 1]);
            *out = [first & 0xffff | second << 16, first >> 16 | second & 0xffff_0000];
        }
    }
}

/// The 2 x 2 numbers of a pair of dimensions and a pair of tokens are one quadword: each is turned on its own, then the
/// 8 x 8 quadwords as a whole.
///
/// # Safety
/// The CPU must have AVX-512 F and BW.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn turn_vectors(pairs: &[Line; PAIRS], out: &mut [Line; PAIRS]) {
    use std::arch::x86_64::{
        __m512i, _mm_set_epi8, _mm512_broadcast_i32x4, _mm512_load_si512, _mm512_shuffle_epi8, _mm512_shuffle_i64x2,
        _mm512_store_si512, _mm512_unpackhi_epi64, _mm512_unpacklo_epi64,
    };
    let swap = _mm512_broadcast_i32x4(_mm_set_epi8(15, 14, 11, 10, 13, 12, 9, 8, 7, 6, 3, 2, 5, 4, 1, 0));
    let r: [__m512i; PAIRS] = std::array::from_fn(|i| {
        // SAFETY: a line is 64 aligned bytes.
        _mm512_shuffle_epi8(unsafe { _mm512_load_si512(pairs[i].0.as_ptr().cast()) }, swap)
    });
    // t[2i] has the even, t[2i + 1] the odd quadwords of rows 2i and 2i + 1
    let t: [__m512i; PAIRS] = std::array::from_fn(|i| {
        let (a, b) = (r[i & !1], r[i | 1]);
        if i % 2 == 0 { _mm512_unpacklo_epi64(a, b) } else { _mm512_unpackhi_epi64(a, b) }
    });
    // the 128-bit parts are a 4 x 4 matrix for the even and one for the odd quadwords
    for odd in 0..2 {
        let [a, b, c, d] = [t[odd], t[2 + odd], t[4 + odd], t[6 + odd]];
        let (ab_low, ab_high) = (_mm512_shuffle_i64x2::<0x88>(a, b), _mm512_shuffle_i64x2::<0xdd>(a, b));
        let (cd_low, cd_high) = (_mm512_shuffle_i64x2::<0x88>(c, d), _mm512_shuffle_i64x2::<0xdd>(c, d));
        let parts = [
            _mm512_shuffle_i64x2::<0x88>(ab_low, cd_low),
            _mm512_shuffle_i64x2::<0x88>(ab_high, cd_high),
            _mm512_shuffle_i64x2::<0xdd>(ab_low, cd_low),
            _mm512_shuffle_i64x2::<0xdd>(ab_high, cd_high),
        ];
        for (part, vector) in parts.into_iter().enumerate() {
            // SAFETY: as above.
            unsafe { _mm512_store_si512(out[2 * part + odd].0.as_mut_ptr().cast(), vector) };
        }
    }
}
