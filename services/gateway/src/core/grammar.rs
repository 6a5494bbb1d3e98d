//! Grammars that both doors make of what a client wants.
use moesaic_types::{Error, Grammar, Result};
use serde_json::{Value, json};

/// Texts that may be offered as a choice at most.
const MAX_CHOICES: usize = 256;

/// The same JSON schema, for documents without white space between their values.
pub(crate) fn compact(mut schema: Value) -> Value {
    if let Value::Object(schema) = &mut schema {
        schema.insert("x-guidance".into(), json!({"whitespace_flexible": false}));
    }
    schema
}

/// One of some texts.
///
/// # Errors
/// `InvalidArgument` naming `field` where there are none, or too many.
pub(crate) fn one_of(field: &str, texts: &[String]) -> Result<Grammar> {
    if texts.is_empty() || texts.len() > MAX_CHOICES {
        let message = format!("{field} has {} texts; it must have 1 to {MAX_CHOICES}", texts.len());
        return Err(Error::invalid(field, message));
    }
    // Lark's strings are quoted as JSON's are
    let quoted: Vec<_> = texts.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
    Ok(Grammar::Lark(format!("start: {}", quoted.join(" | ")).into()))
}
