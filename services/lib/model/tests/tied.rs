//! Models whose configuration ties the output matrix to the embedding, and whose files have both.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
mod support;

use moesaic_model::backend::BackendKind;
use moesaic_model::golden::{self, Golden};
use moesaic_model::quantize::quantize;
use moesaic_model::{LoadOptions, load, source, spec};
use moesaic_types::{KvFormat, WeightFormat};
use std::path::Path;
use support::safetensors::{golden as checkpoint, golden_folder};

const OUTPUT: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

fn is_tied(folder: &Path) -> bool {
    spec::read(folder, &*source::open(folder).unwrap()).unwrap().tied
}

#[test]
fn an_output_matrix_of_its_own_is_used_although_the_configuration_ties() {
    let (tensors, mut config) = checkpoint("llama_dense");
    assert_ne!(tensors.0[OUTPUT].2, tensors.0[EMBEDDING].2);
    config["tie_word_embeddings"] = true.into();
    let folder = tempfile::tempdir().unwrap();
    tensors.write(folder.path(), &config);
    assert!(!is_tied(folder.path()));
    let reference = Golden::read(&golden_folder("llama_dense").join("golden.json")).unwrap();
    for kind in [BackendKind::Native, BackendKind::Candle] {
        let options = LoadOptions {
            weights: Some(WeightFormat::F32),
            kv: KvFormat::F32,
            threads: 2,
            activations: moesaic_model::Activations::F32,
            progress: None,
        };
        let mut model = load(folder.path(), kind, &options).unwrap();
        let report = golden::check(model.as_mut(), &reference).unwrap();
        assert!(report.passed, "{kind:?}: {report}");
    }
    let packed = folder.path().join("packed");
    quantize(folder.path(), &packed, Some(WeightFormat::Q8), &|_, _, _| {}).unwrap();
    assert!(!is_tied(&packed), "the packed folder has the output matrix too");
}

#[test]
fn a_copy_of_the_embedding_is_the_embedding() {
    let (mut tensors, mut config) = checkpoint("llama_dense");
    let embedding = tensors.0[EMBEDDING].clone();
    tensors.0.insert(OUTPUT.into(), embedding);
    config["tie_word_embeddings"] = true.into();
    let folder = tempfile::tempdir().unwrap();
    tensors.write(folder.path(), &config);
    assert!(is_tied(folder.path()));
    let packed = folder.path().join("packed");
    quantize(folder.path(), &packed, Some(WeightFormat::Q8), &|_, _, _| {}).unwrap();
    assert!(is_tied(&packed));
    assert!(source::open(&packed).unwrap().info(OUTPUT).is_none());
    config["tie_word_embeddings"] = false.into();
    tensors.write(folder.path(), &config);
    assert!(!is_tied(folder.path()));
}
