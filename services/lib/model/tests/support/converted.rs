//! GGUF files of reference checkpoints, with the names, keys and layouts of llama.cpp's converter.
use super::gguf::Gguf;
use super::safetensors::{golden as checkpoint, golden_folder};
use moesaic_model::golden::{self, Golden};
use moesaic_model::quantize::quantize;
use moesaic_model::{BackendKind, LoadOptions, load, source, spec};
use moesaic_types::{KvFormat, WeightFormat};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Tensors that a file does not have yet: shape and values.
pub type Values = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// A file in the making, from a reference checkpoint.
pub struct Conversion {
    pub file: Gguf,
    pub config: Value,
    architecture: &'static str,
    pub left: Values,
}

/// The order of rows in which neighbours turn together, of rows whose halves turn together.
fn neighbours(rows: usize, heads: usize) -> Vec<usize> {
    let width = rows / heads;
    let of_row = |row: usize| row / width * width + row % 2 * (width / 2) + row % width / 2;
    (0..rows).map(of_row).collect()
}

impl Conversion {
    pub fn of(golden: &str, architecture: &'static str) -> Self {
        let (tensors, config) = checkpoint(golden);
        let floats =
            |bytes: &[u8]| bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let left = tensors.0.iter().map(|(name, (_, shape, bytes))| (name.clone(), (shape.clone(), floats(bytes))));
        let mut file = Gguf::default();
        file.text("general.architecture", architecture);
        Self { file, architecture, left: left.collect(), config }
    }

    pub fn size(&self, key: &str) -> usize {
        self.config[key].as_u64().unwrap_or_else(|| panic!("{key}")) as usize
    }

    /// Keys of whole numbers, each with what `config.json` calls it.
    pub fn sizes(&mut self, keys: &[(&str, &str)]) {
        for (key, from) in keys {
            self.number(key, self.size(from));
        }
    }

    pub fn number(&mut self, key: &str, value: usize) {
        self.file.number(&format!("{}.{key}", self.architecture), value as u32);
    }

    pub fn float(&mut self, key: &str, value: &Value) {
        let value = value.as_f64().unwrap_or_else(|| panic!("{key}"));
        self.file.float(&format!("{}.{key}", self.architecture), value as f32);
    }

    pub fn text(&mut self, key: &str, value: &str) {
        self.file.text(&format!("{}.{key}", self.architecture), value);
    }

    pub fn take(&mut self, name: &str) -> (Vec<usize>, Vec<f32>) {
        self.left.remove(name).unwrap_or_else(|| panic!("{name}"))
    }

    /// Renames a tensor.
    pub fn rename(&mut self, from: &str, to: &str) {
        let (shape, values) = self.take(from);
        self.file.plain(to, &shape, &values);
    }

    /// Renames tensors of a layer, given without the layer's prefix in either.
    pub fn rename_in(&mut self, prefix: &str, layer: usize, names: &[(&str, &str)]) {
        for (from, to) in names {
            self.rename(&format!("{prefix}.{layer}.{from}"), &format!("blk.{layer}.{to}"));
        }
    }

    /// Rows in the given order.
    pub fn reorder(&mut self, from: &str, to: &str, order: &[usize]) {
        let (shape, values) = self.take(from);
        let cols = values.len() / shape[0];
        assert_eq!(order.len(), shape[0], "{from}");
        let values: Vec<f32> = order.iter().flat_map(|row| &values[row * cols..(row + 1) * cols]).copied().collect();
        self.file.plain(to, &shape, &values);
    }

    /// Queries and keys with rows as llama has them in GGUF files.
    pub fn permute_qk(&mut self, layer: usize) {
        for (part, heads) in [("q", "num_attention_heads"), ("k", "num_key_value_heads")] {
            let from = format!("model.layers.{layer}.self_attn.{part}_proj.weight");
            let order = neighbours(self.left[&from].0[0], self.size(heads));
            self.reorder(&from, &format!("blk.{layer}.attn_{part}.weight"), &order);
        }
    }

    /// Writes the file; no tensor may be left.
    pub fn write(&self, path: &Path) {
        assert!(self.left.is_empty(), "{:?}", self.left.keys());
        self.file.write(path);
    }

    /// The same file without some tensors and with more metadata: its architecture.
    pub fn read(&self, change: impl FnOnce(&mut Gguf)) -> moesaic_model::Result<spec::ModelSpec> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let mut file = self.file.clone();
        change(&mut file);
        file.write(&path);
        spec::read(&path, &*source::open(&path)?)
    }

    /// What the file with more metadata is refused with.
    pub fn refusal(&self, change: impl FnOnce(&mut Gguf)) -> String {
        self.read(change).expect_err("the file is refused").to_string()
    }
}

pub fn options(weights: Option<WeightFormat>) -> LoadOptions<'static> {
    LoadOptions { weights, kv: KvFormat::F32, threads: 2, activations: moesaic_model::Activations::F32, progress: None }
}

/// Compares the file with the reference on both backends.
pub fn check(conversion: &Conversion, name: &str) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    conversion.write(&path);
    let golden = Golden::read(&golden_folder(name).join("golden.json")).unwrap();
    for kind in [BackendKind::Native, BackendKind::Candle] {
        let mut model = load(&path, kind, &options(Some(WeightFormat::F32))).unwrap();
        let report = golden::check(model.as_mut(), &golden).unwrap();
        let routed = golden.routing.is_none() || report.routing_match == Some(1.0);
        assert!(report.passed && routed, "{name} on {kind:?}: {report}");
    }
    // a folder of packed weights answers as the file does, as it is stored and in q4
    for format in [None, Some(WeightFormat::Q4 { group: 32 })] {
        let out = folder.path().join(format!("{format:?}"));
        let report = quantize(&path, &out, format, &|_, _, _| {}).unwrap();
        assert!(report.packed > 0);
        let answers = |path: &Path, weights| {
            let mut model = load(path, BackendKind::Native, &options(weights)).unwrap();
            serde_json::to_value(golden::check(model.as_mut(), &golden).unwrap()).unwrap()
        };
        assert_eq!(answers(&out, None), answers(&path, format), "{name} packed in {format:?}");
        let text_side = |path: &Path| (spec::read_text_side(path).unwrap(), source::text_digest(path).unwrap());
        assert_eq!(text_side(&out), text_side(&path), "{name}");
    }
}

/// Takes one tensor of layer `layer` after another away; each must be named as missing.
pub fn check_missing(conversion: &Conversion, layer: usize, tensors: usize) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let of_layer = format!("blk.{layer}.");
    let names: Vec<_> = conversion.file.tensors.keys().filter(|name| name.starts_with(&of_layer)).collect();
    assert_eq!(names.len(), tensors, "{names:?}");
    for name in names {
        let mut file = conversion.file.clone();
        file.tensors.remove(name);
        file.write(&path);
        let error = load(&path, BackendKind::Native, &options(None)).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(name.as_str()) && error.contains("is missing"), "{name}: {error}");
    }
}
