//! A model's own sampling defaults and end-of-sequence tokens.
use crate::source::gguf::Head;
use crate::source::{gguf_file, read_json};
use crate::spec::Config;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};
use moesaic_types::TokenId;
use serde_json::Value;
use std::path::Path;

const FILE: &str = "generation_config.json";
/// Keys of GGUF metadata that name a token which ends a text, a turn or a message.
const GGUF_ENDS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// What a request samples with where it does not say: the values of `generation_config.json`, else neutral ones.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationConfig {
    /// The file's `temperature`, whatever its `do_sample` says, as other servers read it. Without one: 0 (greedy)
    /// where `do_sample` is there and false, which a model's author must have set on purpose, else 1.
    pub temperature: f32,
    /// The best so many tokens; `None`: all (also where the file has 0 or -1).
    pub top_k: Option<u32>,
    /// Above 0, at most 1.
    pub top_p: f32,
    /// From 0, below 1.
    pub min_p: f32,
    /// Above 0, at most 10; 1 is none.
    pub repetition_penalty: f32,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: None, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

impl GenerationConfig {
    /// Reads `generation_config.json` of a folder; neutral values where there is none, as for a GGUF file.
    ///
    /// # Errors
    /// `Io`, `Corrupt` or `Config`, naming the file and the key.
    pub fn open(model: &Path) -> Result<Self> {
        let path = model.join(FILE);
        if !path.is_file() {
            return Ok(Self::default());
        }
        let value = read_json(&path)?;
        let config = Config::new(&path, &value)?;
        let number = |key: &str, default: f64, inside: &dyn Fn(f64) -> bool, bounds: &str| {
            let value = config.number(key, Some(default))?;
            match inside(value) {
                true => Ok(value as f32),
                false => Err(config.error(key, format!("is {value}; it must be {bounds}"))),
            }
        };
        let greedy = config.has("do_sample") && !config.flag("do_sample", true)?;
        let top_k = config.number("top_k", Some(0.0))?;
        if top_k < -1.0 || top_k.fract() != 0.0 {
            return Err(config.error("top_k", format!("is {top_k}; it must be a whole number from -1")));
        }
        let temperature = if greedy { 0.0 } else { 1.0 };
        Ok(Self {
            temperature: number("temperature", temperature, &|t| (0.0..=2.0).contains(&t), "from 0 to 2")?,
            top_k: (top_k > 0.0).then_some(top_k as u32),
            top_p: number("top_p", 1.0, &|p| p > 0.0 && p <= 1.0, "above 0, at most 1")?,
            min_p: number("min_p", 0.0, &|p| (0.0..1.0).contains(&p), "from 0, below 1")?,
            repetition_penalty: number("repetition_penalty", 1.0, &|p| p > 0.0 && p <= 10.0, "above 0, at most 10")?,
        })
    }
}

/// Every token that ends a sequence of a model, ascending. Of a folder: those of `generation_config.json` and
/// `config.json` (of its `text_config` too), and the `eos_token` of `tokenizer_config.json`, which chat models name
/// their end of turn in. Of a GGUF file: the ends of text, turn and message. One that is outside the vocabulary of
/// `vocab` tokens cannot be generated; it is left out, with a warning.
///
/// # Errors
/// `Io`, `Corrupt` or `Config`, naming the file and the key.
pub fn end_tokens(model: &Path, vocab: usize, tokenizer: &Tokenizer) -> Result<Vec<TokenId>> {
    let mut tokens = Ends { vocab, found: Vec::new() };
    if let Some(file) = gguf_file(model) {
        let metadata = Head::read(&file)?.metadata;
        for key in GGUF_ENDS {
            if let Some(token) = metadata.get_u64(key) {
                tokens.add(&file, key, &token.into())?;
            }
        }
    } else {
        for name in [FILE, "config.json"] {
            let path = model.join(name);
            if path.is_file() {
                let json = read_json(&path)?;
                tokens.add(&path, "eos_token_id", &json["eos_token_id"])?;
                tokens.add(&path, "text_config.eos_token_id", &json["text_config"]["eos_token_id"])?;
            }
        }
        let path = model.join("tokenizer_config.json");
        if path.is_file() {
            let json = read_json(&path)?;
            let eos = &json["eos_token"];
            let text = eos.as_str().or_else(|| eos["content"].as_str());
            if let Some(token) = text.and_then(|text| tokenizer.token_id(text)) {
                tokens.add(&path, "eos_token", &token.into())?;
            }
        }
    }
    tokens.found.sort_unstable();
    tokens.found.dedup();
    Ok(tokens.found)
}

struct Ends {
    vocab: usize,
    found: Vec<TokenId>,
}

impl Ends {
    /// Takes a token's number, a list of them, or null.
    fn add(&mut self, path: &Path, key: &str, value: &Value) -> Result<()> {
        let list = match value {
            Value::Null => return Ok(()),
            Value::Array(list) => list.as_slice(),
            one => std::slice::from_ref(one),
        };
        for value in list {
            if !(value.is_u64() || value.is_i64()) {
                let reason = format!("{value} is neither a token's number nor a list of them");
                return Err(Error::Config { path: path.to_owned(), key: key.to_owned(), reason });
            }
            match value.as_u64().and_then(|id| TokenId::try_from(id).ok()).filter(|id| (*id as usize) < self.vocab) {
                Some(token) => self.found.push(token),
                None => tracing::warn!(
                    path = %path.display(), key, token = %value, vocabulary = self.vocab,
                    "an end token is outside the vocabulary and is left out"
                ),
            }
        }
        Ok(())
    }
}
