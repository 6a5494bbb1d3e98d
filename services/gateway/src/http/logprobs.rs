//! Log-probabilities as the two OpenAI routes show them.
use crate::core::TokenPiece;
use crate::served::ServedModel;
use moesaic_types::{SampledToken, TokenId};
use serde_json::{Map, Value, json};

/// The lowest log-probability that is shown; JSON has no infinity.
const LOWEST: f32 = -9999.0;

/// `logprobs.content` of a chat.
pub(super) fn content(model: &ServedModel, tokens: &[TokenPiece], ids: bool) -> Vec<Value> {
    let entry = |id: TokenId, bytes: &[u8], logprob: f32| {
        let token = if ids { numbered(id) } else { String::from_utf8_lossy(bytes).into_owned() };
        json!({"token": token, "logprob": logprob.max(LOWEST), "bytes": bytes})
    };
    let one = |piece: &TokenPiece| {
        let SampledToken { id, logprob, top_logprobs } = &piece.token;
        let mut object = entry(*id, &piece.bytes, logprob.unwrap_or(0.0));
        let top = top_logprobs.iter().map(|(id, logprob)| entry(*id, model.tokenizer.token_bytes(*id), *logprob));
        object["top_logprobs"] = top.collect();
        object
    };
    tokens.iter().map(one).collect()
}

/// The lists of a completion so far; `offset` is where the next token's text begins, in characters.
pub(super) struct Logprobs {
    tokens: Vec<Value>,
    token_logprobs: Vec<Value>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<Value>,
    offset: usize,
    skip_special: bool,
    /// Tokens are shown by their numbers.
    ids: bool,
}

impl Logprobs {
    pub(super) fn new(skip_special: bool, ids: bool) -> Self {
        Self {
            tokens: Vec::new(),
            token_logprobs: Vec::new(),
            top_logprobs: Vec::new(),
            text_offset: Vec::new(),
            offset: 0,
            skip_special,
            ids,
        }
    }

    /// Adds a token; without `sampled` it is the first of a prompt, of which nothing is known.
    pub(super) fn push(&mut self, model: &ServedModel, token: TokenId, sampled: Option<&SampledToken>) {
        let bytes = model.tokenizer.token_bytes(token);
        self.text_offset.push(self.offset.into());
        if !(self.skip_special && model.tokenizer.is_special(token)) {
            // a character counts where it begins, whatever number of tokens it takes
            self.offset += bytes.iter().filter(|byte| **byte & 0xc0 != 0x80).count();
        }
        let text = |id: TokenId| if self.ids { numbered(id) } else { shown(model.tokenizer.token_bytes(id)) };
        self.tokens.push(text(token).into());
        let logprob = sampled.and_then(|sampled| sampled.logprob).map(|logprob| logprob.max(LOWEST));
        self.token_logprobs.push(logprob.into());
        self.top_logprobs.push(sampled.map_or(Value::Null, |sampled| {
            let mut top = Map::new();
            // the chosen token is always among them, as OpenAI has it
            let chosen = sampled.logprob.map(|logprob| (token, logprob));
            for (id, logprob) in sampled.top_logprobs.iter().copied().chain(chosen) {
                // of tokens that look the same, the likeliest counts
                top.entry(text(id)).or_insert_with(|| logprob.max(LOWEST).into());
            }
            Value::Object(top)
        }));
    }

    /// Takes what was collected; the offset goes on.
    pub(super) fn take(&mut self) -> Value {
        json!({
            "tokens": std::mem::take(&mut self.tokens),
            "token_logprobs": std::mem::take(&mut self.token_logprobs),
            "top_logprobs": std::mem::take(&mut self.top_logprobs),
            "text_offset": std::mem::take(&mut self.text_offset),
        })
    }
}

/// A token by its number, as vLLM writes it.
fn numbered(id: TokenId) -> String {
    format!("token_id:{id}")
}

/// A token as text; one that is no text by itself as `bytes:\xe2\x82`.
fn shown(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |text, byte| text + &format!("\\x{byte:02x}")),
    }
}
