//! A model's own sampling defaults and end-of-sequence tokens, from `generation_config.json`.
use crate::source::{gguf::Metadata, read_json};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};
use moesaic_types::TokenId;
use serde::Deserialize;
use std::path::Path;

/// Sampling defaults of a model.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct GenerationConfig {
    /// False or absent: greedy by default.
    pub do_sample: bool,
    /// Default temperature.
    pub temperature: Option<f32>,
    /// Default top-k.
    pub top_k: Option<u32>,
    /// Default top-p.
    pub top_p: Option<f32>,
    /// Default min-p.
    pub min_p: Option<f32>,
    /// Default repetition penalty.
    pub repetition_penalty: Option<f32>,
    /// The token that a text begins with.
    pub bos_token_id: Option<TokenId>,
    /// The token that fills up a batch; means nothing.
    pub pad_token_id: Option<TokenId>,
    eos_token_id: Option<OneOrMany>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(TokenId),
    Many(Vec<TokenId>),
}

impl GenerationConfig {
    /// Reads the file of a folder; defaults where there is none.
    ///
    /// # Errors
    /// `Io` or `Corrupt`, naming the file.
    pub fn from_dir(folder: &Path) -> Result<Self> {
        let path = folder.join("generation_config.json");
        if !path.is_file() {
            return Ok(Self::default());
        }
        let text = std::fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        serde_json::from_slice(&text).map_err(|e| Error::Corrupt { path, reason: e.to_string() })
    }

    /// The tokens that end a sequence.
    pub fn eos(&self) -> &[TokenId] {
        match &self.eos_token_id {
            None => &[],
            Some(OneOrMany::One(token)) => std::slice::from_ref(token),
            Some(OneOrMany::Many(tokens)) => tokens,
        }
    }

    /// The special tokens of GGUF metadata; it has no sampling defaults.
    pub fn from_gguf(metadata: &Metadata) -> Self {
        let token = |name: &str| {
            let id = metadata.get_u64(&format!("tokenizer.ggml.{name}_token_id"))?;
            TokenId::try_from(id).ok()
        };
        let mut eos: Vec<TokenId> = ["eos", "eot", "eom"].into_iter().filter_map(token).collect();
        eos.sort_unstable();
        eos.dedup();
        Self {
            bos_token_id: token("bos"),
            pad_token_id: token("padding"),
            eos_token_id: Some(OneOrMany::Many(eos)),
            ..Self::default()
        }
    }
}

/// Every token that ends a sequence of the model in a folder, ascending: those of `generation_config.json` and
/// `config.json`, and the `eos_token` of `tokenizer_config.json`, which chat models name their end of turn in.
///
/// # Errors
/// `Io` or `Corrupt`, naming the file.
pub fn end_tokens(folder: &Path, tokenizer: &Tokenizer) -> Result<Vec<TokenId>> {
    let mut tokens = GenerationConfig::from_dir(folder)?.eos().to_vec();
    let config = folder.join("config.json");
    if config.is_file() {
        match serde_json::from_value(read_json(&config)?["eos_token_id"].take()) {
            Ok(Some(OneOrMany::One(token))) => tokens.push(token),
            Ok(Some(OneOrMany::Many(more))) => tokens.extend(more),
            Ok(None) => {}
            Err(_) => {
                let reason = "'eos_token_id' is neither a token's number nor a list of them".into();
                return Err(Error::Corrupt { path: config, reason });
            }
        }
    }
    let config = folder.join("tokenizer_config.json");
    if config.is_file() {
        let json = read_json(&config)?;
        let eos = &json["eos_token"];
        let text = eos.as_str().or_else(|| eos["content"].as_str());
        tokens.extend(text.and_then(|text| tokenizer.token_id(text)));
    }
    tokens.sort_unstable();
    tokens.dedup();
    Ok(tokens)
}
