//! Checkpoints whose tensors lack their names' first part: saved from the base model, as published Blooms are.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
mod support;

use moesaic_model::golden::{self, Golden, Report};
use moesaic_model::quantize::quantize;
use moesaic_model::{BackendKind, LoadOptions, load};
use moesaic_types::{KvFormat, WeightFormat};
use std::path::Path;
use support::safetensors::{Tensors, golden as checkpoint, golden_folder};

/// One of each family, and of each way to name and store experts, queries and latents.
const FAMILIES: [&str; 12] = [
    "bloom_alibi",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "granite_moe",
    "llama_dense",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_dense",
    "qwen3_moe",
];

/// Writes a reference checkpoint without the prefix; its output matrix, which is no part of the base model, if `output`.
fn write(folder: &Path, name: &str, output: bool) {
    let (tensors, config) = checkpoint(name);
    let mut bare = Tensors::default();
    for (tensor, value) in tensors.0 {
        let rest = ["model.", "transformer."].iter().find_map(|prefix| tensor.strip_prefix(prefix));
        assert!(rest.is_some() || tensor == "lm_head.weight", "{tensor}");
        if rest.is_some() || output {
            bare.0.insert(rest.unwrap_or(&tensor).to_owned(), value);
        }
    }
    bare.write(folder, &config);
}

fn check(folder: &Path, name: &str, kind: BackendKind, weights: WeightFormat) -> Report {
    let golden = Golden::read(&golden_folder(name).join("golden.json")).unwrap();
    let options = LoadOptions {
        weights: Some(weights),
        kv: KvFormat::F32,
        threads: 2,
        activations: moesaic_model::Activations::F32,
        progress: None,
    };
    golden::check(load(folder, kind, &options).unwrap().as_mut(), &golden).unwrap()
}

#[test]
fn every_family_answers_as_with_the_prefix() {
    for name in FAMILIES {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), name, true);
        for kind in [BackendKind::Native, BackendKind::Candle] {
            let report = check(folder.path(), name, kind, WeightFormat::F32);
            assert!(report.passed, "{name} on {kind:?}: {report}");
        }
    }
}

#[test]
fn a_base_model_is_whole_if_its_output_is_the_embedding_and_else_lacks_it() {
    for name in FAMILIES {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), name, false);
        if matches!(name, "bloom_alibi" | "granite_moe" | "qwen3_dense") {
            let report = check(folder.path(), name, BackendKind::Native, WeightFormat::F32);
            assert!(report.passed, "{name}: {report}");
        } else {
            let error = load(folder.path(), BackendKind::Native, &LoadOptions::default()).map(|_| ()).unwrap_err();
            let error = error.to_string();
            assert!(error.contains("'lm_head.weight'") && error.contains("is missing"), "{name}: {error}");
        }
    }
}

#[test]
fn packing_keeps_the_names_and_the_answers() {
    for name in FAMILIES {
        let folder = tempfile::tempdir().unwrap();
        let (bare, packed) = (folder.path().join("bare"), folder.path().join("packed"));
        write(&bare, name, true);
        quantize(&bare, &packed, Some(WeightFormat::Q8), &|_, _, _| {}).unwrap();
        let reports = [&packed, &golden_folder(name)]
            .map(|folder| serde_json::to_value(check(folder, name, BackendKind::Native, WeightFormat::Q8)).unwrap());
        assert_eq!(reports[0], reports[1], "{name}");
    }
}
