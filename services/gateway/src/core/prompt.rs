//! From a text, or from tokens that a client chose itself, to a prompt that fits the model.
use super::check::{fits, tokens};
use super::names::Names;
use crate::served::ServedModel;
use moesaic_types::{Error, Result, TokenId};

/// Bytes of a token as they are on average, at least: a text below the context times this may always be tokenized.
const USUAL_TOKEN_BYTES: usize = 4;

/// Why something cannot be a prompt.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// It does not fit the context.
    TooLong(Error),
    /// Anything else.
    Wrong(Error),
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::TooLong(error) | Refusal::Wrong(error) => error,
        }
    }
}

/// The tokens of a text; `special` adds what the tokenizer puts around a text. Errors speak of `names.prompt`. Takes a
/// time that grows with the text.
pub(crate) fn encode(model: &ServedModel, names: &Names, text: &str, special: bool) -> Result<Vec<TokenId>, Refusal> {
    may_fit(model, text.len()).map_err(|error| Refusal::TooLong(names.apply(error)))?;
    let tokens = model.tokenizer.encode(text, special);
    let tokens = tokens.map_err(|error| Refusal::Wrong(Error::invalid(names.prompt, error.to_string())))?;
    fits(model, tokens.len()).map_err(|error| Refusal::TooLong(names.apply(error)))?;
    Ok(tokens)
}

/// Tokens that the client listed in `field`.
pub(crate) fn listed(model: &ServedModel, names: &Names, field: &str, ids: &[u64]) -> Result<Vec<TokenId>, Refusal> {
    fits(model, ids.len()).map_err(|error| Refusal::TooLong(names.apply(error)))?;
    tokens(field, ids, model).map_err(Refusal::Wrong)
}

/// Refuses a text that even the longest tokens could not fit, before minutes go into its tokens.
fn may_fit(model: &ServedModel, bytes: usize) -> Result<()> {
    if bytes <= model.max_context.saturating_mul(USUAL_TOKEN_BYTES) {
        return Ok(());
    }
    let longest = model.tokenizer.all_token_bytes().iter().map(Vec::len).max().unwrap_or(1).max(1);
    let least = bytes.div_ceil(longest);
    if least < model.max_context {
        return Ok(());
    }
    let context = model.max_context;
    let message = format!("prompt has {bytes} bytes, which are {least} tokens at least; the context holds {context}");
    Err(Error::invalid("prompt", message))
}
