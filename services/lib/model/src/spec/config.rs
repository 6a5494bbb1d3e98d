//! Typed and bounded access to the values of a `config.json`.
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;

/// No dimension of a real model comes near this; products of two dimensions cannot overflow.
const MAX_DIMENSION: u64 = 1 << 26;

/// One JSON object of a configuration file.
#[derive(Clone, Copy)]
pub(crate) struct Config<'a> {
    path: &'a Path,
    object: &'a Map<String, Value>,
}

impl<'a> Config<'a> {
    pub(crate) fn new(path: &'a Path, value: &'a Value) -> Result<Self> {
        match value.as_object() {
            Some(object) => Ok(Self { path, object }),
            None => Err(Error::Corrupt { path: path.to_owned(), reason: "is not a JSON object".into() }),
        }
    }

    pub(crate) fn error(&self, key: &str, reason: String) -> Error {
        Error::Config { path: self.path.to_owned(), key: key.to_owned(), reason }
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// All keys and values.
    pub(crate) fn entries(&self) -> &'a Map<String, Value> {
        self.object
    }

    /// Whether the key is there and not null.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.error(key, "is missing".into()))
    }

    /// A whole number from 0.
    pub(crate) fn count(&self, key: &str, default: Option<usize>) -> Result<usize> {
        let Some(value) = self.get(key) else { return self.required(key, default) };
        match value.as_u64() {
            Some(n) if n <= MAX_DIMENSION => Ok(n as usize),
            _ => Err(self.error(key, format!("{value} is not a whole number from 0 to {MAX_DIMENSION}"))),
        }
    }

    /// A whole number from 1.
    pub(crate) fn size(&self, key: &str, default: Option<usize>) -> Result<usize> {
        match self.count(key, default)? {
            0 => Err(self.error(key, "must not be 0".into())),
            n => Ok(n),
        }
    }

    /// A whole number from 1, absent or null.
    pub(crate) fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        if self.has(key) { self.size(key, None).map(Some) } else { Ok(None) }
    }

    /// The first key of several that is there.
    pub(crate) fn first_of(&self, keys: &[&'static str]) -> &'static str {
        keys.iter().copied().find(|key| self.has(key)).unwrap_or(keys[0])
    }

    pub(crate) fn number(&self, key: &str, default: Option<f64>) -> Result<f64> {
        let Some(value) = self.get(key) else { return self.required(key, default) };
        match value.as_f64() {
            Some(n) if n.is_finite() && n.abs() <= 1e12 => Ok(n),
            _ => Err(self.error(key, format!("{value} is not a finite number"))),
        }
    }

    pub(crate) fn positive(&self, key: &str, default: Option<f64>) -> Result<f64> {
        match self.number(key, default)? {
            n if n > 0.0 => Ok(n),
            n => Err(self.error(key, format!("{n} is not above 0"))),
        }
    }

    /// A list of numbers above 0.
    pub(crate) fn positives(&self, key: &str) -> Result<Vec<f32>> {
        let list = self.required(key, self.list(key)?)?;
        let number = |value: &Value| match value.as_f64() {
            Some(n) if n > 0.0 && n <= 1e12 => Ok(n as f32),
            _ => Err(self.error(key, format!("{value} is not a number above 0"))),
        };
        list.iter().map(number).collect()
    }

    pub(crate) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.error(key, format!("{other} is not true or false"))),
        }
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.error(key, format!("{other} is not a string"))),
        }
    }

    pub(crate) fn object(&self, key: &str) -> Result<Option<Config<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Config { path: self.path, object })),
            Some(other) => Err(self.error(key, format!("{other} is not an object"))),
        }
    }

    pub(crate) fn list(&self, key: &str) -> Result<Option<&'a [Value]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => Err(self.error(key, format!("{other} is not a list"))),
        }
    }

    /// A list of whole numbers; a single number stands for a list of one.
    pub(crate) fn counts(&self, key: &str) -> Result<Vec<u32>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let one = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| self.error(key, format!("{value} is not a token id or index")))
        };
        match value {
            Value::Array(list) => list.iter().map(one).collect(),
            value => Ok(vec![one(value)?]),
        }
    }
}
