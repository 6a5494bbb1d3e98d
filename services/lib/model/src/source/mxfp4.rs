//! MXFP4 (OCP Microscaling Formats 1.0): blocks of 32 codes e2m1 of 4 bits under one scale e8m0, a power of two.
//!
//! A code is a half-integer up to 6, so a block is int8 codes (twice the value) times a power of two: q8 holds it
//! without rounding wherever f16 holds that power, which is 2^-24 to 2^15, a few more where the codes allow a shift.
//! Beyond, bf16 holds every value. Negative zero becomes zero.
use half::f16;

/// Values of a block.
pub(super) const BLOCK: usize = 32;
/// Bytes of a block's codes.
pub(super) const CODES: usize = BLOCK / 2;

/// Twice the value of each code.
const TWICE: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];
/// Exponents of the powers of two that f16 has.
const F16_EXPONENTS: std::ops::RangeInclusive<i32> = -24..=15;

/// Which values the two nibbles of byte `i` are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// `2 i` (low) and `2 i + 1`: safetensors.
    Pairs,
    /// `i` (low) and `i + 16`: GGUF.
    Halves,
}

fn twice(order: Order, bytes: &[u8], out: &mut [i8]) {
    for (i, &byte) in bytes.iter().enumerate().take(CODES) {
        let (low, high) = match order {
            Order::Pairs => (2 * i, 2 * i + 1),
            Order::Halves => (i, i + CODES),
        };
        out[low] = TWICE[usize::from(byte & 15)];
        out[high] = TWICE[usize::from(byte >> 4)];
    }
}

/// The exponent of a scale for doubled codes; `None` for the byte that is no number.
fn exponent(scale: u8) -> Option<i32> {
    (scale != u8::MAX).then(|| i32::from(scale) - 128)
}

/// `2^exponent`, from 2^-149 to 2^127.
fn power(exponent: i32) -> f32 {
    if exponent < -126 {
        f32::from_bits(1 << (exponent + 149))
    } else {
        f32::from_bits(((exponent + 127) as u32) << 23)
    }
}

/// Writes a block's values; false if one of them is no finite f32.
pub(super) fn values(order: Order, scale: u8, bytes: &[u8], out: &mut [f32]) -> bool {
    let Some(exponent) = exponent(scale) else { return false };
    let mut codes = [0; BLOCK];
    twice(order, bytes, &mut codes);
    let scale = power(exponent);
    out.iter_mut().zip(codes).for_each(|(value, code)| *value = f32::from(code) * scale);
    out.iter().all(|value| value.is_finite())
}

/// Writes a block's codes for q8 and gives their scale; `None` where f16 has none.
pub(super) fn codes(order: Order, scale: u8, bytes: &[u8], out: &mut [i8]) -> Option<f16> {
    let exponent = exponent(scale)?;
    twice(order, bytes, out);
    let nearest = exponent.clamp(*F16_EXPONENTS.start(), *F16_EXPONENTS.end());
    let shift = exponent - nearest;
    for code in out.iter_mut().filter(|code| shift != 0 && **code != 0) {
        let wide = i32::from(*code);
        let moved = match shift {
            1..=7 => wide << shift,
            -7..=-1 if wide % (1 << -shift) == 0 => wide >> -shift,
            _ => return None,
        };
        *code = i8::try_from(moved).ok()?;
    }
    Some(if out.iter().all(|code| *code == 0) { f16::ZERO } else { f16::from_f32(power(nearest)) })
}
