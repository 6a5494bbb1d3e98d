//! A model as the gateway sees it: its text side.
use moesaic_model::chat::ChatTemplate;
use moesaic_model::generation_config::GenerationConfig;
use moesaic_model::tokenizer::Tokenizer;
use moesaic_types::{BLOCK_TOKENS, BlockHasher, TenantSalt, TokenId};

/// A model that is served.
pub struct ServedModel {
    /// The name that requests use.
    pub id: String,
    /// Seconds since 1970 when it was loaded.
    pub created: u64,
    /// The longest context, in tokens.
    pub max_context: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Tokens that end a sequence.
    pub eos: Vec<TokenId>,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Conversations to text; `None` where the model has no template.
    pub template: Option<ChatTemplate>,
    /// The model's own sampling defaults.
    pub defaults: GenerationConfig,
    /// Names the prompt's blocks, for the router.
    pub hasher: BlockHasher,
}

impl ServedModel {
    /// Names what an answer to the same request depends on: the weights, their format and that of the cached keys.
    pub fn fingerprint(&self) -> String {
        // a block's name is made of just that
        let block = self.hasher.next(&TenantSalt::default(), None, &[0; BLOCK_TOKENS]);
        let hex: String = format!("{block:?}").chars().take(10).collect();
        format!("fp_{hex}")
    }
}
