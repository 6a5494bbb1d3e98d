//! Checks of single values: every complaint names the field, the value and the limit.
use crate::served::ServedModel;
use moesaic_types::{Error, Result, TokenId};

/// Which end of a range is not part of it.
#[derive(Clone, Copy)]
pub(super) enum Open {
    None,
    Low,
    High,
}

/// A number in a range; NaN is in none.
pub(super) fn number(field: &str, value: f64, low: f64, high: f64, open: Open) -> Result<f32> {
    let inside = match open {
        Open::None => (low..=high).contains(&value),
        Open::Low => value > low && value <= high,
        Open::High => value >= low && value < high,
    };
    if inside {
        return Ok(value as f32);
    }
    let bounds = match open {
        Open::None => format!("from {low} to {high}"),
        Open::Low => format!("above {low}, at most {high}"),
        Open::High => format!("from {low}, below {high}"),
    };
    Err(Error::invalid(field, format!("{field} is {value}; it must be {bounds}")))
}

/// A whole number in a range.
pub(super) fn whole(field: &str, value: u64, low: u64, high: u64) -> Result<u64> {
    match (low..=high).contains(&value) {
        true => Ok(value),
        false => Err(Error::invalid(field, format!("{field} is {value}; it must be from {low} to {high}"))),
    }
}

/// A list that is not too long.
pub(super) fn at_most(field: &str, len: usize, what: &str, limit: usize) -> Result<()> {
    match len <= limit {
        true => Ok(()),
        false => Err(Error::invalid(field, format!("{field} has {len} {what}; the limit is {limit}"))),
    }
}

/// A token of the vocabulary.
pub(super) fn token(field: &str, id: u64, vocab: usize) -> Result<TokenId> {
    match TokenId::try_from(id) {
        Ok(token) if (token as usize) < vocab => Ok(token),
        _ => Err(Error::invalid(field, format!("{field}: token {id} is outside the vocabulary of {vocab}"))),
    }
}

/// Checks that every token is in the model's vocabulary.
///
/// # Errors
/// `InvalidArgument` naming the field and the token.
pub(crate) fn tokens(field: &str, ids: &[u64], model: &ServedModel) -> Result<Vec<TokenId>> {
    ids.iter().map(|id| token(field, *id, model.vocab)).collect()
}

/// Checks that a prompt leaves room for an answer in the context.
///
/// # Errors
/// `InvalidArgument` of the field `prompt`, with both lengths.
pub(super) fn fits(model: &ServedModel, prompt_tokens: usize) -> Result<()> {
    let context = model.max_context;
    match prompt_tokens < context {
        true => Ok(()),
        false => {
            let message =
                format!("prompt has {prompt_tokens} tokens; with one token of answer the context holds {context}");
            Err(Error::invalid("prompt", message))
        }
    }
}
