//! `quantize` and the folders that it writes.
#![allow(clippy::unwrap_used)]

use moesaic_kernels::{Format, PackedMatrix};
use moesaic_model::golden::{self, Golden};
use moesaic_model::quantize::{Report, quantize};
use moesaic_model::source::packed::{DATA, INDEX};
use moesaic_model::source::{self, Dtype, WeightSource};
use moesaic_model::{BackendKind, LoadOptions, LogitsWanted, Runner, SequenceChunk, load};
use moesaic_types::{KvFormat, WeightFormat};
use serde_json::{Value, json};
use std::cell::RefCell;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../..")
}

fn packed(model: &Path, format: WeightFormat) -> (tempfile::TempDir, PathBuf, Report) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let report = quantize(model, &out, format, &|_, _, _| {}).unwrap();
    (folder, out, report)
}

fn read(source: &dyn WeightSource, name: &str) -> Vec<f32> {
    let mut values = vec![0.0; source.info(name).unwrap().shape.iter().product()];
    source.read_f32(name, 0, &mut values).unwrap();
    values
}

fn runner(model: &Path, weights: Option<WeightFormat>) -> Box<dyn Runner> {
    let options = LoadOptions { weights, kv: KvFormat::F32, threads: 1, progress: None };
    load(model, BackendKind::Native, &options).unwrap()
}

#[test]
fn every_tensor_holds_what_it_was_packed_from() {
    let formats = [
        (WeightFormat::Q4 { group: 32 }, Format::Q4 { group: 32 }),
        (WeightFormat::Q4 { group: 64 }, Format::Q4 { group: 64 }),
        (WeightFormat::Q8, Format::Q8),
        (WeightFormat::Bf16, Format::Bf16),
    ];
    for model in ["granite_moe", "gpt_oss", "deepseek_v3", "bloom_alibi"] {
        let model = root().join("tests/goldens").join(model);
        let original = source::open(&model).unwrap();
        for (format, kernel_format) in formats {
            let (_folder, out, report) = packed(&model, format);
            let written = source::open(&out).unwrap();
            let names = |source: &dyn WeightSource| -> Vec<(String, Vec<usize>)> {
                source.tensors().iter().map(|t| (t.name.clone(), t.shape.clone())).collect()
            };
            assert_eq!(names(&*written), names(&*original));
            let mut count = 0;
            for info in written.tensors() {
                let (want, got) = (read(&*original, &info.name), read(&*written, &info.name));
                let Dtype::Packed(_) = info.dtype else {
                    assert_eq!((got, info.dtype), (want, Dtype::Bf16), "{}", info.name);
                    assert!(written.packed(&info.name, 0).unwrap().is_none());
                    continue;
                };
                count += 1;
                let stacked = info.shape.len() == 3;
                let (matrices, rows, cols) = (
                    if stacked { info.shape[0] } else { 1 },
                    info.shape[info.shape.len() - 2],
                    info.shape[info.shape.len() - 1],
                );
                for index in 0..matrices {
                    let matrix = written.packed(&info.name, index).unwrap().unwrap();
                    let format = if info.dtype == Dtype::Packed(format) { kernel_format } else { Format::Q8 };
                    let part = &want[index * rows * cols..][..rows * cols];
                    let fresh = PackedMatrix::pack(format, rows, cols, &mut |row, out| {
                        out.copy_from_slice(&part[row * cols..][..cols]);
                    });
                    assert!(matrix.storage().bytes() == fresh.storage().bytes(), "{} {index}", info.name);
                    let mut row = vec![0.0; cols];
                    matrix.dequantize_row(rows - 1, &mut row);
                    assert_eq!(row, got[(index * rows + rows - 1) * cols..][..cols], "{}", info.name);
                }
                assert!(written.packed(&info.name, matrices).is_err());
                let mut middle = vec![0.0; cols];
                written.read_f32(&info.name, cols / 2, &mut middle).unwrap();
                assert_eq!(middle, got[cols / 2..][..cols]);
            }
            assert_eq!((count, written.tensors().len()), (report.packed, report.tensors));
            assert!(count > 0 && std::fs::metadata(out.join(DATA)).unwrap().len() == report.bytes_out);
        }
    }
}

#[test]
fn a_packed_folder_gives_the_same_bits_as_packing_at_load() {
    for (name, format) in [
        ("qwen3_moe", WeightFormat::Q4 { group: 32 }),
        ("mixtral", WeightFormat::Q8),
        ("deepseek_v2", WeightFormat::Q4 { group: 32 }),
        ("olmoe", WeightFormat::Q4 { group: 64 }),
    ] {
        let model = root().join("tests/goldens").join(name);
        let (_folder, out, _) = packed(&model, format);
        let tokens = Golden::read(&model.join("golden.json")).unwrap().cases[2].prompt_ids.clone();
        let logits = |mut runner: Box<dyn Runner>| {
            let mut logits = Vec::new();
            runner.allocate_kv(1).unwrap();
            let chunk = SequenceChunk { tokens: &tokens, start: 0, blocks: &[0], logits: LogitsWanted::All };
            runner.forward(&[chunk], &mut logits).unwrap();
            logits
        };
        assert_eq!(logits(runner(&out, None)), logits(runner(&model, Some(format))), "{name}");
    }
}

#[test]
fn the_demo_model_packed_stays_close_to_its_reference() {
    let model = root().join("deploy/models/demo-moe");
    let golden = Golden::read(&model.join("golden.json")).unwrap();
    for (format, part) in [(WeightFormat::Q8, 0.7), (WeightFormat::Q4 { group: 32 }, 0.5)] {
        let steps = RefCell::new(Vec::new());
        let folder = tempfile::tempdir().unwrap();
        let report = quantize(&model, folder.path(), format, &|done, total, _| steps.borrow_mut().push((done, total)));
        let report = report.unwrap();
        assert!((report.bytes_out as f64) < part * report.bytes_in as f64, "{report:?}");
        let steps = steps.into_inner();
        assert!(steps.is_sorted() && steps[0].0 == 0 && steps[steps.len() - 1] == (report.bytes_in, report.bytes_in));
        let found = golden::check(runner(folder.path(), None).as_mut(), &golden, format).unwrap();
        assert!(found.passed && found.mean_kl > 0.0, "{found}");
        for name in ["tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json"] {
            assert_eq!(std::fs::read(folder.path().join(name)).unwrap(), std::fs::read(model.join(name)).unwrap());
        }
        assert!(!folder.path().join("model.safetensors").exists());
        let error = quantize(&model, folder.path(), format, &|_, _, _| {}).unwrap_err().to_string();
        assert!(error.contains("not empty"), "{error}");
    }
}

#[test]
fn digests_follow_the_content() {
    let model = root().join("tests/goldens/mixtral");
    let digest = |path: &Path| source::digest(&*source::open(path).unwrap()).unwrap();
    let (_folder, out, _) = packed(&model, WeightFormat::Q8);
    assert_eq!(digest(&model), digest(&model));
    assert_ne!(digest(&model), digest(&out));
    let (_other, again, _) = packed(&model, WeightFormat::Q8);
    assert_eq!(digest(&out), digest(&again));
    let config = std::fs::read_to_string(again.join("config.json")).unwrap();
    std::fs::write(again.join("config.json"), config + "\n").unwrap();
    assert_ne!(digest(&out), digest(&again));
}

#[test]
fn broken_folders_are_refused_by_name() {
    let (_folder, out, _) = packed(&root().join("tests/goldens/granite_moe"), WeightFormat::Q4 { group: 32 });
    let index: Value = serde_json::from_slice(&std::fs::read(out.join(INDEX)).unwrap()).unwrap();
    let data = std::fs::read(out.join(DATA)).unwrap();
    let at = index["tensors"].as_array().unwrap().iter().position(|t| t["format"] == "q4").unwrap();
    let with = |key: &str, value: Value| {
        let mut index = index.clone();
        index["tensors"][at][key] = value;
        index.to_string()
    };
    let mut twice = index.clone();
    let entry = twice["tensors"][at].clone();
    twice["tensors"].as_array_mut().unwrap().push(entry);
    let mut version = index.clone();
    version["format"] = json!("moesaic-packed-9");
    let max = 1u64 << 62;
    let cases = [
        (index.to_string(), data.len() - 1, "truncated"),
        (index.to_string(), 0, "truncated"),
        ("{".into(), data.len(), "not valid JSON"),
        ("{}".into(), data.len(), "not an index"),
        (version.to_string(), data.len(), "moesaic-packed-9"),
        (twice.to_string(), data.len(), "twice"),
        (with("offset", json!(32)), data.len(), "multiple of 64"),
        (with("offset", json!(u64::MAX)), data.len(), "truncated"),
        (with("len", json!(64)), data.len(), "has 64 bytes"),
        (with("shape", json!([max, max])), data.len(), "impossible shape"),
        (with("shape", json!([0, max, max])), data.len(), "impossible shape"),
        (with("shape", json!([7])), data.len(), "is no matrix"),
        (with("format", json!("q5")), data.len(), "'q5' is unknown"),
        (with("format", json!("q4-g128")), data.len(), "bytes for shape"),
    ];
    for (index, len, expected) in cases {
        std::fs::write(out.join(INDEX), index).unwrap();
        std::fs::write(out.join(DATA), &data[..len]).unwrap();
        let error = source::open(&out).err().expect("a broken folder is refused").to_string();
        assert!(error.contains(expected) && error.contains("moesaic."), "{expected}: {error}");
    }
    std::fs::remove_file(out.join(DATA)).unwrap();
    std::fs::write(out.join(INDEX), index.to_string()).unwrap();
    assert!(source::open(&out).err().unwrap().to_string().contains(DATA));
}

#[test]
fn an_unreadable_model_leaves_no_folder_that_looks_like_one() {
    let model = tempfile::tempdir().unwrap();
    let header = r#"{"a.weight":{"dtype":"F8_E4M3","shape":[2,2],"data_offsets":[0,4]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend([0; 4]);
    std::fs::write(model.path().join("model.safetensors"), bytes).unwrap();
    let out = model.path().join("out");
    let error = quantize(model.path(), &out, WeightFormat::Q8, &|_, _, _| {}).unwrap_err().to_string();
    assert!(error.contains("a.weight") && error.contains("F8_E4M3"), "{error}");
    assert!(!out.join(INDEX).exists() && source::open(&out).is_err());
}
