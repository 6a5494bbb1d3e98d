//! A model as the gateway sees it: its text side.
use moesaic_model::chat::ChatTemplate;
use moesaic_model::generation_config::GenerationConfig;
use moesaic_model::tokenizer::Tokenizer;
use moesaic_types::{BlockHasher, TokenId};

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
