//! Typed access to a JSON body: every complaint names the field and what it must be.
use super::known;
use moesaic_types::{Error, Result};
use serde_json::{Map, Value};

/// Bytes before a wrong place that are shown.
const NEAR_BYTES: usize = 40;

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
        Err(error) => {
            let near = near(text, error.line(), error.column());
            Err(Error::invalid("body", format!("body is not valid JSON: {error}, near `{near}`")))
        }
    }
}

/// The text around a place, so that the field shows that is wrong.
fn near(text: &str, line: usize, column: usize) -> &str {
    let line = text.split('\n').nth(line.saturating_sub(1)).unwrap_or_default();
    let start = line.floor_char_boundary(column.saturating_sub(NEAR_BYTES));
    let end = line.ceil_char_boundary((column + NEAR_BYTES / 4).min(line.len()));
    &line[start..end]
}

impl<'a> Fields<'a> {
    /// Reads an object.
    pub fn new(object: &'a Map<String, Value>) -> Self {
        Self { object }
    }

    /// Checks that there is no other field than those of `lists`.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field.
    pub fn only(&self, lists: &[&[&str]]) -> Result<()> {
        known::only(self.object, lists)
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

    /// A whole number from `low`.
    pub fn count(&self, field: &str, low: u64) -> Result<Option<u64>> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => match unsigned(value).filter(|n| *n >= low) {
                None => wrong(field, &format!("a whole number from {low}"), value),
                some => Ok(some),
            },
        }
    }

    /// A whole number.
    pub fn whole(&self, field: &str) -> Result<Option<i64>> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => match signed(value) {
                None => wrong(field, "a whole number of 64 bits", value),
                some => Ok(some),
            },
        }
    }

    /// A whole number whose 64 bits count, with a sign or without.
    pub fn bits(&self, field: &str) -> Result<Option<u64>> {
        match self.get(field).and_then(unsigned) {
            None => Ok(self.whole(field)?.map(i64::cast_unsigned)),
            some => Ok(some),
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

    /// True or false; true where absent.
    pub fn flag_or_true(&self, field: &str) -> Result<bool> {
        Ok(self.get(field).is_none() || self.flag(field)?)
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

/// 4.0 is a whole number too, as JSON Schema has it.
fn signed(value: &Value) -> Option<i64> {
    let whole = |n: f64| (n.fract() == 0.0 && n.abs() < 9e15).then_some(n as i64);
    value.as_i64().or_else(|| value.as_f64().filter(|_| value.is_f64()).and_then(whole))
}

fn unsigned(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| signed(value).and_then(|n| u64::try_from(n).ok()))
}

/// A list of whole numbers from 0.
pub fn counts(field: &str, value: &Value) -> Result<Vec<u64>> {
    let Value::Array(list) = value else { return wrong(field, "a list of tokens", value) };
    let one = |(i, value): (usize, &Value)| match unsigned(value) {
        Some(n) => Ok(n),
        None => wrong(&format!("{field}[{i}]"), "a token's number", value),
    };
    list.iter().enumerate().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn broken_json_is_shown_where_it_is_broken() {
        let message = |text: &str| parse(text.as_bytes()).unwrap_err().message;
        let nan = message("{\"messages\": [],\n \"temperature\": NaN}");
        assert!(nan.contains("line 2") && nan.contains("\"temperature\": N"), "{nan}");
        let huge = message("{\"n\": 1, \"temperature\": 1e999}");
        assert!(huge.contains("\"temperature\": 1e999"), "{huge}");
        let long = message(&format!("{{\"é{}\": x", "é".repeat(500)));
        assert!(long.len() < 200, "{long}");
        assert!(message("").contains("not valid JSON"));
        assert_eq!(message("[]"), "body must be a JSON object");
        assert!(parse(b"{\"a\": \"\xff\"}").unwrap_err().message.contains("UTF-8 at byte 7"));
    }

    #[test]
    fn whole_numbers_are_whole() {
        let object = json!({"a": 4.0, "b": 4.5, "c": -1, "d": 1e300, "e": u64::MAX, "f": "4", "g": null});
        let object = object.as_object().unwrap();
        let fields = Fields::new(object);
        let told = |field: &str| fields.count(field, 1).map_err(|error| error.message);
        assert_eq!(told("a"), Ok(Some(4)));
        assert_eq!(told("b"), Err("b must be a whole number from 1, not 4.5".into()));
        assert_eq!(told("c"), Err("c must be a whole number from 1, not -1".into()));
        assert!(told("d").is_err() && told("f").is_err());
        assert_eq!(told("e"), Ok(Some(u64::MAX)));
        assert_eq!(told("g"), Ok(None));
        assert_eq!(fields.whole("c"), Ok(Some(-1)));
        assert!(fields.whole("e").is_err());
    }
}
