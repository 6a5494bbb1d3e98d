//! Typed access to a JSON body: every complaint names the field and what it must be.
use moesaic_types::{Error, Result};
use serde_json::{Map, Value};

/// One JSON object of a request.
#[derive(Clone, Copy)]
pub struct Fields<'a> {
    object: &'a Map<String, Value>,
}

fn wrong<T>(field: &str, expected: &str, value: &Value) -> Result<T> {
    let shown: String = value.to_string().chars().take(60).collect();
    Err(Error::invalid(field, format!("{field} must be {expected}, not {shown}")))
}

/// The object in a body.
///
/// # Errors
/// `InvalidArgument` for a body that is not UTF-8, not JSON or no object.
pub fn parse(body: &[u8]) -> Result<Map<String, Value>> {
    let text = std::str::from_utf8(body)
        .map_err(|error| Error::invalid("body", format!("body is not valid UTF-8 at byte {}", error.valid_up_to())))?;
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(Error::invalid("body", "body must be a JSON object")),
        Err(error) => Err(Error::invalid("body", format!("body is not valid JSON: {error}"))),
    }
}

impl<'a> Fields<'a> {
    /// Reads an object.
    pub fn new(object: &'a Map<String, Value>) -> Self {
        Self { object }
    }

    /// A field that is there and not null.
    pub fn get(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    /// A text.
    pub fn text(&self, field: &str) -> Result<Option<&'a str>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => wrong(field, "a text", other),
        }
    }

    /// A number.
    pub fn number(&self, field: &str) -> Result<Option<f64>> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => value.as_f64().map_or_else(|| wrong(field, "a number", value), |n| Ok(Some(n))),
        }
    }

    /// A whole number from 0.
    pub fn count(&self, field: &str) -> Result<Option<u64>> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => value.as_u64().map_or_else(|| wrong(field, "a whole number from 0", value), |n| Ok(Some(n))),
        }
    }

    /// A whole number.
    pub fn whole(&self, field: &str) -> Result<Option<i64>> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => value.as_i64().map_or_else(|| wrong(field, "a whole number", value), |n| Ok(Some(n))),
        }
    }

    /// True or false; false where absent.
    pub fn flag(&self, field: &str) -> Result<bool> {
        match self.get(field) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => wrong(field, "true or false", other),
        }
    }

    /// A text or a list of texts.
    pub fn texts(&self, field: &str) -> Result<Vec<String>> {
        match self.get(field) {
            None => Ok(Vec::new()),
            Some(Value::String(text)) => Ok(vec![text.clone()]),
            Some(Value::Array(list)) => {
                let one = |(i, value): (usize, &Value)| match value {
                    Value::String(text) => Ok(text.clone()),
                    other => wrong(&format!("{field}[{i}]"), "a text", other),
                };
                list.iter().enumerate().map(one).collect()
            }
            Some(other) => wrong(field, "a text or a list of texts", other),
        }
    }

    /// A list of whole numbers from 0.
    pub fn counts(&self, field: &str) -> Result<Vec<u64>> {
        match self.get(field) {
            None => Ok(Vec::new()),
            Some(value) => counts(field, value),
        }
    }

    /// A list.
    pub fn list(&self, field: &str) -> Result<Option<&'a [Value]>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => wrong(field, "a list", other),
        }
    }

    /// An object.
    pub fn object(&self, field: &str) -> Result<Option<&'a Map<String, Value>>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(object)),
            Some(other) => wrong(field, "an object", other),
        }
    }
}

/// A list of whole numbers from 0.
pub fn counts(field: &str, value: &Value) -> Result<Vec<u64>> {
    let Value::Array(list) = value else { return wrong(field, "a list of tokens", value) };
    let one = |(i, value): (usize, &Value)| match value.as_u64() {
        Some(n) => Ok(n),
        None => wrong(&format!("{field}[{i}]"), "a token's number", value),
    };
    list.iter().enumerate().map(one).collect()
}
