//! Metadata of GGUF files: typed values under keys.
use std::collections::BTreeMap;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// An unsigned integer of any width.
    Uint(u64),
    /// A signed integer of any width.
    Int(i64),
    /// A float of either width.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// Text.
    Text(String),
    /// Values of one type.
    Array(Vec<Value>),
}

/// Metadata of a GGUF file by key.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    pub(super) values: BTreeMap<String, Value>,
}

impl Metadata {
    /// A value as it stands.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// All keys and values, sorted.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Text.
    pub fn get_str(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// An integer that is not negative.
    pub fn get_u64(&self, key: &str) -> Option<u64> {
        self.get(key).and_then(Value::as_u64)
    }

    /// A number.
    pub fn get_f32(&self, key: &str) -> Option<f32> {
        self.get(key).and_then(Value::as_f32)
    }

    /// A truth value.
    pub fn get_bool(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            Value::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// An array.
    pub fn get_array(&self, key: &str) -> Option<&[Value]> {
        match self.get(key)? {
            Value::Array(values) => Some(values),
            _ => None,
        }
    }

    /// An array of texts; `None` also where one element is something else.
    pub fn get_array_str(&self, key: &str) -> Option<Vec<&str>> {
        let mut texts = Vec::new();
        for value in self.get_array(key)? {
            let Value::Text(text) = value else { return None };
            texts.push(text.as_str());
        }
        Some(texts)
    }

    /// An array of numbers.
    pub fn get_array_f32(&self, key: &str) -> Option<Vec<f32>> {
        self.get_array(key)?.iter().map(Value::as_f32).collect()
    }

    /// An array of integers that are not negative.
    pub fn get_array_u64(&self, key: &str) -> Option<Vec<u64>> {
        self.get_array(key)?.iter().map(Value::as_u64).collect()
    }

    /// As a JSON object, without arrays of more than 4,096 elements (vocabularies).
    pub fn to_json(&self) -> serde_json::Value {
        let small = |value: &&Value| !matches!(value, Value::Array(values) if values.len() > 4096);
        let values = self.values.iter().filter(|(_, value)| small(value));
        serde_json::Value::Object(values.map(|(key, value)| (key.clone(), value.to_json())).collect())
    }
}

impl Value {
    pub(super) fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::Uint(value) => Some(value),
            Self::Int(value) => u64::try_from(value).ok(),
            _ => None,
        }
    }

    fn as_f32(&self) -> Option<f32> {
        match *self {
            Self::Float(value) => Some(value as f32),
            Self::Uint(value) => Some(value as f32),
            Self::Int(value) => Some(value as f32),
            _ => None,
        }
    }

    fn to_json(&self) -> serde_json::Value {
        match self {
            Self::Uint(value) => (*value).into(),
            Self::Int(value) => (*value).into(),
            Self::Float(value) => (*value).into(),
            Self::Bool(value) => (*value).into(),
            Self::Text(value) => value.clone().into(),
            Self::Array(values) => values.iter().map(Self::to_json).collect(),
        }
    }
}
