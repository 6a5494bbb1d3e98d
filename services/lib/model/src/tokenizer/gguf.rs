//! Builds a tokenizer from GGUF metadata, as a `tokenizer.json` that the `tokenizers` crate reads: byte-level BPE
//! (`gpt2`) and SentencePiece BPE with byte fallback (`llama`).
mod pre;

use crate::source::gguf::Metadata;
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Values of `tokenizer.ggml.token_type`.
const NORMAL: u64 = 1;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
/// Longer pieces (in characters) are never the result of a merge; bounds the work on a hostile file.
const MAX_PIECE: usize = 256;

struct Reader<'a> {
    path: &'a Path,
    metadata: &'a Metadata,
    tokens: Vec<&'a str>,
    kinds: Vec<u64>,
}

/// The `tokenizer.json` of a GGUF file.
///
/// # Errors
/// `Config`, naming the file and the key.
pub fn to_json(path: &Path, metadata: &Metadata) -> Result<Value> {
    let missing = |key: &str, what: &str| Error::Config {
        path: path.to_owned(),
        key: key.to_owned(),
        reason: format!("is missing or is no {what}"),
    };
    let key = "tokenizer.ggml.model";
    let model = metadata.get_str(key).ok_or_else(|| missing(key, "text"))?;
    let key = "tokenizer.ggml.tokens";
    let tokens = metadata.get_array_str(key).ok_or_else(|| missing(key, "list of texts"))?;
    let kinds = metadata.get_array_u64("tokenizer.ggml.token_type").unwrap_or_else(|| vec![NORMAL; tokens.len()]);
    let reader = Reader { path, metadata, tokens, kinds };
    if reader.kinds.len() != reader.tokens.len() {
        let reason = format!("has {} elements for {} tokens", reader.kinds.len(), reader.tokens.len());
        return Err(reader.error("tokenizer.ggml.token_type", reason));
    }
    match model {
        "gpt2" => reader.byte_level(),
        "llama" => reader.sentencepiece(),
        other => Err(reader.error(
            "tokenizer.ggml.model",
            format!("'{other}' is not supported; supported are gpt2 (byte-level BPE) and llama (SentencePiece)"),
        )),
    }
}

impl Reader<'_> {
    fn error(&self, key: &str, reason: String) -> Error {
        Error::Config { path: self.path.to_owned(), key: key.to_owned(), reason }
    }

    fn byte_level(&self) -> Result<Value> {
        let key = "tokenizer.ggml.merges";
        let merges = self.metadata.get_array_str(key);
        let merges = merges.ok_or_else(|| self.error(key, "is missing or is no list of texts".into()))?;
        let mut pairs = Vec::with_capacity(merges.len());
        for merge in merges {
            // the first part may itself begin with a space
            let at = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
            let at = at.ok_or_else(|| self.error(key, format!("has '{merge}', which is no pair")))?;
            pairs.push(json!([merge[..at], merge[at + 1..]]));
        }
        let pre = self.metadata.get_str("tokenizer.ggml.pre").unwrap_or("default");
        let Some(pre) = pre::find(pre) else {
            let reason = format!("'{pre}' is not supported; supported are {}", pre::names());
            return Err(self.error("tokenizer.ggml.pre", reason));
        };
        let decoder = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        let model = json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": pre.ignore_merges,
            "vocab": self.vocab(), "merges": pairs,
        });
        self.assemble(Value::Null, pre.pre_tokenizer(), decoder, model, pre.add_bos)
    }

    fn sentencepiece(&self) -> Result<Value> {
        let key = "tokenizer.ggml.scores";
        let scores = self.metadata.get_array_f32(key).filter(|scores| scores.len() == self.tokens.len());
        let scores = scores.ok_or_else(|| self.error(key, "is missing or not one number for each token".into()))?;
        let vocab = self.vocab();
        // A merge is a piece that two other pieces make up; the piece's score is its rank.
        let mut merges = Vec::new();
        for ((piece, score), _) in self.tokens.iter().zip(scores).zip(&self.kinds).filter(|(_, kind)| **kind == NORMAL)
        {
            let mut of_piece = Vec::new();
            for (at, _) in piece.char_indices().skip(1).take(MAX_PIECE) {
                let (left, right) = piece.split_at(at);
                if let (Some(l), Some(r)) = (vocab.get(left), vocab.get(right)) {
                    of_piece.push((l.as_u64(), r.as_u64(), left, right, score));
                }
            }
            of_piece.sort_by_key(|(l, r, ..)| (*l, *r));
            merges.extend(of_piece);
        }
        merges.sort_by(|a, b| b.4.total_cmp(&a.4));
        let merges: Vec<Value> = merges.into_iter().map(|(_, _, left, right, _)| json!([left, right])).collect();
        let unknown = self.token("tokenizer.ggml.unknown_token_id")?.map(|(_, text)| text);
        let model = json!({
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": merges,
        });
        let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
        let mut normalizers = vec![spaces];
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if self.metadata.get_bool("tokenizer.ggml.add_space_prefix").unwrap_or(true) {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": "\u{2581}"}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let normalizer = json!({"type": "Sequence", "normalizers": normalizers});
        self.assemble(normalizer, Value::Null, json!({"type": "Sequence", "decoders": decoders}), model, true)
    }

    fn vocab(&self) -> Map<String, Value> {
        self.tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), id.into())).collect()
    }

    /// The token that a key names; an error where it is outside the vocabulary.
    fn token(&self, key: &str) -> Result<Option<(u64, &str)>> {
        let Some(id) = self.metadata.get_u64(key) else { return Ok(None) };
        let text = usize::try_from(id).ok().and_then(|id| self.tokens.get(id));
        match text {
            Some(text) => Ok(Some((id, text))),
            None => Err(self.error(key, format!("is {id}, but there are {} tokens", self.tokens.len()))),
        }
    }

    fn assemble(
        &self,
        normalizer: Value,
        pre_tokenizer: Value,
        decoder: Value,
        model: Value,
        bos_by_default: bool,
    ) -> Result<Value> {
        let added: Vec<Value> = self
            .tokens
            .iter()
            .zip(&self.kinds)
            .enumerate()
            .filter(|(_, (token, kind))| matches!(**kind, CONTROL | USER_DEFINED) && !token.is_empty())
            .map(|(id, (token, kind))| {
                json!({
                    "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": *kind == CONTROL,
                })
            })
            .collect();
        let mut single = vec![json!({"Sequence": {"id": "A", "type_id": 0}})];
        let mut special = Map::new();
        let ends = [("bos", bos_by_default), ("eos", false)];
        for (end, default) in ends {
            if !self.metadata.get_bool(&format!("tokenizer.ggml.add_{end}_token")).unwrap_or(default) {
                continue;
            }
            if let Some((id, text)) = self.token(&format!("tokenizer.ggml.{end}_token_id"))? {
                let place = if end == "bos" { 0 } else { single.len() };
                single.insert(place, json!({"SpecialToken": {"id": text, "type_id": 0}}));
                special.insert(text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]}));
            }
        }
        let mut pair = single.clone();
        pair.push(json!({"Sequence": {"id": "B", "type_id": 1}}));
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer, "decoder": decoder, "model": model,
            "post_processor": {
                "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special,
            },
        }))
    }
}
