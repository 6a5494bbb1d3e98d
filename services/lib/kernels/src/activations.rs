//! Activations as products read them: rows of f32, of bf16, or int8 codes in groups.
//!
//! A bf16 row has k numbers of two bytes, to the nearest, ties to even, and one of zero where k is odd.
//! An int8 row has, for each group of G values (the weights' group length): f32 scale, i32 -8 Σ codes, i32 -128 Σ codes,
//! 4 bytes of nothing, then G codes. The sums undo the offset that packed weights have (see `packed`). Scale =
//! max|x| / 127, code = x · 127 / max|x| to the nearest integer, ties to even; so the error is at most half a scale.
//! Where max|x| is below 127 times the least normal number, the group counts as zeros; where a value is infinite or no
//! number, the scale is NaN, and so is every product of this row. Columns beyond the last are zeros.
use crate::bf16::round;
use crate::gemm::TILE;
#[cfg(target_arch = "x86_64")]
use crate::isa::Kind;
use crate::isa::{Isa, for_each_isa};
use crate::packed::Format;
use std::cell::Cell;
use std::ops::Range;

/// How a product with bf16, q8 or q4 weights takes its activations. Products with f32 weights take f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ActivationFormat {
    /// As they are; the weights are widened to f32. Slow, and as exact as the weights.
    F32,
    /// Rounded. For q8 and q4: to int8, symmetric, with a scale for each group of the weights' group length, which is
    /// several times as fast. For bf16: to bf16, which is faster where the processor multiplies pairs of it, and the same
    /// everywhere else.
    #[default]
    Int8,
}

/// Bytes of a group in front of its codes.
pub(crate) const HEAD: usize = 16;

/// The form in which one product reads its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// f32 values.
    Float,
    /// bf16 values.
    Bf16,
    /// int8 in groups.
    Int8 {
        /// Values of a group.
        group: usize,
    },
}

impl Form {
    pub(crate) fn new(activations: ActivationFormat, weights: Format) -> Self {
        match (activations, weights) {
            (ActivationFormat::F32, _) | (_, Format::F32) => Self::Float,
            (ActivationFormat::Int8, Format::Bf16) => Self::Bf16,
            (ActivationFormat::Int8, format) => Self::Int8 { group: format.group() },
        }
    }

    /// Bytes of a row of k values, a multiple of 4.
    pub(crate) fn row_bytes(self, k: usize) -> usize {
        match self {
            Self::Float => k * 4,
            Self::Bf16 => k.next_multiple_of(2) * 2,
            Self::Int8 { group } => k.div_ceil(group) * (HEAD + group),
        }
    }

    /// Writes a row, or whole groups of it.
    pub(crate) fn write(self, isa: Isa, values: &[f32], out: &mut [u8]) {
        match self {
            Self::Float => out.copy_from_slice(bytemuck::cast_slice(values)),
            Self::Bf16 => round_all(isa, values, out),
            Self::Int8 { group } => quantize(isa, group, values, out),
        }
    }
}

/// Rows `[rows, k]` in one form.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    bytes: &'a [u8],
    stride: usize,
}

impl<'a> Rows<'a> {
    pub(crate) fn new(form: Form, k: usize, bytes: &'a [u8]) -> Self {
        Self { bytes, stride: form.row_bytes(k) }
    }

    pub(crate) fn row(&self, index: usize) -> &'a [u8] {
        &self.bytes[index * self.stride..][..self.stride]
    }

    /// One tile's rows, those behind them empty: row i is number `index(i)`.
    pub(crate) fn tile(&self, rows: Range<usize>, index: impl Fn(usize) -> usize) -> [&'a [u8]; TILE] {
        let mut slices: [&[u8]; TILE] = [&[]; TILE];
        for (slice, row) in slices.iter_mut().zip(rows) {
            *slice = self.row(index(row));
        }
        slices
    }
}

for_each_isa! {
    /// Rounds values to bf16.
    fn round_all(values: &[f32], out: &mut [u8]) => round_body
}

#[inline(always)]
fn round_body(values: &[f32], out: &mut [u8]) {
    let (out, rest) = out.split_at_mut(values.len() * 2);
    for (out, value) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
        *out = ((round(*value) >> 16) as u16).to_le_bytes();
    }
    rest.fill(0);
}

/// Quantizes values in groups; the last group may be short.
fn quantize(isa: Isa, group: usize, values: &[f32], out: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    let done = match isa.kind() {
        Kind::Scalar => 0,
        // SAFETY: tokens of this kind are made only where the CPU has AVX2, FMA and F16C.
        Kind::Avx2 => unsafe { quantize_vectors_avx2(group, values, out) },
        // SAFETY: tokens of these kinds are made only where the CPU has these parts of AVX-512.
        Kind::Avx512 | Kind::Avx512Vnni | Kind::Avx512Bf16 => unsafe { quantize_vectors(group, values, out) },
    };
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
    quantize_portable(isa, group, &values[done * group..], &mut out[done * (HEAD + group)..]);
}

/// [`quantize`] of all whole groups by a body of so many vectors; the number of these groups.
#[cfg(target_arch = "x86_64")]
macro_rules! whole_groups {
    ($body:ident, $group:expr, $values:expr, $out:expr, $($length:literal: $vectors:literal)*) => {
        match $group {
            $($length => {
                let groups = $values.as_chunks::<$length>().0.iter().zip($out.chunks_exact_mut(HEAD + $length));
                let done = groups.len();
                for (values, out) in groups {
                    // SAFETY: a group has so many vectors of values, and as many codes behind its head; the caller of
                    // the function around this states what the CPU has.
                    unsafe { $body::<$vectors>(values.as_ptr(), out.as_mut_ptr()) };
                }
                done
            })*
            _ => 0,
        }
    };
}

/// As [`quantize`]; returns how many groups are done: all whole ones.
///
/// # Safety
/// The CPU must have AVX-512 F, BW, VL and DQ.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn quantize_vectors(group: usize, values: &[f32], out: &mut [u8]) -> usize {
    whole_groups!(quantize_group_vectors, group, values, out, 32: 2 64: 4 128: 8)
}

/// As [`quantize_vectors`].
///
/// # Safety
/// The CPU must have AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn quantize_vectors_avx2(group: usize, values: &[f32], out: &mut [u8]) -> usize {
    whole_groups!(quantize_group_avx2, group, values, out, 32: 4 64: 8 128: 16)
}

/// # Safety
/// The CPU must have AVX-512 F, BW, VL and DQ; N vectors can be read, and [`HEAD`] bytes and N · 16 codes written.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
unsafe fn quantize_group_vectors<const N: usize>(values: *const f32, out: *mut u8) {
    use std::arch::x86_64::{
        _mm_storeu_si128, _mm512_add_epi32, _mm512_and_si512, _mm512_castps_si512, _mm512_cvtepi32_epi8,
        _mm512_cvtps_epi32, _mm512_loadu_ps, _mm512_max_epu32, _mm512_mul_ps, _mm512_reduce_add_epi32,
        _mm512_reduce_max_epu32, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_si512,
    };
    // SAFETY: N vectors can be read.
    let vectors: [_; N] = std::array::from_fn(|i| unsafe { _mm512_loadu_ps(values.add(i * 16)) });
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    let mut largest = _mm512_setzero_si512();
    for vector in vectors {
        largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(vector), magnitude));
    }
    let (scale, inverse) = scale_of(f32::from_bits(_mm512_reduce_max_epu32(largest)));
    let factor = _mm512_set1_ps(inverse);
    let mut sums = _mm512_setzero_si512();
    for (i, vector) in vectors.into_iter().enumerate() {
        // to the nearest, ties to even; zero times infinity is no number, whose bits must not become a code
        let codes =
            if inverse == 0.0 { _mm512_setzero_si512() } else { _mm512_cvtps_epi32(_mm512_mul_ps(vector, factor)) };
        sums = _mm512_add_epi32(sums, codes);
        // SAFETY: N · 16 codes can be written behind the head.
        unsafe { _mm_storeu_si128(out.add(HEAD + i * 16).cast(), _mm512_cvtepi32_epi8(codes)) };
    }
    // SAFETY: the head can be written.
    write_head(scale, _mm512_reduce_add_epi32(sums), unsafe { &mut *out.cast() });
}

/// # Safety
/// The CPU must have AVX2; N vectors, a multiple of 4, can be read, and [`HEAD`] bytes and N · 8 codes written.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn quantize_group_avx2<const N: usize>(values: *const f32, out: *mut u8) {
    use std::arch::x86_64::{
        _mm_add_epi32, _mm_cvtsi128_si32, _mm_max_epu32, _mm_shuffle_epi32, _mm256_add_epi32, _mm256_and_si256,
        _mm256_castps_si256, _mm256_castsi256_si128, _mm256_cvtps_epi32, _mm256_extracti128_si256, _mm256_loadu_ps,
        _mm256_max_epu32, _mm256_mul_ps, _mm256_packs_epi16, _mm256_packs_epi32, _mm256_permutevar8x32_epi32,
        _mm256_set1_epi32, _mm256_set1_ps, _mm256_setr_epi32, _mm256_setzero_si256, _mm256_storeu_si256,
    };
    // SAFETY: N vectors can be read.
    let vector = |i: usize| unsafe { _mm256_loadu_ps(values.add(i * 8)) };
    let magnitude = _mm256_set1_epi32(0x7fff_ffff);
    let mut largest = _mm256_setzero_si256();
    for i in 0..N {
        largest = _mm256_max_epu32(largest, _mm256_and_si256(_mm256_castps_si256(vector(i)), magnitude));
    }
    let largest = _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256::<1>(largest));
    let largest = _mm_max_epu32(largest, _mm_shuffle_epi32::<0b01_00_11_10>(largest));
    let largest = _mm_max_epu32(largest, _mm_shuffle_epi32::<0b10_11_00_01>(largest));
    let (scale, inverse) = scale_of(f32::from_bits(_mm_cvtsi128_si32(largest) as u32));
    let factor = _mm256_set1_ps(inverse);
    // packing takes the halves of its operands in turn
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let mut sums = _mm256_setzero_si256();
    for i in (0..N).step_by(4) {
        let codes: [_; 4] = std::array::from_fn(|j| match inverse == 0.0 {
            // zero times infinity is no number, whose bits must not become a code
            true => _mm256_setzero_si256(),
            // to the nearest, ties to even
            false => _mm256_cvtps_epi32(_mm256_mul_ps(vector(i + j), factor)),
        });
        for codes in codes {
            sums = _mm256_add_epi32(sums, codes);
        }
        let packed = _mm256_packs_epi16(_mm256_packs_epi32(codes[0], codes[1]), _mm256_packs_epi32(codes[2], codes[3]));
        // SAFETY: N · 8 codes can be written behind the head.
        unsafe {
            let codes = out.add(HEAD + i * 8).cast();
            _mm256_storeu_si256(codes, _mm256_permutevar8x32_epi32(packed, order));
        }
    }
    let sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
    let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b01_00_11_10>(sum));
    let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b10_11_00_01>(sum));
    // SAFETY: the head can be written.
    write_head(scale, _mm_cvtsi128_si32(sum), unsafe { &mut *out.cast() });
}

for_each_isa! {
    /// As [`quantize`].
    fn quantize_portable(group: usize, values: &[f32], out: &mut [u8]) => quantize_body
}

#[inline(always)]
fn quantize_body(group: usize, values: &[f32], out: &mut [u8]) {
    for (values, out) in values.chunks(group).zip(out.chunks_exact_mut(HEAD + group)) {
        match (values.len(), group) {
            (32, 32) => quantize_group(values.as_chunks::<32>().0, out),
            (64, 64) | (128, 128) => quantize_group(values.as_chunks::<64>().0, out),
            _ => {
                let mut padded = [0f32; 128];
                padded[..values.len()].copy_from_slice(values);
                quantize_group(padded[..group].as_chunks::<32>().0, out);
            }
        }
    }
}

/// Adding this to a value of less than 2²² rounds it to an integer, ties to even, which then stands in the low bits.
pub(crate) const ROUND: f32 = 12_582_912.0;

#[inline(always)]
fn quantize_group<const N: usize>(parts: &[[f32; N]], out: &mut [u8]) {
    let (head, codes) = out.split_at_mut(HEAD);
    // bits without the sign sort as the magnitudes do, infinities and NaN above all
    let mut largest = [0u32; N];
    for part in parts {
        for (l, v) in largest.iter_mut().zip(part) {
            *l = (*l).max(v.to_bits() & 0x7fff_ffff);
        }
    }
    let (scale, inverse) = scale_of(f32::from_bits(largest.into_iter().fold(0, u32::max)));
    let mut sum = 0i32;
    for (part, codes) in parts.iter().zip(codes.as_chunks_mut::<N>().0) {
        let mut rounded = [0i32; N];
        for (r, v) in rounded.iter_mut().zip(part) {
            // zero times infinity is no number, whose bits must not become a code
            let scaled = if inverse == 0.0 { 0.0 } else { v * inverse };
            *r = (scaled + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
        }
        for (code, r) in codes.iter_mut().zip(rounded) {
            *code = r as u8;
        }
        sum += rounded.into_iter().sum::<i32>();
    }
    write_head(scale, sum, head.first_chunk_mut().expect("a group has a head"));
}

/// A group's scale and what its values are multiplied with, by its largest magnitude.
#[inline(always)]
fn scale_of(largest: f32) -> (f32, f32) {
    match largest / 127.0 {
        scale if !scale.is_finite() => (f32::NAN, 0.0),
        scale if scale < f32::MIN_POSITIVE => (0.0, 0.0),
        scale => (scale, 127.0 / largest),
    }
}

#[inline(always)]
fn write_head(scale: f32, sum: i32, head: &mut [u8; HEAD]) {
    head[..4].copy_from_slice(&scale.to_le_bytes());
    head[4..8].copy_from_slice(&(-8 * sum).to_le_bytes());
    head[8..12].copy_from_slice(&(-128 * sum).to_le_bytes());
    head[12..].fill(0);
}

/// Memory that a thread keeps from call to call: no allocation once it has grown. 16-byte aligned.
#[derive(Default)]
pub(crate) struct Buffer(Vec<u128>);

impl Buffer {
    /// `len` bytes of any content.
    pub(crate) fn bytes(&mut self, len: usize) -> &mut [u8] {
        if self.0.len() * 16 < len {
            self.0.resize(len.div_ceil(16), 0);
        }
        &mut bytemuck::cast_slice_mut(&mut self.0)[..len]
    }

    /// `len` floats of any content.
    pub(crate) fn floats(&mut self, len: usize) -> &mut [f32] {
        bytemuck::cast_slice_mut(self.bytes(len * 4))
    }
}

/// A value that a thread lends out and takes back. A second borrower, or one after a panic, gets a new one.
pub(crate) fn with<T: Default, R>(cell: &'static std::thread::LocalKey<Cell<T>>, work: impl FnOnce(&mut T) -> R) -> R {
    let mut value = cell.take();
    let result = work(&mut value);
    cell.set(value);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(group: usize, values: &[f32]) -> Vec<u8> {
        let mut out = vec![0xff; Form::Int8 { group }.row_bytes(values.len())];
        let mut all = Isa::available().into_iter().map(|isa| {
            quantize(isa, group, values, &mut out);
            out.clone()
        });
        let first = all.next().expect("there is portable code");
        assert!(all.all(|other| other == first), "instruction sets differ");
        first
    }

    #[test]
    fn codes_are_to_the_nearest_and_sums_undo_the_offsets() {
        for group in [32, 64, 128] {
            let values: Vec<f32> = (0..300).map(|i| ((i * 37 % 101) as f32 - 50.0) / (1 + i / 64) as f32).collect();
            let bytes = row(group, &values);
            for (values, bytes) in values.chunks(group).zip(bytes.chunks_exact(HEAD + group)) {
                let word = |i: usize| <[u8; 4]>::try_from(&bytes[i..i + 4]).expect("four bytes");
                let scale = f32::from_le_bytes(word(0));
                let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
                assert_eq!(scale, largest / 127.0);
                let codes: Vec<i32> = bytes[HEAD..].iter().map(|b| i32::from(*b as i8)).collect();
                let sum: i32 = codes.iter().sum();
                assert_eq!((i32::from_le_bytes(word(4)), i32::from_le_bytes(word(8))), (-8 * sum, -128 * sum));
                for (i, code) in codes.iter().enumerate() {
                    let value = values.get(i).copied().unwrap_or(0.0);
                    assert_eq!(*code, (value * (127.0 / largest)).round_ties_even() as i32, "{value}");
                }
            }
        }
    }

    #[test]
    fn what_has_no_scale_is_zeros_or_nan() {
        for (value, nan) in
            [(0.0, false), (-0.0, false), (1e-40, false), (1e-37, false), (f32::NAN, true), (-f32::INFINITY, true)]
        {
            let mut values = [0f32; 64];
            values[40] = value;
            let bytes = row(32, &values);
            let second = &bytes[HEAD + 32..];
            let scale = f32::from_le_bytes(second[..4].try_into().expect("four bytes"));
            assert_eq!((scale.is_nan(), scale == 0.0), (nan, !nan), "{value}");
            assert!(second[4..].iter().all(|b| *b == 0), "{value}");
        }
        let largest = row(32, &[f32::MAX; 32]);
        assert!(largest[HEAD..].iter().all(|b| *b == 127));
    }
}
