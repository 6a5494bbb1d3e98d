//! The models that are made load, and generate what their weights say and not numbers that are none.
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use moesaic_loadtest::model::{self, Preset, Shape};
use moesaic_model::chat::ChatTemplate;
use moesaic_model::spec::GatePolicy;
use moesaic_model::tokenizer::Tokenizer;
use moesaic_model::{BackendKind, LoadOptions, LogitsWanted, SequenceChunk};
use std::path::PathBuf;

fn made(folder: &tempfile::TempDir, seed: u64) -> (Shape, PathBuf) {
    let (shape, path) = (Preset::MoeTiny.shape(), folder.path().join(format!("{seed}.gguf")));
    model::write(&shape, seed, &path, &|_, _| ()).unwrap();
    (shape, path)
}

/// Greedy tokens after a prompt.
fn generate(path: &std::path::Path, prompt: &[u32], count: usize) -> Vec<u32> {
    let options = LoadOptions { threads: 1, ..LoadOptions::default() };
    let mut runner = moesaic_model::load(path, BackendKind::Native, &options).unwrap();
    runner.allocate_kv(2).unwrap();
    let mut tokens = prompt.to_vec();
    let mut start = 0;
    while tokens.len() < prompt.len() + count {
        let mut logits = Vec::new();
        let chunk = SequenceChunk { tokens: &tokens[start..], start, blocks: &[0, 1], logits: LogitsWanted::Last };
        runner.forward(&[chunk], &mut logits).unwrap();
        assert!(logits.iter().all(|logit| logit.is_finite()));
        let (least, most) = logits.iter().fold((f32::MAX, f32::MIN), |(a, b), x| (a.min(*x), b.max(*x)));
        assert!(most - least > 1.0 && most - least < 30.0, "logits from {least} to {most}");
        start = tokens.len();
        tokens.push(logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u32);
    }
    tokens.split_off(prompt.len())
}

#[test]
fn a_made_model_has_its_shape_and_generates() {
    let folder = tempfile::tempdir().unwrap();
    let (shape, path) = made(&folder, 1);
    let config = moesaic_model::ModelConfig { path: Some(path.clone()), ..Default::default() };
    let spec = config.look().unwrap().spec;
    assert_eq!((spec.hidden, spec.layers.len(), spec.vocab), (shape.hidden, shape.layers, shape.vocab));
    assert_eq!((spec.max_context, spec.architecture.as_str()), (shape.context, "qwen3moe"));
    let moe = spec.moe(1).unwrap();
    assert_eq!((moe.experts, moe.expert.intermediate), (shape.experts, shape.expert_inner));
    assert!(matches!(moe.gate, GatePolicy::SoftmaxTopK { top_k, normalize: true, .. } if top_k == shape.top_k));
    let prompt = [5, 300, 42, 17, 99];
    let tokens = generate(&path, &prompt, 12);
    assert!(tokens.iter().any(|token| *token != tokens[0]), "always {}", tokens[0]);
    let (_, other) = made(&folder, 2);
    assert_ne!(generate(&other, &prompt, 12), tokens, "other weights say something else");
}

#[test]
fn its_tokenizer_takes_any_text_and_reaches_its_words() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    // room for syllables, some words, and none with a space
    model::write(&Preset::MoeTiny.shape(), 1, &path, &|_, _| ()).unwrap();
    let tokenizer = Tokenizer::open(&path).unwrap();
    for text in ["baba", "any text, with 数字 and 1234\n", " baba bebe", "<|im_start|>"] {
        let tokens = tokenizer.encode(text, true).unwrap();
        assert_eq!(tokenizer.decode(&tokens, false).unwrap(), text);
    }
    assert_eq!(tokenizer.encode("baba", true).unwrap().len(), 1, "a word is one token");
    assert_eq!(model::vocabulary_of(&path).unwrap(), Preset::MoeTiny.shape().vocab - 3);
    let template = ChatTemplate::open(&path).unwrap();
    assert_eq!(template.problem(), None);
}
