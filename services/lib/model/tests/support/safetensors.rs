//! Safetensors by hand.
use super::read_json;
use moesaic_model::source;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The type's name, shape and bytes of each tensor.
#[derive(Clone, Default)]
pub struct Tensors(pub BTreeMap<String, (&'static str, Vec<usize>, Vec<u8>)>);

impl Tensors {
    pub fn f32(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.0.insert(name.to_owned(), ("F32", shape.to_vec(), bytes));
    }

    pub fn bytes(&mut self, name: &str, dtype: &'static str, shape: &[usize], bytes: Vec<u8>) {
        self.0.insert(name.to_owned(), (dtype, shape.to_vec(), bytes));
    }

    /// Writes `model.safetensors` and `config.json`.
    pub fn write(&self, folder: &Path, config: &Value) {
        let (mut header, mut data) = (serde_json::Map::new(), Vec::<u8>::new());
        for (name, (dtype, shape, bytes)) in &self.0 {
            let offsets = [data.len(), data.len() + bytes.len()];
            header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
            data.extend(bytes);
        }
        let header = Value::Object(header).to_string();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend(data);
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join("model.safetensors"), file).unwrap();
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    }
}

pub fn golden_folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../tests/goldens").join(name)
}

/// A reference checkpoint: its tensors in f32 and its configuration.
pub fn golden(name: &str) -> (Tensors, Value) {
    let folder = golden_folder(name);
    let source = source::open(&folder).unwrap();
    let mut tensors = Tensors::default();
    for info in source.tensors() {
        let mut values = vec![0.0; info.shape.iter().product()];
        source.read_f32(&info.name, 0, &mut values).unwrap();
        tensors.f32(&info.name, &info.shape, &values);
    }
    (tensors, read_json(&folder.join("config.json")))
}
