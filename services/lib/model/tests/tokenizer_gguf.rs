//! Tokenizers and chat templates out of GGUF metadata, and streams of tokens.
#![allow(clippy::unwrap_used)]

use candle_core::quantized::gguf_file::{self, Value};
use moesaic_model::chat::ChatTemplate;
use moesaic_model::generation_config::{GenerationConfig, end_tokens};
use moesaic_model::tokenizer::{DecodeStream, Tokenizer};
use proptest::prelude::*;
use serde_json::Value as Json;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../..")
}

fn texts(values: &[String]) -> Value {
    Value::Array(values.iter().cloned().map(Value::String).collect())
}

fn write(folder: &Path, metadata: &[(&str, Value)]) -> PathBuf {
    let path = folder.join("model.gguf");
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    gguf_file::write(&mut std::fs::File::create(&path).unwrap(), &metadata, &[]).unwrap();
    path
}

/// The reference checkpoints' tokenizer as GGUF metadata, written the way llama.cpp's converter writes it.
fn byte_level_metadata() -> Vec<(&'static str, Value)> {
    let file = root().join("tests/goldens/qwen3_moe/tokenizer.json");
    let json: Json = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let mut tokens: Vec<(u64, String)> = vocab.iter().map(|(text, id)| (id.as_u64().unwrap(), text.clone())).collect();
    tokens.sort();
    let special: Vec<&str> =
        json["added_tokens"].as_array().unwrap().iter().map(|token| token["content"].as_str().unwrap()).collect();
    let kinds = tokens.iter().map(|(_, text)| Value::I32(if special.contains(&text.as_str()) { 3 } else { 1 }));
    let kinds = Value::Array(kinds.collect());
    let tokens: Vec<String> = tokens.into_iter().map(|(_, text)| text).collect();
    let merges = json["model"]["merges"].as_array().unwrap().iter();
    let merges: Vec<String> = merges
        .map(|merge| match merge {
            Json::String(pair) => pair.clone(),
            pair => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
        })
        .collect();
    vec![
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String("gpt-2".into())),
        ("tokenizer.ggml.tokens", texts(&tokens)),
        ("tokenizer.ggml.token_type", kinds),
        ("tokenizer.ggml.merges", texts(&merges)),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
        ("tokenizer.ggml.eot_token_id", Value::U32(0)),
        ("tokenizer.chat_template", Value::String("{{ eos_token }}{{ messages[0].content }}".into())),
    ]
}

#[test]
fn byte_level_metadata_tokenizes_as_the_reference_does() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), &byte_level_metadata());
    let tokenizer = Tokenizer::open(&path).unwrap();
    let original = Tokenizer::from_dir(&root().join("tests/goldens/qwen3_moe")).unwrap();
    let golden = root().join("tests/goldens/qwen3_moe/tokenizer_golden.json");
    let golden: Json = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
    for case in golden["encode"].as_array().unwrap() {
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode(case["text"].as_str().unwrap(), true).unwrap(), ids, "{}", case["text"]);
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), case["decoded"].as_str().unwrap());
    }
    assert_eq!(tokenizer.all_token_bytes(), original.all_token_bytes());
    assert!(tokenizer.is_special(2) && !tokenizer.is_special(100));
    let template = ChatTemplate::open(&path).unwrap();
    let messages = [serde_json::json!({"role": "user", "content": "hi"})];
    assert_eq!(template.render(&messages, None, true, &Default::default()).unwrap(), "<|im_end|>hi");
    assert_eq!(end_tokens(&path, 512, &tokenizer).unwrap(), [0, 2]);
    assert_eq!(end_tokens(&path, 2, &tokenizer).unwrap(), [0], "2 is outside a vocabulary of 2");
    assert_eq!(GenerationConfig::open(&path).unwrap(), GenerationConfig::default());
}

#[test]
fn texts_are_split_as_the_metadata_says() {
    // merges that a text shows only where both parts stand in one piece
    let pairs = ["o W", "t '", "3 4", "\u{10a} /", "t u"];
    let mut tokens: Vec<String> = "leitsuoWN'1234!/\u{120}\u{10a}".chars().map(String::from).collect();
    tokens.extend(pairs.map(|pair| pair.replace(' ', "")));
    let folder = tempfile::tempdir().unwrap();
    let merged = |pre: &str| {
        let metadata = [
            ("tokenizer.ggml.model", Value::String("gpt2".into())),
            ("tokenizer.ggml.pre", Value::String(pre.into())),
            ("tokenizer.ggml.tokens", texts(&tokens)),
            ("tokenizer.ggml.merges", texts(&pairs.map(String::from))),
        ];
        let tokenizer = Tokenizer::open(&write(folder.path(), &metadata)).unwrap();
        let text = "loWe it's 1234!\n/WNtu";
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        let single = tokens.len() - pairs.len();
        ids.iter().filter_map(|id| (*id as usize).checked_sub(single)).map(|i| pairs[i]).collect::<Vec<_>>()
    };
    assert_eq!(merged("gpt-4o"), ["t '", "\u{10a} /", "t u"]);
    assert_eq!(merged("llama-bpe"), ["o W", "t u"]);
    assert_eq!(merged("qwen2"), ["o W", "t u"]);
    assert_eq!(merged("gpt-2"), ["o W", "3 4", "t u"]);
}

#[test]
fn sentencepiece_metadata_merges_by_score_and_falls_back_to_bytes() {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    let pieces = ["\u{2581}", "h", "e", "l", "o", "he", "ll", "hell", "hello", "\u{2581}hello", "lo", "x"];
    tokens.extend(pieces.map(String::from));
    let id = |piece: &str| 259 + pieces.iter().position(|p| *p == piece).unwrap() as u32;
    let kind = |i: usize| {
        Value::I32(match i {
            0 => 2,
            1 | 2 => 3,
            3..259 => 6,
            _ => 1,
        })
    };
    let scores = (0..tokens.len()).map(|i| Value::F32(if i < 259 { 0.0 } else { 259.0 - i as f32 }));
    let mut metadata = vec![
        ("tokenizer.ggml.model", Value::String("llama".into())),
        ("tokenizer.ggml.tokens", texts(&tokens)),
        ("tokenizer.ggml.scores", Value::Array(scores.collect())),
        ("tokenizer.ggml.token_type", Value::Array((0..tokens.len()).map(kind).collect())),
        ("tokenizer.ggml.bos_token_id", Value::U32(1)),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
        ("tokenizer.ggml.unknown_token_id", Value::U32(0)),
    ];
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::open(&write(folder.path(), &metadata)).unwrap();
    assert_eq!(tokenizer.encode("hello", true).unwrap(), [1, id("\u{2581}hello")]);
    assert_eq!(tokenizer.encode("hello hello", false).unwrap(), [id("\u{2581}hello"); 2]);
    // "he" outranks "ll", and "ll" outranks "lo"
    assert_eq!(tokenizer.encode("xhell", false).unwrap(), [id("\u{2581}"), id("x"), id("hell")]);
    assert_eq!(tokenizer.encode("é</s>", false).unwrap(), [id("\u{2581}"), 3 + 0xc3, 3 + 0xa9, 2]);
    let ids = tokenizer.encode("hello é hello", false).unwrap();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "hello é hello");
    let stream = |mut stream: DecodeStream| ids.iter().map(|id| stream.push(*id)).collect::<String>();
    assert_eq!(stream(DecodeStream::new(tokenizer.clone(), true)), "hello é hello");
    assert_eq!(stream(DecodeStream::continuing(tokenizer, true)), " hello é hello");

    metadata[5].1 = Value::U32(100_000);
    metadata.push(("tokenizer.ggml.add_eos_token", Value::Bool(true)));
    let error = Tokenizer::open(&write(folder.path(), &metadata)).err().unwrap().to_string();
    assert!(error.contains("tokenizer.ggml.eos_token_id") && error.contains("model.gguf"), "{error}");
}

#[test]
fn a_text_begins_as_the_family_says_unless_the_file_does() {
    let folder = tempfile::tempdir().unwrap();
    let first = |pre: &str, add_bos: Option<bool>| {
        let mut metadata = byte_level_metadata();
        metadata[1].1 = Value::String(pre.into());
        metadata.push(("tokenizer.ggml.bos_token_id", Value::U32(0)));
        metadata.extend(add_bos.map(|add| ("tokenizer.ggml.add_bos_token", Value::Bool(add))));
        Tokenizer::open(&write(folder.path(), &metadata)).unwrap().encode("hi", true).unwrap()[0]
    };
    for pre in ["llama3", "llama-v3", "llama-bpe", "falcon3", "tekken"] {
        assert_eq!(first(pre, None), 0, "{pre}");
        assert_ne!(first(pre, Some(false)), 0, "{pre}");
    }
    for pre in ["default", "gpt-2", "qwen2", "gpt-4o", "deepseek-llm", "refact", "bloom", "olmo", "dbrx"] {
        assert_ne!(first(pre, None), 0, "{pre}");
        assert_eq!(first(pre, Some(true)), 0, "{pre}");
    }
}

#[test]
fn wrong_tokenizer_metadata_names_the_file_and_the_key() {
    let cases: [(&str, Option<Value>, &str); 7] = [
        ("tokenizer.ggml.model", None, "tokenizer.ggml.model"),
        ("tokenizer.ggml.model", Some(Value::String("bert".into())), "'bert' is not supported"),
        ("tokenizer.ggml.pre", Some(Value::String("other".into())), "'other' is not supported"),
        ("tokenizer.ggml.tokens", Some(Value::U32(1)), "tokenizer.ggml.tokens"),
        ("tokenizer.ggml.token_type", Some(Value::Array(vec![Value::I32(1)])), "has 1 elements for"),
        ("tokenizer.ggml.merges", None, "tokenizer.ggml.merges"),
        ("tokenizer.ggml.merges", Some(texts(&["nospace".into()])), "nospace"),
    ];
    let folder = tempfile::tempdir().unwrap();
    for (key, value, expected) in cases {
        let mut metadata = byte_level_metadata();
        metadata.retain(|(name, _)| *name != key);
        metadata.extend(value.map(|value| (key, value)));
        let error = Tokenizer::open(&write(folder.path(), &metadata)).err().unwrap().to_string();
        assert!(error.contains(expected) && error.contains("model.gguf"), "{error}");
    }
}

#[test]
fn a_corrupt_tokenizer_file_is_named() {
    let whole = std::fs::read(root().join("tests/goldens/qwen3_moe/tokenizer.json")).unwrap();
    for bytes in [&whole[..whole.len() / 2], b"", b"{}", b"[1]", &[0xff, 0xfe]] {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), bytes).unwrap();
        let error = Tokenizer::from_dir(folder.path()).err().unwrap().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }
}

/// The reference checkpoints' tokenizer, changed; what its folder opens as.
fn changed(change: impl FnOnce(&mut Json)) -> moesaic_model::Result<Tokenizer> {
    let folder = tempfile::tempdir().unwrap();
    let mut json: Json =
        serde_json::from_slice(&std::fs::read(root().join("tests/goldens/qwen3_moe/tokenizer.json")).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    Tokenizer::from_dir(folder.path())
}

#[test]
fn ids_that_no_table_can_hold_are_refused_by_name() {
    for id in [3_000_000_000u64, 4_294_967_295, 4_294_967_296, 1 << 22] {
        let error = changed(|json| json["model"]["vocab"]["zzzz"] = id.into()).err().unwrap().to_string();
        assert!(error.contains("model.vocab[\"zzzz\"]") && error.contains("4194303"), "{error}");
        assert!(error.contains("tokenizer.json"), "{error}");
        let error = changed(|json| json["added_tokens"][1]["id"] = id.into()).err().unwrap().to_string();
        assert!(error.contains("added_tokens[1].id") && error.contains("4194303"), "{error}");
    }
    let error = changed(|json| json["model"]["vocab"]["zzzz"] = (-1).into()).err().unwrap().to_string();
    assert!(error.contains("-1 is no token id"), "{error}");
    let error = changed(|json| json["model"]["vocab"] = serde_json::json!({})).err().unwrap().to_string();
    assert!(error.contains("model.vocab") && error.contains("no tokens"), "{error}");
    assert_eq!(changed(|json| json["model"]["vocab"]["zzzz"] = 70_000.into()).unwrap().vocab_size(), 70_001);
}

#[test]
fn a_part_that_is_broken_is_an_error_and_no_panic() {
    let whole = std::fs::read_to_string(root().join("tests/goldens/qwen3_moe/tokenizer.json")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let at = whole.find("\"decoder\"").unwrap();
    let cuts = (at..at + 60).map(|cut| whole.as_bytes()[..cut].to_vec());
    let mut not_utf8 = whole.clone().into_bytes();
    not_utf8[at + whole[at..].find("ByteLevel").unwrap()] = 0xff;
    for bytes in cuts.chain([not_utf8]) {
        std::fs::write(folder.path().join("tokenizer.json"), bytes).unwrap();
        let error = Tokenizer::from_dir(folder.path()).err().unwrap().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }
    for part in ["decoder", "pre_tokenizer", "normalizer", "post_processor"] {
        for wrong in [serde_json::json!("Nope"), 1.into(), Json::Null, serde_json::json!({"a": []})] {
            let error = changed(|json| json[part] = serde_json::json!({"type": wrong})).err().unwrap().to_string();
            assert!(error.contains("tokenizer.json"), "{part}: {error}");
        }
    }
    // the crate copies a merge into a buffer of the longest token
    let error = changed(|json| {
        let longest = json["model"]["vocab"].as_object().unwrap().keys().max_by_key(|text| text.len()).unwrap().clone();
        json["model"]["merges"] = serde_json::json!([[longest, longest]]);
    });
    let error = error.err().unwrap().to_string();
    assert!(error.contains("tokenizer.json") && error.contains("contradicts itself"), "{error}");
}

#[test]
fn truncation_and_padding_are_not_for_prompts() {
    let text = "one two three four five six seven eight";
    let plain = changed(|_| ()).unwrap().encode(text, true).unwrap();
    let cut = changed(|json| {
        json["truncation"] =
            serde_json::json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
        json["padding"] = serde_json::json!({
            "strategy": {"Fixed": 200}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<|endoftext|>",
        });
    });
    assert_eq!(cut.unwrap().encode(text, true).unwrap(), plain);
    assert!(plain.len() > 3);
}

static DEMO: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::from_dir(&root().join("deploy/models/demo-moe")).unwrap());

proptest! {
    #[test]
    fn deltas_add_up_to_the_whole_for_any_tokens(ids in prop::collection::vec(0u32..2048, 0..60), skip: bool) {
        let mut stream = DecodeStream::new(DEMO.clone(), skip);
        let mut text: String = ids.iter().map(|id| stream.push(*id)).collect();
        text.push_str(&stream.flush());
        prop_assert_eq!(text, DEMO.decode(&ids, skip).unwrap());
        prop_assert_eq!(stream.flush(), "");
    }

    #[test]
    fn any_text_survives_and_no_delta_has_half_a_character(text in "\\PC{0,40}") {
        let ids = DEMO.encode(&text, false).unwrap();
        let mut stream = DecodeStream::new(DEMO.clone(), false);
        let mut whole = String::new();
        for id in ids {
            let delta = stream.push(id);
            let is_whole = text.contains(char::REPLACEMENT_CHARACTER) || !delta.contains(char::REPLACEMENT_CHARACTER);
            prop_assert!(is_whole, "{delta:?}");
            whole.push_str(&delta);
        }
        prop_assert_eq!(stream.flush(), "");
        prop_assert_eq!(whole, text);
    }
}
