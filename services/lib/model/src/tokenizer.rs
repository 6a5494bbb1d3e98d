//! Text to tokens and back.
mod gguf;

use crate::source::gguf::{Head, Metadata};
use crate::source::gguf_file;
use crate::{Error, Result};
use moesaic_types::TokenId;
use serde_json::Value;
use std::panic::catch_unwind;
use std::path::Path;
use std::sync::Arc;

/// Ids are below this; tables by id stay below 100 MiB.
const MAX_TOKENS: u64 = 1 << 22;

/// A tokenizer of `tokenizer.json` or of GGUF metadata; cheap to clone.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    bytes: Arc<Vec<Vec<u8>>>,
    special: Arc<Vec<bool>>,
    /// The decoder drops one space at the start of a text, as SentencePiece's do.
    strips_first_space: bool,
}

impl Tokenizer {
    /// Reads the tokenizer of a model: a folder or a `.gguf` file.
    ///
    /// # Errors
    /// As [`Self::from_dir`] and [`Self::from_gguf`].
    pub fn open(model: &Path) -> Result<Self> {
        match gguf_file(model) {
            Some(file) => Self::from_gguf(&file, &Head::read(&file)?.metadata),
            None => Self::from_dir(model),
        }
    }

    /// Builds the tokenizer that GGUF metadata describes; `path` is for messages.
    ///
    /// # Errors
    /// `Config` or `Corrupt`, naming the file and the key.
    pub fn from_gguf(path: &Path, metadata: &Metadata) -> Result<Self> {
        let json = gguf::to_json(path, metadata)?;
        Self::build(path, &json, json.to_string().as_bytes())
    }

    /// Reads `tokenizer.json` of a folder.
    ///
    /// # Errors
    /// `Io`, `Config` or `Corrupt`, naming the file and, where one is at fault, the key.
    pub fn from_dir(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let corrupt = |reason: String| Error::Corrupt { path: path.clone(), reason };
        let json = serde_json::from_slice(&bytes).map_err(|e| corrupt(format!("is not valid JSON: {e}")))?;
        Self::build(&path, &json, &bytes)
    }

    /// Builds a tokenizer of `text`, which says what `json` says.
    fn build(path: &Path, json: &Value, text: &[u8]) -> Result<Self> {
        check(path, json)?;
        let corrupt = |reason: String| Error::Corrupt { path: path.to_owned(), reason };
        // what the checks do not see panics in the crate: merges longer than any token, for one
        let built = catch_unwind(|| tokenizers::Tokenizer::from_bytes(text));
        let built = built.map_err(|_| corrupt("is a tokenizer that contradicts itself".into()))?;
        let mut inner = built.map_err(|e| corrupt(format!("is not a tokenizer: {e}")))?;
        // settings of some training run; neither is for prompts
        inner.with_truncation(None).map_err(|e| corrupt(e.to_string()))?.with_padding(None);
        Ok(Self::new(inner))
    }

    /// Wraps a tokenizer, whose ids are below [`MAX_TOKENS`].
    fn new(inner: tokenizers::Tokenizer) -> Self {
        let added = inner.get_added_tokens_decoder();
        let len = inner.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1);
        let decoder = serde_json::to_value(inner.get_decoder()).unwrap_or_default();
        let byte_level = decoder.to_string().contains("\"ByteLevel\"");
        let strips_first_space = strips_first_space(&decoder);
        let decode_char = byte_level_decoder();
        let bytes = (0..len as u32)
            .map(|id| {
                let Some(text) = inner.id_to_token(id) else { return Vec::new() };
                if added.contains_key(&id) {
                    text.into_bytes()
                } else if byte_level {
                    text.chars()
                        .flat_map(|c| decode_char(c).map_or_else(|| c.to_string().into_bytes(), |b| vec![b]))
                        .collect()
                } else {
                    sentencepiece_bytes(&text)
                }
            })
            .collect();
        let special = (0..len as u32).map(|id| added.get(&id).is_some_and(|token| token.special)).collect();
        let (inner, bytes, special) = (Arc::new(inner), Arc::new(bytes), Arc::new(special));
        Self { inner, bytes, special, strips_first_space }
    }

    /// The tokens of a text; `add_special` adds what the tokenizer puts around a text (a beginning-of-sequence token).
    ///
    /// # Errors
    /// `Text` when the tokenizer cannot encode it.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>> {
        let encoding = self.inner.encode_fast(text, add_special).map_err(|e| Error::Text(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of some tokens.
    ///
    /// # Errors
    /// `Text` when the tokenizer cannot decode them.
    pub fn decode(&self, tokens: &[TokenId], skip_special: bool) -> Result<String> {
        self.inner.decode(tokens, skip_special).map_err(|e| Error::Text(e.to_string()))
    }

    /// A token's bytes; empty for a number that is no token.
    pub fn token_bytes(&self, token: TokenId) -> &[u8] {
        self.bytes.get(token as usize).map_or(&[], Vec::as_slice)
    }

    /// All tokens' bytes, by id.
    pub fn all_token_bytes(&self) -> &[Vec<u8>] {
        &self.bytes
    }

    /// Whether a token is special (its text is not part of the answer).
    pub fn is_special(&self, token: TokenId) -> bool {
        self.special.get(token as usize).copied().unwrap_or(false)
    }

    /// The number of a token by its text.
    pub fn token_id(&self, text: &str) -> Option<TokenId> {
        self.inner.token_to_id(text)
    }

    /// One more than the largest token's number.
    pub fn vocab_size(&self) -> usize {
        self.bytes.len()
    }
}

/// Refuses ids that no table could hold, and a tokenizer without tokens.
fn check(path: &Path, json: &Value) -> Result<()> {
    let fail = |key: String, reason: String| Error::Config { path: path.to_owned(), key, reason };
    let vocab = &json["model"]["vocab"];
    let names = vocab.as_object().into_iter().flatten().map(|(text, id)| (format!("model.vocab[{text:?}]"), id));
    let added = json["added_tokens"].as_array().into_iter().flatten().enumerate();
    let added = added.map(|(i, token)| (format!("added_tokens[{i}].id"), &token["id"]));
    for (key, id) in names.chain(added) {
        if id.as_u64().is_none_or(|id| id >= MAX_TOKENS) {
            return Err(fail(key, format!("{id} is no token id; the largest is {}", MAX_TOKENS - 1)));
        }
    }
    let len = vocab.as_object().map(serde_json::Map::len).or_else(|| vocab.as_array().map(Vec::len));
    match len {
        Some(1..) => Ok(()),
        Some(0) => Err(fail("model.vocab".into(), "has no tokens".into())),
        None => Err(fail("model.vocab".into(), "is missing or is no vocabulary".into())),
    }
}

/// Whether a decoder, as JSON, drops a space at the start of a text.
fn strips_first_space(decoder: &Value) -> bool {
    match decoder["type"].as_str() {
        Some("Strip") => decoder["content"] == " " && decoder["start"] == 1,
        Some("Metaspace") => decoder["prepend_scheme"] != "never",
        Some("Sequence") => decoder["decoders"].as_array().is_some_and(|list| list.iter().any(strips_first_space)),
        _ => false,
    }
}

/// GPT-2's map of printable characters to bytes, reversed.
fn byte_level_decoder() -> impl Fn(char) -> Option<u8> {
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let shifted: Vec<u8> = (0..=255u8).filter(|b| !printable(u32::from(*b))).collect();
    move |c| {
        let code = c as u32;
        if printable(code) {
            return u8::try_from(code).ok();
        }
        code.checked_sub(256).and_then(|i| shifted.get(i as usize).copied())
    }
}

/// `<0x0A>` is a byte; U+2581 is a space.
fn sentencepiece_bytes(text: &str) -> Vec<u8> {
    let byte = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>')).and_then(|t| u8::from_str_radix(t, 16).ok());
    byte.map_or_else(|| text.replace('\u{2581}', " ").into_bytes(), |b| vec![b])
}

/// Turns tokens into text one at a time and never gives half a character.
pub struct DecodeStream {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// Drop a space if it comes first.
    strip: bool,
    pending: Vec<u8>,
}

impl DecodeStream {
    /// An empty stream, for a text of its own: the answer of a chat.
    pub fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        Self { skip_special, strip: tokenizer.strips_first_space, pending: Vec::new(), tokenizer }
    }

    /// An empty stream for tokens that go on with a text (a completion): a space at the start is part of it.
    pub fn continuing(tokenizer: Tokenizer, skip_special: bool) -> Self {
        Self { strip: false, ..Self::new(tokenizer, skip_special) }
    }

    /// The text that this token completes; may be empty.
    pub fn push(&mut self, token: TokenId) -> String {
        if !(self.skip_special && self.tokenizer.is_special(token)) {
            let mut bytes = self.tokenizer.token_bytes(token);
            if self.strip && !bytes.is_empty() {
                bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
                self.strip = false;
            }
            self.pending.extend_from_slice(bytes);
        }
        self.take(false)
    }

    /// What is left: bytes that never became a character are replacement characters.
    pub fn flush(&mut self) -> String {
        self.take(true)
    }

    fn take(&mut self, all: bool) -> String {
        let mut text = String::new();
        let mut kept = 0;
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            let at_end = kept + chunk.valid().len() + invalid.len() == self.pending.len();
            kept += chunk.valid().len();
            if invalid.is_empty() {
                continue;
            }
            // the start of a character whose other bytes may still come
            if at_end && !all && may_continue(invalid) {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            kept += invalid.len();
        }
        self.pending.drain(..kept);
        text
    }
}

/// Whether bytes are a proper prefix of some UTF-8 character.
fn may_continue(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|e| e.error_len().is_none())
}
