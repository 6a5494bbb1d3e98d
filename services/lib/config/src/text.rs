//! Values that come as text, from variables and flags.
use config::{Value, ValueKind};
use serde_json::Value as Json;

/// Reads text as what the key's default is. Numbers and booleans stay text: deserialization knows their types.
pub(crate) fn parse(text: &str, default: Option<&Json>, origin: &String) -> Result<ValueKind, String> {
    let trimmed = text.trim();
    let bracketed = trimmed.starts_with('[') || trimmed.starts_with('{');
    match default {
        Some(Json::Array(_)) if !bracketed => Ok(ValueKind::Array(
            trimmed
                .split(',')
                .map(str::trim)
                .filter(|item| !item.is_empty())
                .map(|item| string(item, origin))
                .collect(),
        )),
        Some(Json::String(_)) => Ok(ValueKind::String(text.to_owned())),
        _ if bracketed => {
            let table: toml::Table =
                toml::from_str(&format!("value = {trimmed}")).map_err(|error| error.message().to_owned())?;
            Ok(table.into_iter().next().map_or(ValueKind::Nil, |(_, value)| from_toml(value, origin)))
        }
        _ => Ok(ValueKind::String(text.to_owned())),
    }
}

fn string(text: &str, origin: &String) -> Value {
    Value::new(Some(origin), ValueKind::String(text.to_owned()))
}

fn from_toml(value: toml::Value, origin: &String) -> ValueKind {
    match value {
        toml::Value::String(text) => ValueKind::String(text),
        toml::Value::Integer(number) => ValueKind::I64(number),
        toml::Value::Float(number) => ValueKind::Float(number),
        toml::Value::Boolean(flag) => ValueKind::Boolean(flag),
        toml::Value::Datetime(time) => ValueKind::String(time.to_string()),
        toml::Value::Array(items) => {
            ValueKind::Array(items.into_iter().map(|item| Value::new(Some(origin), from_toml(item, origin))).collect())
        }
        toml::Value::Table(table) => ValueKind::Table(
            table.into_iter().map(|(key, item)| (key, Value::new(Some(origin), from_toml(item, origin)))).collect(),
        ),
    }
}

/// The defaults as the `config` crate's values.
pub(crate) fn from_json(value: &Json, origin: &String) -> ValueKind {
    match value {
        Json::Null => ValueKind::Nil,
        Json::Bool(flag) => ValueKind::Boolean(*flag),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => ValueKind::I64(number),
            (None, Some(number)) => ValueKind::U64(number),
            (None, None) => ValueKind::Float(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => ValueKind::String(text.clone()),
        Json::Array(items) => {
            ValueKind::Array(items.iter().map(|item| Value::new(Some(origin), from_json(item, origin))).collect())
        }
        Json::Object(table) => ValueKind::Table(
            table.iter().map(|(key, item)| (key.clone(), Value::new(Some(origin), from_json(item, origin)))).collect(),
        ),
    }
}
