//! A model as the gateway sees it: its text side.
use moesaic_model::chat::ChatTemplate;
use moesaic_model::generation_config::{GenerationConfig, end_tokens};
use moesaic_model::spec::ModelSpec;
use moesaic_model::tokenizer::Tokenizer;
use moesaic_model::{Error, Result};
use moesaic_types::{BLOCK_TOKENS, BlockHasher, TenantSalt, TokenId};
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// A model that is served.
#[derive(Clone)]
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
    pub template: Option<Arc<ChatTemplate>>,
    /// The model's own sampling defaults.
    pub defaults: GenerationConfig,
    /// Names the prompt's blocks, for the router.
    pub hasher: BlockHasher,
}

impl ServedModel {
    /// Opens the text side of the model at a path: its tokenizer, template and sampling defaults, no weights. Its
    /// context is the model's own, which replicas may cut.
    ///
    /// # Errors
    /// What is wrong with a file, by its name.
    pub fn open(path: &Path, id: String, spec: &ModelSpec, hasher: BlockHasher) -> Result<Self> {
        let tokenizer = Tokenizer::open(path)?;
        let defaults = GenerationConfig::open(path)?;
        let eos = end_tokens(path, spec.vocab, &tokenizer)?;
        let template = match ChatTemplate::open(path) {
            Ok(template) => Some(Arc::new(template)),
            // a template that is broken is an error: clients would read that there is none
            Err(Error::Text(reason)) => {
                tracing::warn!(reason, "chat is off");
                None
            }
            Err(error) => return Err(error),
        };
        // the door's errors say it too
        if let Some(reason) = template.as_ref().and_then(|template| template.problem()) {
            tracing::warn!(reason, "chat is off");
        }
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let (max_context, vocab) = (spec.max_context, spec.vocab);
        Ok(Self { id, created, max_context, vocab, eos, tokenizer, template, defaults, hasher })
    }

    /// Names what an answer to the same request depends on: the weights, their format and that of the cached keys.
    pub fn fingerprint(&self) -> String {
        // a block's name is made of just that
        let block = self.hasher.next(&TenantSalt::default(), None, &[0; BLOCK_TOKENS]);
        let hex: String = format!("{block:?}").chars().take(10).collect();
        format!("fp_{hex}")
    }
}
