//! Block formats of ggml: sizes and exact dequantization, with ggml's own formulas (`ggml-quants.c`).
//!
//! Blocks of 32 with one scale and no minimum (Q4_0, Q5_0, Q8_0, MXFP4) are codes that our q4 or q8 holds as they are.
//! The others are converted to q8 by default, which adds about 0.5 % (relative root mean square of a matrix, normally
//! distributed weights) to the blocks' own error of 1.8 % (Q6_K), 3.7 % (Q5_K, Q5_1), 7.4 % (Q4_K), 7.7 % (Q4_1), 15 %
//! (Q3_K) or 29 % (Q2_K): Q6_K's becomes 1.9 %, the others grow by a hundredth of themselves or less
//! (`tests/conversions.rs`).
use super::mxfp4::{self, Order};
use half::f16;
use moesaic_types::WeightFormat;

/// `(values, bytes)` of a block.
pub fn block(name: &str) -> Option<(usize, usize)> {
    Some(match name {
        "Q4_0" => (32, 18),
        "Q4_1" => (32, 20),
        "Q5_0" => (32, 22),
        "Q5_1" => (32, 24),
        "Q8_0" => (32, 34),
        "MXFP4" => (32, 17),
        "Q2_K" => (256, 84),
        "Q3_K" => (256, 110),
        "Q4_K" => (256, 144),
        "Q5_K" => (256, 176),
        "Q6_K" => (256, 210),
        _ => return None,
    })
}

/// Writes the values of whole blocks; false for a name that [`block`] does not know, and for MXFP4 with a scale that
/// makes a value that is not finite.
pub fn dequantize(name: &str, bytes: &[u8], out: &mut [f32]) -> bool {
    let Some((values, size)) = block(name) else { return false };
    if name == "MXFP4" {
        let mut blocks = bytes.chunks_exact(size).zip(out.chunks_exact_mut(values));
        return blocks.all(|(b, out)| mxfp4::values(Order::Halves, b[0], &b[1..], out));
    }
    let one: fn(&[u8], &mut [f32]) = match name {
        "Q4_0" => q4_0,
        "Q4_1" => q4_1,
        "Q5_0" => q5_0,
        "Q5_1" => q5_1,
        "Q8_0" => q8_0,
        "Q2_K" => q2_k,
        "Q3_K" => q3_k,
        "Q4_K" => q4_k,
        "Q5_K" => q5_k,
        _ => q6_k,
    };
    for (bytes, out) in bytes.chunks_exact(size).zip(out.chunks_exact_mut(values)) {
        one(bytes, out);
    }
    true
}

/// Our format that holds the codes and scales of whole blocks without rounding. For MXFP4: q8 if f16 holds all their
/// scales, else bf16.
pub fn exact(name: &str, bytes: &[u8]) -> Option<WeightFormat> {
    match name {
        "Q4_0" => Some(WeightFormat::Q4 { group: 32 }),
        "Q5_0" | "Q8_0" => Some(WeightFormat::Q8),
        "MXFP4" => {
            let mut blocks = bytes.chunks_exact(1 + mxfp4::CODES);
            let fit = blocks.all(|b| mxfp4::codes(Order::Halves, b[0], &b[1..], &mut [0; 32]).is_some());
            Some(if fit { WeightFormat::Q8 } else { WeightFormat::Bf16 })
        }
        _ => None,
    }
}

/// Writes the scales and codes of whole blocks; false where our formats cannot take them.
pub fn codes(name: &str, bytes: &[u8], scales: &mut [f16], codes: &mut [i8]) -> bool {
    let one: fn(&[u8], &mut [i8]) -> Option<f16> = match name {
        "Q4_0" => q4_0_codes,
        "Q5_0" => q5_0_codes,
        "Q8_0" => q8_0_codes,
        "MXFP4" => |b, codes| mxfp4::codes(Order::Halves, b[0], &b[1..], codes),
        _ => return false,
    };
    let Some((values, size)) = block(name) else { return false };
    let mut blocks = bytes.chunks_exact(size).zip(scales).zip(codes.chunks_exact_mut(values));
    blocks.all(|((b, scale), codes)| one(b, codes).map(|found| *scale = found).is_some())
}

fn q4_0_codes(b: &[u8], codes: &mut [i8]) -> Option<f16> {
    let (low, up) = codes.split_at_mut(16);
    for ((low, up), &q) in low.iter_mut().zip(up).zip(&b[2..18]) {
        (*low, *up) = ((q & 15) as i8 - 8, (q >> 4) as i8 - 8);
    }
    Some(f16::from_le_bytes([b[0], b[1]]))
}

fn q5_0_codes(b: &[u8], codes: &mut [i8]) -> Option<f16> {
    let high = word(b, 2);
    for (j, &q) in b[6..22].iter().enumerate() {
        [codes[j], codes[j + 16]] = five_bits(high, q, j).map(|code| code as i8 - 16);
    }
    Some(f16::from_le_bytes([b[0], b[1]]))
}

fn q8_0_codes(b: &[u8], codes: &mut [i8]) -> Option<f16> {
    codes.iter_mut().zip(&b[2..34]).for_each(|(code, &q)| *code = q as i8);
    Some(f16::from_le_bytes([b[0], b[1]]))
}

fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn q4_0(b: &[u8], y: &mut [f32]) {
    let d = half(b, 0);
    for (j, &q) in b[2..18].iter().enumerate() {
        y[j] = (f32::from(q & 15) - 8.0) * d;
        y[j + 16] = (f32::from(q >> 4) - 8.0) * d;
    }
}

fn q4_1(b: &[u8], y: &mut [f32]) {
    let (d, m) = (half(b, 0), half(b, 2));
    for (j, &q) in b[4..20].iter().enumerate() {
        y[j] = f32::from(q & 15) * d + m;
        y[j + 16] = f32::from(q >> 4) * d + m;
    }
}

/// The two 5-bit values of byte `j`.
fn five_bits(high: u32, q: u8, j: usize) -> [u8; 2] {
    let low = q & 15 | ((high >> j) << 4 & 16) as u8;
    let up = q >> 4 | (high >> (j + 12) & 16) as u8;
    [low, up]
}

fn q5_0(b: &[u8], y: &mut [f32]) {
    let (d, high) = (half(b, 0), word(b, 2));
    for (j, &q) in b[6..22].iter().enumerate() {
        let [low, up] = five_bits(high, q, j).map(f32::from);
        y[j] = (low - 16.0) * d;
        y[j + 16] = (up - 16.0) * d;
    }
}

fn q5_1(b: &[u8], y: &mut [f32]) {
    let (d, m, high) = (half(b, 0), half(b, 2), word(b, 4));
    for (j, &q) in b[8..24].iter().enumerate() {
        let [low, up] = five_bits(high, q, j).map(f32::from);
        y[j] = low * d + m;
        y[j + 16] = up * d + m;
    }
}

fn q8_0(b: &[u8], y: &mut [f32]) {
    let d = half(b, 0);
    for (value, &q) in y.iter_mut().zip(&b[2..34]) {
        *value = f32::from(q as i8) * d;
    }
}

fn q2_k(b: &[u8], y: &mut [f32]) {
    let (scales, qs, d, dmin) = (&b[..16], &b[16..80], half(b, 80), half(b, 82));
    for (i, y) in y.chunks_exact_mut(16).enumerate() {
        // 16 values: half `n` of the block, 2-bit plane `shift`, first or second 16 bytes
        let (n, shift, part) = (i / 8, i % 8 / 2 * 2, i % 2);
        let (dl, ml) = (d * f32::from(scales[i] & 15), dmin * f32::from(scales[i] >> 4));
        for (value, &q) in y.iter_mut().zip(&qs[n * 32 + part * 16..]) {
            *value = dl * f32::from(q >> shift & 3) - ml;
        }
    }
}

fn q3_k(b: &[u8], y: &mut [f32]) {
    const LOW2: u32 = 0x0303_0303;
    const LOW4: u32 = 0x0f0f_0f0f;
    let (mask, qs, d) = (&b[..32], &b[32..96], half(b, 108));
    let (a0, a1, high) = (word(b, 96), word(b, 100), word(b, 104));
    let packed = [
        a0 & LOW4 | (high & LOW2) << 4,
        a1 & LOW4 | (high >> 2 & LOW2) << 4,
        a0 >> 4 & LOW4 | (high >> 4 & LOW2) << 4,
        a1 >> 4 & LOW4 | (high >> 6 & LOW2) << 4,
    ];
    for (i, y) in y.chunks_exact_mut(16).enumerate() {
        let (n, plane, part) = (i / 8, i % 8 / 2, i % 2);
        let dl = d * (f32::from(packed[i / 4].to_le_bytes()[i % 4]) - 32.0);
        let bit = 1u8 << (n * 4 + plane);
        for (l, value) in y.iter_mut().enumerate() {
            let q = f32::from(qs[n * 32 + part * 16 + l] >> (plane * 2) & 3);
            let minus = if mask[part * 16 + l] & bit == 0 { 4.0 } else { 0.0 };
            *value = dl * (q - minus);
        }
    }
}

/// The 6-bit scale and minimum number `j` of a K block.
fn scale_min(scales: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (scales[j] & 63, scales[j + 4] & 63)
    } else {
        (scales[j + 4] & 15 | scales[j - 4] >> 6 << 4, scales[j + 4] >> 4 | scales[j] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

fn q4_k(b: &[u8], y: &mut [f32]) {
    let (d, dmin, scales, qs) = (half(b, 0), half(b, 2), &b[4..16], &b[16..144]);
    for (i, y) in y.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(scales, i);
        let (dl, ml, shift) = (d * scale, dmin * min, i % 2 * 4);
        for (value, &q) in y.iter_mut().zip(&qs[i / 2 * 32..]) {
            *value = dl * f32::from(q >> shift & 15) - ml;
        }
    }
}

fn q5_k(b: &[u8], y: &mut [f32]) {
    let (d, dmin, scales, high, qs) = (half(b, 0), half(b, 2), &b[4..16], &b[16..48], &b[48..176]);
    for (i, y) in y.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(scales, i);
        let (dl, ml, shift) = (d * scale, dmin * min, i % 2 * 4);
        for (l, value) in y.iter_mut().enumerate() {
            let q = qs[i / 2 * 32 + l] >> shift & 15 | (high[l] >> i & 1) << 4;
            *value = dl * f32::from(q) - ml;
        }
    }
}

fn q6_k(b: &[u8], y: &mut [f32]) {
    let (low, high, scales, d) = (&b[..128], &b[128..192], &b[192..208], half(b, 208));
    for (i, value) in y.iter_mut().enumerate() {
        let (n, part, l) = (i / 128, i % 128 / 32, i % 32);
        let q = low[n * 64 + part % 2 * 32 + l] >> (part / 2 * 4) & 15;
        let q = q | (high[n * 32 + l] >> (part * 2) & 3) << 4;
        let scale = scales[n * 8 + part * 2 + l / 16] as i8;
        *value = d * f32::from(scale) * (f32::from(q) - 32.0);
    }
}
