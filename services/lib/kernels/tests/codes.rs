//! Codes that were quantized elsewhere stay what they are, on every instruction set.
use half::f16;
use moesaic_kernels::{ActivationFormat, AlignedBytes, Error, Format, Isa, Kernels, PackedMatrix, Storage};
use std::convert::Infallible;
use std::sync::Arc;

const ROWS: usize = 37;
const COLS: usize = 256;

/// Scales of every kind: both signs, subnormal, zero, the largest.
fn scale(row: usize, group: usize) -> f16 {
    let bits = [0x3c00, 0xb400, 0x0001, 0x8003, 0x0000, 0x03ff, 0x7bff, 0x1234];
    f16::from_bits(bits[(row * 5 + group) % bits.len()])
}

fn code(format: Format, row: usize, col: usize) -> i8 {
    let mixed = (row * 131 + col * 29 + row * col % 7) as u8;
    if format == Format::Q8 { mixed as i8 } else { (mixed % 16) as i8 - 8 }
}

fn matrix(format: Format) -> PackedMatrix {
    let fill = |row: usize, scales: &mut [f16], codes: &mut [i8]| {
        scales.iter_mut().enumerate().for_each(|(group, s)| *s = scale(row, group));
        codes.iter_mut().enumerate().for_each(|(col, c)| *c = code(format, row, col));
        Ok::<_, Infallible>(())
    };
    let Ok(packed) = PackedMatrix::pack_codes(format, ROWS, COLS, fill);
    packed
}

#[test]
fn every_code_times_its_scale_to_the_bit() {
    for format in [Format::Q8, Format::Q4 { group: 32 }, Format::Q4 { group: 64 }, Format::Q4 { group: 128 }] {
        let packed = matrix(format);
        let value = |row, col| f32::from(code(format, row, col)) * scale(row, col / format.group()).to_f32();
        let mut values = vec![0.0; COLS];
        for row in 0..ROWS {
            packed.dequantize_row(row, &mut values);
            for (col, got) in values.iter().enumerate() {
                assert_eq!(got.to_bits(), value(row, col).to_bits(), "{format:?} {row} {col}");
            }
        }
        // unit vectors, few and many, bring the weights out of the products
        for isa in Isa::available() {
            for activations in [ActivationFormat::F32, ActivationFormat::Int8] {
                let kernels = Kernels::with_isa(1, isa).with_activations(activations);
                for m in [1, 9] {
                    for first in (0..COLS).step_by(23).filter(|first| first + m <= COLS) {
                        let mut x = vec![0.0; m * COLS];
                        (0..m).for_each(|i| x[i * COLS + first + i] = 1.0);
                        let mut out = vec![0.0; m * ROWS];
                        kernels.linear(&packed, &x, m, None, &mut out);
                        for (i, got) in out.iter().enumerate() {
                            let want: f32 = value(i % ROWS, first + i / ROWS);
                            // int8 takes 1 as 127 times the float next to 1 / 127
                            let error = if activations == ActivationFormat::Int8 { want.abs() * 2e-7 } else { 0.0 };
                            assert!((got - want).abs() <= error, "{isa} {format:?} {activations:?} {i}: {got} {want}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn the_largest_codes_do_not_overflow() {
    for format in [Format::Q8, Format::Q4 { group: 32 }, Format::Q4 { group: 64 }, Format::Q4 { group: 128 }] {
        let extremes = if format == Format::Q8 { [-128, 127] } else { [-8, 7] };
        for code in extremes {
            let Ok(packed) = PackedMatrix::pack_codes(format, ROWS, COLS, |_, scales, codes| {
                scales.fill(f16::ONE);
                codes.fill(code);
                Ok::<_, Infallible>(())
            });
            for isa in Isa::available() {
                for (m, value) in [(1, 127.0), (3, -127.0), (9, -127.0)] {
                    let mut out = vec![0.0; m * ROWS];
                    Kernels::with_isa(1, isa).linear(&packed, &vec![value; m * COLS], m, None, &mut out);
                    let want = value * f32::from(code) * COLS as f32;
                    assert!(out.iter().all(|got| *got == want), "{isa} {format:?} {code}: {} for {want}", out[0]);
                }
            }
        }
    }
}

#[test]
fn an_error_ends_the_packing() {
    let mut rows = 0;
    let packed = PackedMatrix::pack_codes(Format::Q8, 4, 32, |row, _, _| {
        rows += 1;
        if row == 1 { Err("row 1") } else { Ok(()) }
    });
    assert_eq!((packed.err(), rows), (Some("row 1"), 2));
}

#[test]
#[should_panic(expected = "does not fit 4 bits")]
fn a_code_beyond_four_bits_is_refused() {
    let _ = PackedMatrix::pack_codes(Format::Q4 { group: 32 }, 1, 32, |_, _, codes| {
        codes[3] = 8;
        Ok::<_, Infallible>(())
    });
}

/// Lengths that no kernel reads: a kernel for another length would read beyond the matrix, or in it at wrong places.
const WRONG_GROUPS: [u16; 7] = [0, 1, 16, 48, 96, 256, u16::MAX];

#[test]
fn groups_of_other_lengths_are_refused() {
    let panics = |work: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err();
    for group in WRONG_GROUPS {
        let format = Format::Q4 { group };
        let storage = Storage::Owned(Arc::new(AlignedBytes::from_zeroed(64)));
        let error = PackedMatrix::from_storage(format, 32, usize::from(group), storage).err();
        assert_eq!(error, Some(Error::Group { group }));
        assert!(panics(&|| drop(PackedMatrix::pack(format, 1, 768, &mut |_, _| {}))), "{group}");
        let fill = |_: usize, _: &mut [f16], _: &mut [i8]| Ok::<_, Infallible>(());
        assert!(panics(&|| drop(PackedMatrix::pack_codes(format, 1, 0, fill))), "{group}");
        assert!(panics(&|| drop(PackedMatrix::pack_codes(format, 1, 768, fill))), "{group}");
    }
}
