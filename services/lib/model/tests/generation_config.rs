//! A folder's sampling defaults and end tokens, of every place that may name them.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
use moesaic_model::generation_config::{GenerationConfig, end_tokens};
use moesaic_model::tokenizer::Tokenizer;
use std::path::PathBuf;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../..")
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.0.path().join(name), text).unwrap();
    }

    fn ends(&self) -> moesaic_model::Result<Vec<u32>> {
        let tokenizer = Tokenizer::from_dir(&root().join("tests/goldens/qwen3_moe")).unwrap();
        end_tokens(self.0.path(), 512, &tokenizer)
    }

    fn defaults(&self, text: &str) -> moesaic_model::Result<GenerationConfig> {
        self.write("generation_config.json", text);
        GenerationConfig::open(self.0.path())
    }
}

#[test]
fn all_end_tokens_are_gathered() {
    let folder = Folder::new();
    assert_eq!(folder.ends().unwrap(), [0u32; 0]);
    folder.write("generation_config.json", r#"{"eos_token_id": [9, 7, 9], "temperature": 0.5}"#);
    folder.write("config.json", r#"{"eos_token_id": 8, "text_config": {"eos_token_id": [6]}}"#);
    folder.write("tokenizer_config.json", r#"{"eos_token": {"content": "<|im_end|>"}}"#);
    assert_eq!(folder.ends().unwrap(), [2, 6, 7, 8, 9]);
    folder.write("tokenizer_config.json", r#"{"eos_token": "<|endoftext|>"}"#);
    folder.write("config.json", r#"{"eos_token_id": null}"#);
    assert_eq!(folder.ends().unwrap(), [0, 7, 9]);
}

#[test]
fn end_tokens_outside_the_vocabulary_are_left_out_and_what_is_no_number_is_an_error() {
    let folder = Folder::new();
    folder.write("generation_config.json", r#"{"eos_token_id": [-1, 511, 512, 99999999999]}"#);
    assert_eq!(folder.ends().unwrap(), [511]);
    for (wrong, key) in [
        (r#"{"eos_token_id": "x"}"#, "eos_token_id"),
        (r#"{"eos_token_id": [1, 2.5]}"#, "eos_token_id"),
        (r#"{"text_config": {"eos_token_id": {}}}"#, "text_config.eos_token_id"),
    ] {
        folder.write("config.json", wrong);
        let error = folder.ends().unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains(&format!("'{key}'")), "{error}");
    }
}

#[test]
fn sampling_defaults_are_the_files_else_neutral() {
    let neutral = GenerationConfig::default();
    assert_eq!((neutral.temperature, neutral.top_k, neutral.top_p), (1.0, None, 1.0));
    let folder = Folder::new();
    assert_eq!(GenerationConfig::open(folder.0.path()).unwrap(), neutral, "no file");
    let temperature = |text: &str| folder.defaults(text).unwrap().temperature;
    assert_eq!(temperature("{}"), 1.0);
    assert_eq!(temperature(r#"{"do_sample": null, "temperature": null}"#), 1.0);
    assert_eq!(temperature(r#"{"do_sample": true}"#), 1.0);
    assert_eq!(temperature(r#"{"do_sample": false}"#), 0.0, "greedy on purpose");
    assert_eq!(temperature(r#"{"do_sample": false, "temperature": 0.6}"#), 0.6);
    assert_eq!(temperature(r#"{"temperature": 0}"#), 0.0);
    // tokens that mean nothing here may be anything
    let text = r#"{"pad_token_id": -1, "bos_token_id": [1], "top_k": 20, "top_p": 0.95, "min_p": 0.1,
        "repetition_penalty": 1.05, "do_sample": true, "temperature": 0.6}"#;
    let want =
        GenerationConfig { temperature: 0.6, top_k: Some(20), top_p: 0.95, min_p: 0.1, repetition_penalty: 1.05 };
    assert_eq!(folder.defaults(text).unwrap(), want);
    for all in ["0", "-1", "null"] {
        assert_eq!(folder.defaults(&format!(r#"{{"top_k": {all}}}"#)).unwrap().top_k, None);
    }
}

#[test]
fn impossible_sampling_defaults_name_the_file_and_the_key() {
    let folder = Folder::new();
    for (key, value) in [
        ("temperature", "2.5"),
        ("temperature", "\"warm\""),
        ("top_k", "-2"),
        ("top_k", "1.5"),
        ("top_p", "0"),
        ("top_p", "1.1"),
        ("min_p", "1"),
        ("repetition_penalty", "0"),
        ("do_sample", "1"),
    ] {
        let error = folder.defaults(&format!(r#"{{"{key}": {value}}}"#)).unwrap_err().to_string();
        assert!(error.contains("generation_config.json") && error.contains(&format!("'{key}'")), "{error}");
    }
    let error = folder.defaults("[1]").unwrap_err().to_string();
    assert!(error.contains("generation_config.json"), "{error}");
}
