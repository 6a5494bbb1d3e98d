//! Files that are broken, and the tokenizer and chat template of the reference checkpoints.
#![allow(clippy::unwrap_used, reason = "a test that cannot read its files fails")]
use moesaic_model::chat::ChatTemplate;
use moesaic_model::source;
use moesaic_model::tokenizer::{DecodeStream, Tokenizer};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../..")
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn texts_and_chats_equal_the_reference() {
    let folder = root().join("tests/goldens/qwen3_moe");
    let golden = read_json(&folder.join("tokenizer_golden.json"));
    let tokenizer = Tokenizer::from_dir(&folder).unwrap();
    let template = ChatTemplate::from_dir(&folder).unwrap();
    for case in golden["encode"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode(text, false).unwrap(), ids, "{text}");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), case["decoded"].as_str().unwrap());
    }
    for case in golden["chat"].as_array().unwrap() {
        let messages = case["messages"].as_array().unwrap();
        let rendered = template.render(messages, None, true, &Default::default()).unwrap();
        assert_eq!(rendered, case["rendered"].as_str().unwrap());
    }
}

#[test]
fn a_stream_of_tokens_gives_the_whole_text_and_no_half_characters() {
    let tokenizer = Tokenizer::from_dir(&root().join("deploy/models/demo-moe")).unwrap();
    for text in ["plain", "混合专家模型 déjà vu 🙂🙂", "<|im_start|>user\n1,000.50€"] {
        let ids = tokenizer.encode(text, false).unwrap();
        let mut stream = DecodeStream::new(tokenizer.clone(), false);
        let mut pieces: Vec<String> = ids.iter().map(|id| stream.push(*id)).collect();
        pieces.push(stream.flush());
        assert_eq!(pieces.concat(), text);
        assert!(!pieces.iter().any(|piece| piece.contains('\u{fffd}')));
    }
    let emoji = tokenizer.encode("🙂", false).unwrap();
    let mut stream = DecodeStream::new(tokenizer.clone(), false);
    assert_eq!(stream.push(emoji[0]), "");
    assert_eq!(stream.flush(), "\u{fffd}");
}

#[test]
fn a_template_can_raise_and_use_the_usual_methods() {
    let text = "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- if m.role == 'tool' -%}\
        {{ raise_exception('tools are not supported') }}{%- endif -%}{%- set ns.n = ns.n + 1 -%}\
        {{ m.content.strip().split(' ')[-1] }}{{ '' if loop.last else '|' }}{%- endfor -%}\
        {%- if tools %}{{ tools | tojson }}{% endif -%}{{ ns.n }}";
    let template = ChatTemplate::new(text.into(), Default::default()).unwrap();
    let messages = [json!({"role": "user", "content": " a b "}), json!({"role": "user", "content": "c"})];
    let render = |m: &[Value], t| template.render(m, t, true, &Default::default());
    assert_eq!(render(&messages, None).unwrap(), "b|c2");
    let tools = [json!({"a": 1})];
    assert_eq!(render(&messages, Some(&tools)).unwrap(), r#"b|c[{"a": 1}]2"#);
    let error = render(&[json!({"role": "tool", "content": ""})], None).unwrap_err();
    assert!(error.to_string().contains("tools are not supported"), "{error}");
}

/// A folder with one tensor file of the given bytes.
fn folder_with(bytes: &[u8]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    folder
}

fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

#[test]
fn broken_safetensors_are_refused_by_name() {
    let two = |second: &str| format!(r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}},"b":{second}}}"#);
    let hole = two(r#"{"dtype":"F32","shape":[2],"data_offsets":[12,20]}"#);
    let empty_outside = two(r#"{"dtype":"F32","shape":[0],"data_offsets":[4,4]}"#);
    let whole = two(r#"{"dtype":"F32","shape":[0,3],"data_offsets":[8,8]}"#);
    assert!(source::open(folder_with(&file(&whole, 8)).path()).is_ok(), "an empty tensor at a bound is whole");
    let cases: [(Vec<u8>, &str); 12] = [
        (file(&hole, 20), "'b'"),
        (file(&hole, 20), "4 bytes before it"),
        (file(&empty_outside, 8), "'b'"),
        (file(&whole, 11), "3 bytes after its last tensor"),
        (vec![], "is 0 bytes long"),
        (vec![1, 2, 3], "is 3 bytes long"),
        (u64::MAX.to_le_bytes().to_vec(), "says its header has"),
        (file("{", 0), "header is not JSON"),
        (file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 4), "'a'"),
        (file(r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#, 8), "'a'"),
        (file(r#"{"a":{"dtype":"F32","shape":[18446744073709551615,8],"data_offsets":[0,8]}}"#, 8), "'a'"),
        (
            file(
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
                12,
            ),
            "overlap",
        ),
    ];
    for (bytes, expected) in cases {
        let folder = folder_with(&bytes);
        let error = source::open(folder.path()).err().expect("a broken file is refused").to_string();
        assert!(error.contains(expected) && error.contains("model.safetensors"), "{error} lacks {expected}");
    }
}

#[test]
fn every_truncation_and_many_flips_of_a_real_file_end_in_an_error_or_a_value() {
    let bytes = std::fs::read(root().join("tests/goldens/llama_rope_yarn/model.safetensors")).unwrap();
    for len in (0..bytes.len()).step_by(bytes.len() / 40) {
        let folder = folder_with(&bytes[..len]);
        assert!(source::open(folder.path()).is_err(), "{len} bytes");
    }
    for i in 0..200 {
        let mut bytes = bytes.clone();
        bytes[i * 13 % 2600] ^= 1 << (i % 8);
        let folder = folder_with(&bytes);
        if let Ok(source) = source::open(folder.path()) {
            for tensor in source.tensors() {
                let mut out = vec![0.0; tensor.shape.iter().product()];
                let read = source.read_f32(&tensor.name, 0, &mut out);
                assert!(read.is_ok() || matches!(tensor.dtype, source::Dtype::Unsupported(_)), "{read:?}");
            }
        }
    }
}

#[test]
fn reads_beyond_a_tensor_and_missing_shards_are_refused() {
    let header = r#"{"a":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}}"#;
    let folder = folder_with(&file(header, 8));
    let source = source::open(folder.path()).unwrap();
    assert!(source.read_f32("a", 2, &mut [0.0; 2]).is_ok());
    assert!(source.read_f32("a", 3, &mut [0.0; 2]).unwrap_err().to_string().contains("'a'"));
    assert!(source.read_f32("a", usize::MAX, &mut [0.0; 2]).is_err());
    assert!(source.read_f32("b", 0, &mut []).unwrap_err().to_string().contains("missing"));
    let index = r#"{"weight_map":{"a":"model.safetensors","b":"model-2.safetensors"}}"#;
    std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    assert!(source::open(folder.path()).err().unwrap().to_string().contains("model-2.safetensors"));
    let index = r#"{"weight_map":{"a":"../a.safetensors"}}"#;
    std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    assert!(source::open(folder.path()).err().unwrap().to_string().contains("../a.safetensors"));
}
