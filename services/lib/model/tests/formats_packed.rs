//! `quantize` and the folders that it writes.
#![allow(clippy::unwrap_used)]
mod support;

use moesaic_kernels::{PackedMatrix, Storage};
use moesaic_model::backend::{Matrix, TensorSlice};
use moesaic_model::golden::{self, Golden, Variant};
use moesaic_model::quantize::{Report, quantize};
use moesaic_model::source::packed::{DATA, INDEX};
use moesaic_model::source::{self, Dtype, WeightSource};
use moesaic_model::{Activations, BackendKind, LoadOptions, Runner, load};
use moesaic_types::{KvFormat, WeightFormat};
use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use support::matrices;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../..")
}

fn packed(model: &Path, format: WeightFormat) -> (tempfile::TempDir, PathBuf, Report) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let report = quantize(model, &out, Some(format), &|_, _, _| {}).unwrap();
    (folder, out, report)
}

fn runner(model: &Path, weights: Option<WeightFormat>) -> Box<dyn Runner> {
    let options = LoadOptions {
        weights,
        kv: KvFormat::F32,
        threads: 1,
        activations: moesaic_model::Activations::F32,
        progress: None,
    };
    load(model, BackendKind::Native, &options).unwrap()
}

/// Every matrix with its format, by name.
fn collect(model: &Path, format: Option<WeightFormat>) -> BTreeMap<String, (WeightFormat, PackedMatrix)> {
    let found = RefCell::new(BTreeMap::new());
    let take = |matrix: Matrix<'_>| {
        let (name, format) = (matrix.name.clone(), matrix.format);
        let before = found.borrow_mut().insert(name.clone(), (format, matrix.pack()?));
        assert!(before.is_none(), "{name} comes twice");
        Ok(())
    };
    matrices::each(model, format, TensorSlice::WHOLE, &take).unwrap();
    found.into_inner()
}

fn goldens() -> Vec<PathBuf> {
    let folders = std::fs::read_dir(root().join("tests/goldens")).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<_> = folders.filter(|folder| folder.join("golden.json").exists()).collect();
    folders.sort();
    assert!(folders.len() >= 15);
    folders
}

const FORMATS: [WeightFormat; 3] = [WeightFormat::Q4 { group: 32 }, WeightFormat::Q8, WeightFormat::Q4 { group: 64 }];

#[test]
fn every_family_loads_from_the_map_what_packing_at_load_gives() {
    for model in goldens() {
        for format in FORMATS {
            let what = format!("{} in {format}", model.display());
            let (_folder, out, report) = packed(&model, format);
            let (mapped, fresh) = (collect(&out, None), collect(&model, Some(format)));
            assert!(mapped.keys().eq(fresh.keys()), "{what}");
            assert_eq!(report.packed, mapped.len(), "{what}");
            assert_eq!(report.tensors, source::open(&out).unwrap().tensors().len(), "{what}");
            assert_eq!(report.bytes_out, std::fs::metadata(out.join(DATA)).unwrap().len(), "{what}");
            for (name, (format, matrix)) in &mapped {
                let (fresh_format, fresh) = &fresh[name];
                assert!(matches!(matrix.storage(), Storage::Mapped { .. }), "{what}: {name} is copied");
                assert_eq!(format, fresh_format, "{what}: {name}");
                assert!(matrix.storage().bytes() == fresh.storage().bytes(), "{what}: {name} differs");
            }
            // experts and attention are in the format, whatever layout the family stores them in
            let in_format = mapped.values().filter(|(held, _)| *held == format).count();
            let others = mapped.keys().filter(|name| {
                ["embed", "gate.weight", "router", "kv_b_proj", "lm_head"].iter().any(|word| name.contains(word))
            });
            assert!(in_format + others.count() >= mapped.len() && in_format * 2 > mapped.len(), "{what}: {in_format}");
        }
    }
}

#[test]
fn a_packed_folder_answers_just_as_packing_at_load_does() {
    for model in goldens() {
        let golden = Golden::read(&model.join("golden.json")).unwrap();
        for format in [WeightFormat::Q4 { group: 32 }, WeightFormat::Q8] {
            let (_folder, out, _) = packed(&model, format);
            let check = |path: &Path, weights| {
                let report = golden::check(runner(path, weights).as_mut(), &golden).unwrap();
                serde_json::to_value(&report).unwrap()
            };
            let (from_map, at_load) = (check(&out, None), check(&model, Some(format)));
            assert_eq!(from_map, at_load, "{} in {format}", model.display());
            assert_eq!(check(&out, Some(format)), at_load, "{} asked for in {format}", model.display());
        }
    }
}

#[test]
fn another_format_of_a_packed_folder_is_made_at_load() {
    let model = root().join("tests/goldens/granite_moe");
    let (_folder, out, _) = packed(&model, WeightFormat::Q8);
    for (name, (format, matrix)) in collect(&out, Some(WeightFormat::Q4 { group: 32 })) {
        let kept = format != (WeightFormat::Q4 { group: 32 });
        assert_eq!(matches!(matrix.storage(), Storage::Mapped { .. }), kept, "{name} in {format}");
    }
}

#[test]
fn plain_values_of_a_packed_folder_are_the_models() {
    let model = root().join("tests/goldens/gpt_oss");
    let (original, (_folder, out, _)) = (source::open(&model).unwrap(), packed(&model, WeightFormat::Q8));
    let written = source::open(&out).unwrap();
    let plain: Vec<_> = written.tensors().iter().filter(|t| !matches!(t.dtype, Dtype::Packed(_))).collect();
    assert!(plain.iter().any(|t| t.name.ends_with("gate_up_proj_bias") && t.shape.len() == 2));
    for info in plain {
        assert_eq!(Some(info), original.info(&info.name));
        let read = |source: &dyn WeightSource| {
            let mut values = vec![0.0; info.shape.iter().product()];
            source.read_f32(&info.name, 0, &mut values).unwrap();
            values
        };
        assert_eq!(read(&*written), read(&*original), "{}", info.name);
        assert!(written.packed(&info.name).unwrap().is_none());
    }
    // any part of a packed matrix can be read
    let info = written.info("model.layers.0.mlp.experts.down_proj.3.weight").unwrap();
    let (matrix, cols) = (written.packed(&info.name).unwrap().unwrap(), info.shape[1]);
    let mut rows = vec![0.0; 2 * cols];
    rows.chunks_exact_mut(cols).enumerate().for_each(|(row, out)| matrix.dequantize_row(row, out));
    let mut middle = vec![0.0; cols];
    written.read_f32(&info.name, cols / 2, &mut middle).unwrap();
    assert_eq!(middle, rows[cols / 2..][..cols]);
    assert!(written.read_f32(&info.name, info.shape[0] * cols - 1, &mut middle).is_err());
}

#[test]
fn the_demo_model_packed_stays_close_to_its_reference() {
    let model = root().join("deploy/models/demo-moe");
    let golden = Golden::read(&model.join("golden.json")).unwrap();
    for (format, part) in [(WeightFormat::Q8, 0.7), (WeightFormat::Q4 { group: 32 }, 0.5)] {
        let steps = RefCell::new(Vec::new());
        let folder = tempfile::tempdir().unwrap();
        let report =
            quantize(&model, folder.path(), Some(format), &|done, total, _| steps.borrow_mut().push((done, total)));
        let report = report.unwrap();
        assert!((report.bytes_out as f64) < part * report.bytes_in as f64, "{report:?}");
        let steps = steps.into_inner();
        assert!(steps.is_sorted() && steps[0].0 == 0 && steps[steps.len() - 1] == (report.bytes_in, report.bytes_in));
        let found = golden::check_rounded(&golden, format, |variant| {
            let kind = if variant == Variant::Plain { BackendKind::Candle } else { BackendKind::Native };
            let activations = if variant == Variant::Judged { Activations::Int8 } else { Activations::F32 };
            let options = LoadOptions { weights: None, kv: KvFormat::F32, threads: 1, activations, progress: None };
            assert_ne!(variant, Variant::Unrounded, "a trained model is as near as is usual");
            load(folder.path(), kind, &options)
        });
        let found = found.unwrap();
        assert!(found.passed && found.mean_kl > 0.0, "{found}");
        for name in ["tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json"] {
            assert_eq!(std::fs::read(folder.path().join(name)).unwrap(), std::fs::read(model.join(name)).unwrap());
        }
        assert!(!folder.path().join("model.safetensors").exists());
        let error = quantize(&model, folder.path(), Some(format), &|_, _, _| {}).unwrap_err().to_string();
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
        (with("offset", json!(0)), data.len(), "overlaps"),
        (with("len", json!(64)), data.len(), "has 64 bytes"),
        (with("shape", json!([max, max])), data.len(), "impossible shape"),
        (with("shape", json!([0, max])), data.len(), "impossible shape"),
        (with("shape", json!([7])), data.len(), "is no matrix"),
        (with("shape", json!([2, 32, 64])), data.len(), "is no matrix"),
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
    let name = "model.embed_tokens.weight";
    let header = json!({name: {"dtype": "I16", "shape": [512, 64], "data_offsets": [0, 65536]}}).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + 65536, 0);
    std::fs::write(model.path().join("model.safetensors"), bytes).unwrap();
    std::fs::copy(root().join("tests/goldens/llama_dense/config.json"), model.path().join("config.json")).unwrap();
    let out = model.path().join("out");
    let error = quantize(model.path(), &out, Some(WeightFormat::Q8), &|_, _, _| {}).unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("I16"), "{error}");
    assert!(!out.join(INDEX).exists() && source::open(&out).is_err());
}
