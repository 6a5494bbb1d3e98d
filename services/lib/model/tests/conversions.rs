//! What converting blocks that none of our formats holds (those with minimums, and K blocks) to q8 costs.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
mod support;

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{Device, Tensor};
use moesaic_kernels::{Format, PackedMatrix};
use moesaic_model::source;

const ROWS: usize = 64;
const COLS: usize = 1024;

/// `|a - b| / |b|`, root mean squares.
fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    let square = |v: f64| v * v;
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(a - b))).sum();
    let size: f64 = b.iter().map(|b| square(f64::from(*b))).sum();
    (difference / size).sqrt()
}

#[test]
fn conversion_to_q8_adds_little_to_the_blocks_own_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let original: Vec<f32> = support::normal(3, ROWS * COLS).into_iter().map(|v| v * 0.03).collect();
    let tensor = Tensor::from_vec(original.clone(), (ROWS, COLS), &Device::Cpu).unwrap();
    use GgmlDType::{Q2K, Q3K, Q4_1, Q4K, Q5_1, Q5K, Q6K};
    for kind in [Q4_1, Q5_1, Q2K, Q3K, Q4K, Q5K, Q6K] {
        let blocks = QTensor::quantize(&tensor, kind).unwrap();
        gguf_file::write(&mut std::fs::File::create(&path).unwrap(), &[], &[("a", &blocks)]).unwrap();
        let source = source::open(&path).unwrap();
        assert_eq!(source.exact("a", 0, ROWS * COLS).unwrap(), None);
        let mut stored = vec![0.0; ROWS * COLS];
        source.read_f32("a", 0, &mut stored).unwrap();
        let packed = PackedMatrix::pack(Format::Q8, ROWS, COLS, &mut |row, out| {
            out.copy_from_slice(&stored[row * COLS..][..COLS]);
        });
        let mut held = vec![0.0; ROWS * COLS];
        held.chunks_exact_mut(COLS).enumerate().for_each(|(row, out)| packed.dequantize_row(row, out));
        let (own, added) = (relative_error(&stored, &original), relative_error(&held, &stored));
        let total = relative_error(&held, &original);
        println!("{kind:?}: own {own:.5}, added {added:.5}, total {total:.5}");
        assert!(added <= 0.006, "{kind:?}: conversion adds {added} to {own}");
        assert!(total <= own * 1.05, "{kind:?}: {own} becomes {total}");
    }
}
