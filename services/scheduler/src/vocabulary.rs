//! What the scheduler must know of the tokenizer.
use moesaic_model::tokenizer::Tokenizer;
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
    /// The tokens of a tokenizer, for a model with `vocab` of them.
    pub fn new(tokenizer: &Tokenizer, vocab: usize, eos: Vec<TokenId>) -> Self {
        // ids beyond the tokenizer's stand for nothing, and tokens beyond the model's cannot be generated
        let mut token_bytes = tokenizer.all_token_bytes().to_vec();
        token_bytes.resize(vocab, Vec::new());
        let special = (0..tokenizer.vocab_size() as u32).map(|id| tokenizer.is_special(id)).collect();
        Self { token_bytes, special, eos }
    }

    /// Whether this token is a control token.
    pub fn is_special(&self, token: TokenId) -> bool {
        self.special.get(token as usize).copied().unwrap_or(false) || self.eos.contains(&token)
    }
}
