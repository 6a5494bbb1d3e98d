//! A model's own sampling defaults and end-of-sequence tokens, from `generation_config.json`.
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
}
