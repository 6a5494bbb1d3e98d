//! GGUF files, written by candle's own writer and by hand: every block format, every broken byte.
#![allow(clippy::unwrap_used)]

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use moesaic_model::source::{self, Dtype, WeightSource, gguf::GgufSource};
use std::path::{Path, PathBuf};

const ROWS: usize = 5;
const COLS: usize = 512;

fn values() -> Vec<f32> {
    // uneven magnitudes, so that every scale and minimum of a block differs
    let value = |i: usize| ((i * 2_654_435_761) % 10_007) as f32 / 5_003.5 - 1.0;
    (0..ROWS * COLS).map(|i| value(i) * (1.0 + (i / 37 % 11) as f32)).collect()
}

fn write(folder: &Path, metadata: &[(&str, &Value)], tensors: &[(&str, &QTensor)]) -> PathBuf {
    let path = folder.join("model.gguf");
    gguf_file::write(&mut std::fs::File::create(&path).unwrap(), metadata, tensors).unwrap();
    path
}

#[test]
fn every_block_format_reads_as_its_reference_does() {
    let tensor = Tensor::from_vec(values(), (ROWS, COLS), &Device::Cpu).unwrap();
    let formats = [
        (GgmlDType::F32, Dtype::F32, true),
        (GgmlDType::F16, Dtype::F16, true),
        (GgmlDType::BF16, Dtype::Bf16, true),
        (GgmlDType::Q4_0, Dtype::Ggml("Q4_0"), true),
        (GgmlDType::Q4_1, Dtype::Ggml("Q4_1"), false),
        (GgmlDType::Q5_0, Dtype::Ggml("Q5_0"), true),
        (GgmlDType::Q5_1, Dtype::Ggml("Q5_1"), false),
        (GgmlDType::Q8_0, Dtype::Ggml("Q8_0"), true),
        (GgmlDType::Q2K, Dtype::Ggml("Q2_K"), false),
        (GgmlDType::Q3K, Dtype::Ggml("Q3_K"), false),
        (GgmlDType::Q4K, Dtype::Ggml("Q4_K"), false),
        (GgmlDType::Q5K, Dtype::Ggml("Q5_K"), false),
        (GgmlDType::Q6K, Dtype::Ggml("Q6_K"), false),
    ];
    for (format, dtype, exact) in formats {
        let folder = tempfile::tempdir().unwrap();
        let quantized = QTensor::quantize(&tensor, format).unwrap();
        let path = write(folder.path(), &[], &[("a.weight", &quantized)]);
        let reference = quantized.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let source = source::open(&path).unwrap();
        let info = source.info("a.weight").unwrap();
        assert_eq!((info.shape.as_slice(), info.dtype), ([ROWS, COLS].as_slice(), dtype));
        let mut all = vec![0.0; ROWS * COLS];
        source.read_f32("a.weight", 0, &mut all).unwrap();
        for (i, (got, want)) in all.iter().zip(&reference).enumerate() {
            let near = if exact { got == want } else { (got - want).abs() <= 2e-6 * want.abs().max(1.0) };
            assert!(near, "{format:?} value {i}: {got}, reference {want}");
        }
        assert!(all.iter().any(|value| *value != 0.0));
        let mut row = vec![0.0; COLS];
        source.read_f32("a.weight", 3 * COLS, &mut row).unwrap();
        assert_eq!(row, all[3 * COLS..4 * COLS], "{format:?}");
        assert!(source.read_f32("a.weight", ROWS * COLS, &mut row).is_err());
        if matches!(dtype, Dtype::Ggml(_)) {
            let error = source.read_f32("a.weight", 1, &mut row).unwrap_err().to_string();
            assert!(error.contains("a.weight") && error.contains("blocks"), "{error}");
        }
    }
}

fn full_file(folder: &Path) -> PathBuf {
    let small = Tensor::from_vec(values()[..256].to_vec(), (1, 256), &Device::Cpu).unwrap();
    let q4 = QTensor::quantize(&small, GgmlDType::Q4K).unwrap();
    let f32 = QTensor::quantize(&small, GgmlDType::F32).unwrap();
    let list = Value::Array(vec![Value::String("x".into()), Value::String("yz".into())]);
    let metadata = [
        ("general.architecture", Value::String("llama".into())),
        ("a.bool", Value::Bool(true)),
        ("a.u8", Value::U8(200)),
        ("a.i8", Value::I8(-3)),
        ("a.i16", Value::I16(-300)),
        ("a.u32", Value::U32(7)),
        ("a.u64", Value::U64(1 << 40)),
        ("a.f32", Value::F32(0.5)),
        ("a.f64", Value::F64(0.25)),
        ("a.list", list),
        ("a.numbers", Value::Array(vec![Value::F32(1.0), Value::F32(-2.0)])),
    ];
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    write(folder, &metadata, &[("a", &q4), ("b", &f32)])
}

#[test]
fn metadata_of_every_type_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let source = GgufSource::open(&full_file(folder.path())).unwrap();
    let metadata = source.metadata();
    assert_eq!(metadata.get_str("general.architecture"), Some("llama"));
    assert_eq!(metadata.get_bool("a.bool"), Some(true));
    assert_eq!(metadata.get_u64("a.u8"), Some(200));
    assert_eq!(metadata.get_u64("a.i8"), None);
    assert_eq!(metadata.get_f32("a.i16"), Some(-300.0));
    assert_eq!(metadata.get_u64("a.u64"), Some(1 << 40));
    assert_eq!(metadata.get_f32("a.f64"), Some(0.25));
    assert_eq!(metadata.get_array_str("a.list"), Some(vec!["x", "yz"]));
    assert_eq!(metadata.get_array_f32("a.numbers"), Some(vec![1.0, -2.0]));
    assert_eq!(metadata.get_array_str("a.numbers"), None);
    assert_eq!(metadata.to_json()["a.list"][1], "yz");
    assert_eq!(source.tensors().len(), 2);
}

/// Opens a file and reads all that it says it holds; an error must name the file.
fn read_all(path: &Path) -> Result<(), String> {
    let named = |error: moesaic_model::Error| {
        let text = error.to_string();
        assert!(text.contains("model.gguf"), "{text}");
        text
    };
    let source = source::open(path).map_err(named)?;
    for tensor in source.tensors().iter().filter(|t| !matches!(t.dtype, Dtype::Unsupported(_))) {
        let mut out = vec![0.0; tensor.shape.iter().product()];
        source.read_f32(&tensor.name, 0, &mut out).map_err(named)?;
    }
    Ok(())
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = full_file(folder.path());
    let bytes = std::fs::read(&path).unwrap();
    read_all(&path).unwrap();
    for len in 0..bytes.len() - 31 {
        std::fs::write(&path, &bytes[..len]).unwrap();
        assert!(read_all(&path).is_err(), "cut to {len} of {} bytes", bytes.len());
    }
}

#[test]
fn a_flipped_byte_is_an_error_or_another_value() {
    let folder = tempfile::tempdir().unwrap();
    let path = full_file(folder.path());
    let bytes = std::fs::read(&path).unwrap();
    let header = bytes.len() - 256 * 4 - 144;
    let mut refused = 0;
    for at in 0..header {
        for flip in [0x01, 0x80, 0xff] {
            let mut bytes = bytes.clone();
            bytes[at] ^= flip;
            std::fs::write(&path, &bytes).unwrap();
            refused += usize::from(read_all(&path).is_err());
        }
    }
    assert!(refused > header, "only {refused} of {} were noticed", header * 3);
}

#[test]
fn absurd_counts_are_refused_before_anything_is_allocated() {
    fn text(bytes: &mut Vec<u8>, text: &str) {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    }
    let header = |version: u32, tensors: u64, values: u64| {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(version.to_le_bytes());
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(values.to_le_bytes());
        bytes
    };
    let tensor = |dims: &[u64], kind: u32, offset: u64| {
        let mut bytes = header(3, 1, 0);
        text(&mut bytes, "t");
        bytes.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|dim| bytes.extend(dim.to_le_bytes()));
        bytes.extend(kind.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes.resize(bytes.len() + 256, 0);
        bytes
    };
    let value = |kind: u32, rest: &[u8]| {
        let mut bytes = header(3, 0, 1);
        text(&mut bytes, "key");
        bytes.extend(kind.to_le_bytes());
        bytes.extend(rest);
        bytes.resize(bytes.len() + 64, 0);
        bytes
    };
    let array = |kind: u32, count: u64| {
        let mut rest = kind.to_le_bytes().to_vec();
        rest.extend(count.to_le_bytes());
        value(9, &rest)
    };
    let mut nested = Vec::new();
    for _ in 0..10 {
        nested.extend(9u32.to_le_bytes());
        nested.extend(1u64.to_le_bytes());
    }
    let big_endian = [b"GGUF".as_slice(), &3u32.to_be_bytes(), &[0; 16]].concat();
    let cases = [
        (header(1, 0, 0), "version 1"),
        (header(9, 0, 0), "version 9"),
        (big_endian, "big-endian"),
        (header(3, u64::MAX, 0), "number of tensors"),
        (header(3, 0, u64::MAX), "number of metadata values"),
        (value(8, &u64::MAX.to_le_bytes()), "'key'"),
        (value(77, &[]), "unknown type 77"),
        (value(7, &[2]), "no truth value"),
        (array(8, u64::MAX), "key"),
        (array(0, 1 << 50), "key"),
        (value(9, &nested), "nests arrays"),
        (tensor(&[1 << 62, 1 << 62], 0, 0), "impossible shape"),
        (tensor(&[1 << 40], 0, 0), "beyond the file"),
        (tensor(&[8], 0, 1 << 60), "beyond the file"),
        (tensor(&[8], 0, u64::MAX - 31), "beyond the file"),
        (tensor(&[8], 0, 7), "multiple of 32"),
        (tensor(&[33], 2, 0), "whole blocks"),
        (tensor(&[1; 5], 0, 0), "5 dimensions"),
    ];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for (bytes, expected) in cases {
        std::fs::write(&path, &bytes).unwrap();
        let error = read_all(&path).unwrap_err();
        assert!(error.contains(expected.trim_matches('\'')), "expected {expected}: {error}");
    }
}
