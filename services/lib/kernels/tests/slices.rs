//! Slices of packed matrices hold the same numbers as the matrix that they are cut from.
use moesaic_kernels::{Format, PackedMatrix};

fn matrix(format: Format, rows: usize, cols: usize) -> PackedMatrix {
    let value = |row: usize, col: usize| ((row * 31 + col * 17) % 101) as f32 / 50.0 - 1.0;
    PackedMatrix::pack(format, rows, cols, &mut |row, out| {
        out.iter_mut().enumerate().for_each(|(col, out)| *out = value(row, col));
    })
}

#[test]
fn a_slice_is_a_part_to_the_bit() {
    let formats = [Format::F32, Format::Bf16, Format::Q8, Format::Q4 { group: 32 }, Format::Q4 { group: 64 }];
    for format in formats {
        let whole = matrix(format, 100, 200);
        let group = format.group();
        for rows in [0..100, 0..32, 32..96, 64..100, 5..37, 17..18, 99..100, 3..3] {
            for cols in [0..200, 0..group, group..3 * group, 2 * group..200, 200 / group * group..200] {
                let part = whole.slice(rows.clone(), cols.clone());
                assert_eq!((part.rows(), part.cols(), part.format()), (rows.len(), cols.len(), format));
                let (mut want, mut got) = (vec![0.0; 200], vec![0.0; cols.len()]);
                for (to, from) in rows.clone().enumerate() {
                    whole.dequantize_row(from, &mut want);
                    part.dequantize_row(to, &mut got);
                    assert_eq!(got, want[cols.clone()], "{format:?} {rows:?} {cols:?} row {from}");
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "start on a group's bound")]
fn a_slice_inside_a_group_is_refused() {
    let _ = matrix(Format::Q8, 4, 64).slice(0..4, 16..64);
}
