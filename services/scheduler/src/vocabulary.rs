//! What the scheduler must know of the tokenizer.
use moesaic_types::TokenId;

/// The tokens as bytes; a token's id is its index.
#[derive(Clone, Debug, Default)]
pub struct Vocabulary {
    /// Each token's text; empty for ids that stand for nothing.
    pub token_bytes: Vec<Vec<u8>>,
    /// Whether a token is a control token, which no text can contain. May be shorter than `token_bytes`.
    pub special: Vec<bool>,
    /// Tokens that end an answer.
    pub eos: Vec<TokenId>,
}

impl Vocabulary {
    /// Whether this token is a control token.
    pub fn is_special(&self, token: TokenId) -> bool {
        self.special.get(token as usize).copied().unwrap_or(false) || self.eos.contains(&token)
    }
}
