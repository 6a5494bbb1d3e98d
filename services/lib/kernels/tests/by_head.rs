//! All heads at once are the loop of products that they stand for, to the bit.
use moesaic_kernels::{ActivationFormat, Format, Isa, Kernels, PackedMatrix};

mod common;
use common::{FORMATS, noise, pack};

/// One product for each head, of its columns of x.
fn one_by_one(
    kernels: &Kernels,
    heads: &[(&PackedMatrix, Option<&[f32]>)],
    x: &[f32],
    (n, k): (usize, usize),
    m: usize,
) -> Vec<f32> {
    let mut all = vec![f32::NAN; m * heads.len() * n];
    for (head, (weight, bias)) in heads.iter().enumerate() {
        let part: Vec<f32> = x.chunks_exact(heads.len() * k).flat_map(|row| &row[head * k..][..k]).copied().collect();
        let mut out = vec![f32::NAN; m * n];
        kernels.linear(weight, &part, m, *bias, &mut out);
        for (row, out) in all.chunks_exact_mut(heads.len() * n).zip(out.chunks_exact(n)) {
            row[head * n..][..n].copy_from_slice(out);
        }
    }
    all
}

#[test]
fn heads_at_once_equal_one_product_each() {
    let mixed = [FORMATS[3], FORMATS[0], FORMATS[2], FORMATS[5], FORMATS[1]];
    let kinds = FORMATS.iter().map(std::slice::from_ref).chain([&mixed[..]]);
    for formats in kinds {
        // widths within, of and beyond whole groups; results within and beyond a panel
        for (count, n, k) in [(1, 40, 64), (5, 33, 48), (3, 1, 128), (16, 96, 130)] {
            let matrices: Vec<_> =
                (0..count).map(|head| pack(formats[head % formats.len()], n, k, &noise(head as u64, n * k))).collect();
            let biases: Vec<_> = (0..count).map(|head| noise(50 + head as u64, n)).collect();
            let heads: Vec<_> = matrices
                .iter()
                .zip(&biases)
                .enumerate()
                .map(|(head, (matrix, bias))| (matrix, (head % 2 == 1).then_some(&bias[..])))
                .collect();
            for m in [1, 2, 9, 33] {
                let mut x = noise(100 + m as u64, m * count * k);
                // one head's value that is no number stays that head's
                x[(m - 1) * count * k + k / 2] = f32::NAN;
                for isa in Isa::available() {
                    for (threads, activations) in
                        [(1, ActivationFormat::Int8), (3, ActivationFormat::F32), (3, ActivationFormat::Int8)]
                    {
                        let kernels = Kernels::with_isa(threads, isa).with_activations(activations);
                        let want = one_by_one(&kernels, &heads, &x, (n, k), m);
                        let mut got = vec![f32::INFINITY; want.len()];
                        kernels.linear_by_head(heads.iter().copied(), &x, m, &mut got);
                        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                        let what = || format!("{formats:?} {count} heads {m}x{n}x{k} {isa} {threads} {activations:?}");
                        assert!(bits(&got) == bits(&want), "{}", what());
                        let finite = got.chunks_exact(n).map(|head| head.iter().all(|v| v.is_finite()));
                        assert!(finite.eq((0..m * count).map(|head| head != (m - 1) * count)), "{}", what());
                    }
                }
            }
        }
    }
}

#[test]
fn no_heads_and_no_rows_are_nothing_to_do() {
    let kernels = Kernels::new(2);
    kernels.linear_by_head([].into_iter(), &[], 3, &mut []);
    let matrix = pack(Format::F32, 2, 3, &noise(1, 6));
    kernels.linear_by_head([(&matrix, None)].into_iter(), &[], 0, &mut []);
}

#[test]
#[should_panic(expected = "all matrices are [n, k]")]
fn heads_of_other_shapes_are_refused() {
    let (a, b) = (pack(Format::F32, 2, 4, &noise(1, 8)), pack(Format::F32, 4, 2, &noise(1, 8)));
    Kernels::new(1).linear_by_head([(&a, None), (&b, None)].into_iter(), &[0.0; 8], 1, &mut [0.0; 4]);
}
