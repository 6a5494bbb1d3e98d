//! Checkpoints in MXFP4 and FP8, written here by the formats' definitions: values, formats held, whole models, errors.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
mod support;

use moesaic_kernels::Storage;
use moesaic_model::backend::{Matrix, TensorSlice};
use moesaic_model::quantize::quantize;
use moesaic_model::source::{self, Dtype, WeightSource};
use moesaic_model::{BackendKind, LoadOptions, LogitsWanted, Result, SequenceChunk, load};
use moesaic_types::{KvFormat, WeightFormat};
use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use support::gpt_oss::{EXPERTS, HIDDEN, INNER, gpt_oss, mxfp4};
use support::safetensors::{Tensors, golden, golden_folder};
use support::{matrices, noise};

const Q4: WeightFormat = WeightFormat::Q4 { group: 32 };

/// What a loader is given: format, whether it lies in the map, values.
type Held = BTreeMap<String, (WeightFormat, bool, Vec<f32>)>;

fn held(folder: &Path, format: Option<WeightFormat>) -> Result<Held> {
    let found = RefCell::new(Held::new());
    let take = |matrix: Matrix<'_>| {
        let (name, format, rows, cols) = (matrix.name.clone(), matrix.format, matrix.rows, matrix.cols);
        let packed = matrix.pack()?;
        let mapped = matches!(packed.storage(), Storage::Mapped { .. });
        let mut values = vec![0.0; rows * cols];
        values.chunks_exact_mut(cols).enumerate().for_each(|(row, out)| packed.dequantize_row(row, out));
        found.borrow_mut().insert(name, (format, mapped, values));
        Ok(())
    };
    matrices::each(folder, format, TensorSlice::WHOLE, &take)?;
    Ok(found.into_inner())
}

fn logits(folder: &Path, weights: Option<WeightFormat>) -> Vec<f32> {
    let options = LoadOptions {
        weights,
        kv: KvFormat::F32,
        threads: 2,
        activations: moesaic_model::Activations::F32,
        progress: None,
    };
    let mut model = load(folder, BackendKind::Native, &options).unwrap();
    model.allocate_kv(1).unwrap();
    let tokens: Vec<u32> = (0..30).map(|i| i * 37 % 512).collect();
    let chunk = SequenceChunk { tokens: &tokens, start: 0, blocks: &[0], logits: LogitsWanted::All };
    let mut logits = Vec::new();
    model.forward(&[chunk], &mut logits).unwrap();
    logits
}

fn assert_near(a: &[f32], b: &[f32], relative: f32) {
    let size = b.iter().fold(0f32, |m, v| m.max(v.abs()));
    assert!(a.len() == b.len() && size > 0.1);
    let worst = a.iter().zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(worst <= relative * size, "{worst} of {size}");
}

/// `|a - b| / |b|`, root mean squares.
fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    let square = |v: f32| f64::from(v) * f64::from(v);
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (difference / b.iter().map(|v| square(*v)).sum::<f64>()).sqrt()
}

fn error(folder: &Path) -> String {
    held(folder, None).map(|_| ()).unwrap_err().to_string()
}

fn read(source: &dyn WeightSource, name: &str) -> Vec<f32> {
    let mut values = vec![0.0; source.info(name).unwrap().shape.iter().product()];
    source.read_f32(name, 0, &mut values).unwrap();
    values
}

#[test]
fn mxfp4_experts_are_the_plain_ones_held_as_q8_without_rounding() {
    let folder = tempfile::tempdir().unwrap();
    // from the smallest power that f16 has for doubled codes to the largest
    gpt_oss(folder.path(), |i| if i % 9 == 0 { (104 + i % 40) as u8 } else { (118 + i % 5) as u8 });
    let (compressed, plain) = (folder.path().join("mxfp4"), folder.path().join("plain"));
    let (stored, expanded) = (held(&compressed, None).unwrap(), held(&plain, None).unwrap());
    assert!(stored.keys().eq(expanded.keys()));
    let mut experts = 0;
    for (name, (format, _, values)) in &stored {
        assert_eq!(*values, expanded[name].2, "{name}");
        if name.contains(".experts.") {
            assert_eq!((*format, expanded[name].0), (WeightFormat::Q8, WeightFormat::F32), "{name}");
            experts += 1;
        }
    }
    assert_eq!(experts, 4 * EXPERTS * 3);
    let source = source::open(&compressed).unwrap();
    let info = source.info("model.layers.1.mlp.experts.gate_up_proj").unwrap();
    assert_eq!((info.dtype, info.shape.as_slice()), (Dtype::Mxfp4, [EXPERTS, 2 * INNER, HIDDEN].as_slice()));
    assert!(source.tensors().iter().all(|t| !t.name.ends_with("_blocks") && !t.name.ends_with("_scales")));
}

#[test]
fn mxfp4_models_answer_as_the_plain_ones() {
    let folder = tempfile::tempdir().unwrap();
    gpt_oss(folder.path(), |i| (120 + i % 4) as u8);
    let (compressed, plain) = (folder.path().join("mxfp4"), folder.path().join("plain"));
    let want = logits(&plain, None);
    for weights in [None, Some(WeightFormat::F32), Some(WeightFormat::Bf16)] {
        let relative = if weights == Some(WeightFormat::Bf16) { 0.05 } else { 1e-5 };
        assert_near(&logits(&compressed, weights), &want, relative);
    }
    for format in [WeightFormat::Q8, Q4] {
        let out = folder.path().join(format.to_string());
        quantize(&compressed, &out, Some(format), &|_, _, _| {}).unwrap();
        let (mapped, fresh) = (held(&out, None).unwrap(), held(&compressed, Some(format)).unwrap());
        assert!(mapped.keys().eq(fresh.keys()));
        for (name, (held, in_map, values)) in &mapped {
            assert!(*in_map && *held == fresh[name].0 && *values == fresh[name].2, "{name} in {format}");
        }
        assert_eq!(logits(&out, None), logits(&compressed, Some(format)));
    }
}

#[test]
fn mxfp4_scales_beyond_f16_are_held_as_bf16() {
    let folder = tempfile::tempdir().unwrap();
    // the smallest and the largest scales that give finite values: one matrix of each stack needs bf16 at least
    gpt_oss(folder.path(), |i| match i {
        3 => 0,
        5 => 252,
        _ => 121,
    });
    let (stored, expanded) = (held(&folder.path().join("mxfp4"), None), held(&folder.path().join("plain"), None));
    let (stored, expanded) = (stored.unwrap(), expanded.unwrap());
    let mut formats = BTreeMap::new();
    for (name, (format, _, values)) in stored.iter().filter(|(name, _)| name.contains(".experts.")) {
        assert_eq!(*values, expanded[name].2, "{name}");
        *formats.entry(format.to_string()).or_insert(0) += 1;
        assert_eq!(*format == WeightFormat::Bf16, name.contains("_proj.0."), "{name} is in {format}");
    }
    assert_eq!(formats["bf16"] + formats["q8"], 4 * EXPERTS * 3);
}

#[test]
fn every_mxfp4_scale_is_a_power_of_two_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let scales: Vec<u8> = (0..=255).collect();
    let codes = noise(5, 256 * 16);
    let mut tensors = Tensors::default();
    tensors.bytes("x_blocks", "U8", &[256, 1, 16], codes.clone());
    tensors.bytes("x_scales", "U8", &[256, 1], scales.clone());
    tensors.write(folder.path(), &json!({}));
    let source = source::open(folder.path()).unwrap();
    assert_eq!(source.info("x").unwrap().shape, [256, 32]);
    let want = mxfp4(&codes, &scales);
    for row in 0..256 {
        let mut got = [0.0; 32];
        let read = source.read_f32("x", row * 32, &mut got);
        let want = &want[row * 32..][..32];
        if row < 253 {
            read.unwrap();
            assert_eq!(got, want, "scale {row}");
            let (mut scale, mut codes) = ([half::f16::ZERO], [0; 32]);
            let exact = source.exact("x", row * 32, 32).unwrap();
            if exact == Some(WeightFormat::Q8) {
                source.read_codes("x", row * 32, &mut scale, &mut codes).unwrap();
                assert_eq!(codes.map(|code| f32::from(code) * scale[0].to_f32()), want, "scale {row}");
            } else {
                assert!(source.read_codes("x", row * 32, &mut scale, &mut codes).is_err());
                assert_eq!(got.map(|v| half::bf16::from_f32(v).to_f32()), want, "scale {row} in bf16");
            }
            // f16 has powers of two from -24 to 15; doubled codes below 16 leave three more above
            let fits = (104..=146).contains(&row);
            assert_eq!(exact, Some(if fits { WeightFormat::Q8 } else { WeightFormat::Bf16 }), "scale {row}");
        } else {
            let error = read.unwrap_err().to_string();
            assert!(error.contains("'x'") && error.contains(&format!("scale {row}")), "{error}");
        }
    }
    assert!(source.read_f32("x", 16, &mut [0.0; 32]).unwrap_err().to_string().contains("bounds"));
    assert!(source.read_f32("x", 256 * 32, &mut [0.0; 32]).unwrap_err().to_string().contains("outside"));
    assert!(source.read_f32("x", usize::MAX - 31, &mut [0.0; 32]).is_err());
}

#[test]
fn a_digest_is_of_bytes_that_may_stand_for_no_values() {
    let digest = |codes: u8, scale: u8| {
        let mut tensors = Tensors::default();
        tensors.bytes("unused_blocks", "U8", &[4, 1, 16], vec![codes; 64]);
        tensors.bytes("unused_scales", "U8", &[4, 1], vec![scale; 4]);
        let folder = tempfile::tempdir().unwrap();
        tensors.write(folder.path(), &serde_json::json!({}));
        source::digest(&*source::open(folder.path()).unwrap()).unwrap()
    };
    assert_eq!(digest(7, 255), digest(7, 255));
    assert_ne!(digest(7, 255), digest(7, 254), "the scales count");
    assert_ne!(digest(7, 255), digest(8, 255), "the codes count");
}

/// Of the OCP specification, in f64.
fn e4m3(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7) / 8.0);
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f64::NAN,
        (0, _) => mantissa * 2f64.powi(-6),
        _ => (1.0 + mantissa) * 2f64.powi(exponent - 7),
    };
    if code < 128 { magnitude } else { -magnitude }
}

fn nearest_e4m3(value: f64) -> u8 {
    let distance = |code: &u8| (e4m3(*code) - value).abs();
    let finite = (0..=255u8).filter(|code| e4m3(*code).is_finite());
    finite.min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap()
}

/// DeepSeek-V3 in FP8 in blocks of 24 rows and 40 columns, and the same in plain f32.
fn deepseek(folder: &Path) -> (Tensors, Value) {
    const BLOCK: [usize; 2] = [24, 40];
    let (mut tensors, mut config) = golden("deepseek_v3");
    let mut plain = tensors.clone();
    let matrices: Vec<_> = tensors.0.iter().filter(|(name, _)| name.ends_with("_proj.weight")).collect();
    let matrices: Vec<_> = matrices.into_iter().map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
    let codes_of: Vec<(f64, u8)> = (0..=255).filter(|c| e4m3(*c).is_finite()).map(|c| (e4m3(c), c)).collect();
    assert_eq!(codes_of.len(), 254);
    for (name, (_, shape, bytes)) in matrices {
        let values: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let (rows, cols) = (shape[0], shape[1]);
        let across = cols.div_ceil(BLOCK[1]);
        let mut scales = vec![0f32; rows.div_ceil(BLOCK[0]) * across];
        let block = |i: usize| i / cols / BLOCK[0] * across + i % cols / BLOCK[1];
        values.iter().enumerate().for_each(|(i, v)| scales[block(i)] = scales[block(i)].max(v.abs() / 448.0));
        let code = |(i, v): (usize, &f32)| nearest_e4m3(f64::from(*v) / f64::from(scales[block(i)].max(1e-30)));
        let codes: Vec<u8> = values.iter().enumerate().map(code).collect();
        let expand = |(i, code): (usize, &u8)| e4m3(*code) as f32 * scales[block(i)];
        let expanded: Vec<f32> = codes.iter().enumerate().map(expand).collect();
        plain.f32(&name, &shape, &expanded);
        tensors.bytes(&name, "F8_E4M3", &shape, codes);
        tensors.f32(&format!("{name}_scale_inv"), &[rows.div_ceil(BLOCK[0]), across], &scales);
    }
    plain.write(&folder.join("plain"), &config);
    config["quantization_config"] = json!({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": BLOCK});
    tensors.write(&folder.join("fp8"), &config);
    (tensors, config)
}

#[test]
fn fp8_is_expanded_by_its_definition_and_held_as_q8() {
    let folder = tempfile::tempdir().unwrap();
    deepseek(folder.path());
    let (fp8, plain) = (folder.path().join("fp8"), folder.path().join("plain"));
    let (source, reference) = (source::open(&fp8).unwrap(), source::open(&plain).unwrap());
    assert!(source.tensors().iter().map(|t| &t.name).eq(reference.tensors().iter().map(|t| &t.name)));
    for info in source.tensors() {
        assert_eq!(read(&*source, &info.name), read(&*reference, &info.name), "{}", info.name);
    }
    let name = "model.layers.1.self_attn.q_a_proj.weight";
    let whole = read(&*source, name);
    for (start, len) in [(0, 1), (63, 2), (39, 130), (1000, 777), (whole.len() - 1, 1), (whole.len(), 0)] {
        let mut part = vec![0.0; len];
        source.read_f32(name, start, &mut part).unwrap();
        assert_eq!(part, whole[start..start + len]);
    }
    assert!(source.read_f32(name, whole.len() - 1, &mut [0.0; 2]).is_err());
    assert_eq!(logits(&fp8, Some(WeightFormat::F32)), logits(&plain, None));
    // As stored: q8, but for the small matrices of latent attention.
    let (mut worst, mut count) = (0f64, 0);
    let expanded = held(&plain, None).unwrap();
    for (name, (format, _, values)) in held(&fp8, None).unwrap() {
        let from_fp8 = name.contains("_proj.");
        let wanted = match () {
            () if name.contains("kv_b_proj") => WeightFormat::Bf16,
            () if from_fp8 => WeightFormat::Q8,
            () => WeightFormat::F32,
        };
        assert_eq!(format, wanted, "{name}");
        worst = worst.max(relative_error(&values, &expanded[&name].2));
        count += usize::from(from_fp8);
    }
    for (name, (_, _, values)) in held(&fp8, Some(WeightFormat::Bf16)).unwrap() {
        assert!(relative_error(&values, &expanded[&name].2) < 0.002, "{name} in bf16");
    }
    let original = source::open(&golden_folder("deepseek_v3")).unwrap();
    let own = relative_error(&whole, &read(&*original, name));
    println!("{count} matrices from FP8, whose own error is {own:.4}; q8 adds at most {worst:.5}");
    assert!(count > 100 && worst > 0.0 && worst < 0.0065, "{count} {worst}");
    assert!(own > 0.015 && own < 0.035, "{own}");
}

#[test]
fn fp8_models_are_quantized_like_plain_ones() {
    let folder = tempfile::tempdir().unwrap();
    deepseek(folder.path());
    for format in [WeightFormat::Q8, Q4] {
        let out = folder.path().join(format.to_string());
        quantize(&folder.path().join("fp8"), &out, Some(format), &|_, _, _| {}).unwrap();
        assert_eq!(logits(&out, None), logits(&folder.path().join("plain"), Some(format)));
        assert!(held(&out, None).unwrap().values().all(|(_, mapped, _)| *mapped));
    }
}

#[test]
fn what_is_wrong_with_compressed_tensors_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (gpt, gpt_config) = gpt_oss(folder.path(), |_| 120);
    let (fp8, fp8_config) = deepseek(folder.path());
    let stack = "model.layers.0.mlp.experts.down_proj";
    let matrix = "model.layers.1.self_attn.q_a_proj.weight";
    type Change<'a> = &'a dyn Fn(&mut Tensors, &mut Value);
    let mxfp4_cases: [(Change<'_>, &str); 6] = [
        (&|t, _| drop(t.0.remove(&format!("{stack}_scales"))), "_scales' beside it"),
        (&|t, _| t.bytes(&format!("{stack}_scales"), "U8", &[EXPERTS, HIDDEN], vec![0; EXPERTS * HIDDEN]), "scales"),
        (&|t, _| t.bytes(&format!("{stack}_blocks"), "U8", &[2, 2, 8], vec![0; 32]), "is not 16"),
        (&|t, _| t.f32(stack, &[1], &[0.0]), "the same tensor"),
        (&|t, _| t.0.get_mut(&format!("{stack}_scales")).unwrap().2[70] = 255, "scale 255 at block 70"),
        (&|_, c| c["intermediate_size"] = json!(64), "has shape"),
    ];
    let fp8_cases: [(Change<'_>, &str); 7] = [
        (&|t, _| drop(t.0.remove(&format!("{matrix}_scale_inv"))), "_scale_inv' beside it"),
        (&|t, _| t.f32(&format!("{matrix}_scale_inv"), &[1, 1], &[1.0]), "needs scales"),
        (&|t, _| t.0.get_mut(matrix).unwrap().2[65] = 0x7f, "row 1, column"),
        (&|t, _| t.0.get_mut(&format!("{matrix}_scale_inv")).unwrap().2[..4].fill(0xff), "row 0, column 0"),
        (&|_, c| c["quantization_config"]["weight_block_size"] = json!([0, 8]), "weight_block_size"),
        (&|_, c| c["quantization_config"]["weight_block_size"] = json!(null), "weight_block_size"),
        (&|_, c| c["quantization_config"]["quant_method"] = json!("awq"), "'awq'"),
    ];
    let broken = folder.path().join("broken");
    for (tensors, config, named, cases) in
        [(&gpt, &gpt_config, stack, &mxfp4_cases[..]), (&fp8, &fp8_config, matrix, &fp8_cases[..])]
    {
        for (change, expected) in cases {
            let (mut tensors, mut config) = (tensors.clone(), config.clone());
            change(&mut tensors, &mut config);
            tensors.write(&broken, &config);
            let error = error(&broken);
            let names = error.contains(named) || error.contains("config.json");
            assert!(error.contains(expected) && error.contains("broken") && names, "{expected}: {error}");
        }
    }
}

#[test]
fn a_broken_header_is_an_error_or_another_model() {
    let folder = tempfile::tempdir().unwrap();
    gpt_oss(folder.path(), |_| 120);
    deepseek(folder.path());
    for name in ["mxfp4", "fp8"] {
        let model = folder.path().join(name);
        let file = model.join("model.safetensors");
        let bytes = std::fs::read(&file).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for len in [0, 7, 8, 8 + header / 2, 8 + header, bytes.len() / 2, bytes.len() - 1] {
            std::fs::write(&file, &bytes[..len]).unwrap();
            assert!(error(&model).contains("model.safetensors"), "{len} bytes");
        }
        let mut refused = 0;
        for i in 0..150 {
            let mut bytes = bytes.clone();
            bytes[8 + i * 7919 % header] ^= 1 << (i % 7);
            std::fs::write(&file, &bytes).unwrap();
            refused += usize::from(held(&model, None).is_err());
        }
        assert!(refused > 75, "{name}: only {refused} of 150 were noticed");
    }
}
