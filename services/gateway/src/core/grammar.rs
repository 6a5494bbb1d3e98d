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

/// The same JSON schema, whose objects have no other keys than those it names, unless it says so: a forced document ends
/// when it has what was asked for. Parts of an `allOf` stay open, for each must let the others' keys pass.
pub(crate) fn closed(schema: Value) -> Value {
    let Value::Object(mut keys) = schema else { return schema };
    for (key, value) in &mut keys {
        let inner = std::mem::take(value);
        *value = match (key.as_str(), inner) {
            ("properties" | "$defs" | "definitions", Value::Object(named)) => {
                Value::Object(named.into_iter().map(|(name, schema)| (name, closed(schema))).collect())
            }
            ("items", schema @ Value::Object(_)) => closed(schema),
            ("anyOf" | "oneOf" | "prefixItems", Value::Array(list)) => list.into_iter().map(closed).collect(),
            (_, other) => other,
        };
    }
    let is_whole = !["allOf", "anyOf", "oneOf", "$ref", "patternProperties"].iter().any(|key| keys.contains_key(*key));
    if is_whole && keys.get("properties").is_some_and(Value::is_object) {
        keys.entry("additionalProperties").or_insert(Value::Bool(false));
    }
    Value::Object(keys)
}

/// The same JSON schema inside another one, at the pointer `place`: its references to itself go with it.
pub(crate) fn moved(schema: Value, place: &str) -> Value {
    match schema {
        Value::Object(keys) => {
            let each = |(key, value): (String, Value)| match value {
                Value::String(to) if key == "$ref" && to.starts_with('#') => {
                    (key, json!(format!("{place}{}", &to[1..])))
                }
                value => (key, moved(value, place)),
            };
            Value::Object(keys.into_iter().map(each).collect())
        }
        Value::Array(items) => items.into_iter().map(|item| moved(item, place)).collect(),
        other => other,
    }
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
