//! FP8 of type e4m3 (OCP FP8 1.0: no infinities, one pattern that is no number), with a scale for each block of a
//! matrix, as DeepSeek-V3 is published: a value is `code * scale` in f32. No format of ours holds these values; by
//! default they are rounded to q8, which takes about what the file takes and adds 0.6 % at most (relative root mean square of
//! a matrix) to FP8's own error of 2.6 % (`tests/compressed.rs`); `--weights bf16` adds 0.2 % and takes twice as much.

/// The values of all codes.
static VALUES: [f32; 256] = table();

const fn table() -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let (exponent, mantissa) = (code >> 3 & 15, code & 7);
        let magnitude = if exponent == 0 {
            mantissa as f32 / 512.0
        } else if exponent == 15 && mantissa == 7 {
            f32::NAN
        } else {
            (8 + mantissa) as f32 * f32::from_bits((exponent as u32 + 127 - 10) << 23)
        };
        values[code] = if code < 128 { magnitude } else { -magnitude };
        code += 1;
    }
    values
}

/// Writes the values of codes under one scale; false if one of them is no finite number.
pub(super) fn values(codes: &[u8], scale: f32, out: &mut [f32]) -> bool {
    for (value, code) in out.iter_mut().zip(codes) {
        *value = VALUES[usize::from(*code)] * scale;
    }
    out.iter().all(|value| value.is_finite())
}

#[cfg(test)]
mod tests {
    use super::VALUES;

    #[test]
    fn codes_have_the_standards_values() {
        let known = [(0x00, 0.0), (0x01, 2f32.powi(-9)), (0x07, 0.875 * 2f32.powi(-6)), (0x08, 2f32.powi(-6))];
        let more = [(0x38, 1.0), (0x39, 1.125), (0x40, 2.0), (0x7e, 448.0), (0xfe, -448.0), (0xb8, -1.0)];
        for (code, value) in known.into_iter().chain(more) {
            assert_eq!(VALUES[code], value, "{code:#x}");
        }
        assert!(VALUES[0x7f].is_nan() && VALUES[0xff].is_nan());
        assert_eq!(VALUES.iter().filter(|value| value.is_finite()).count(), 254);
        assert!(VALUES[..0x7f].is_sorted());
    }
}
