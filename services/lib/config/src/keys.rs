//! The keys that a configuration struct has, read from its defaults.
use serde_json::Value;

/// What the defaults say of a key.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Key<'a> {
    /// It exists, with this default.
    Known(&'a Value),
    /// It lies under an optional value or a map whose keys are free; deserialization decides.
    Open,
    /// It does not exist.
    Unknown,
}

/// Looks a path up in the defaults.
pub(crate) fn find<'a>(defaults: &'a Value, path: &[&str]) -> Key<'a> {
    let mut at = defaults;
    for segment in path {
        at = match at {
            Value::Null => return Key::Open,
            Value::Object(table) if table.is_empty() => return Key::Open,
            Value::Object(table) => match table.get(*segment) {
                Some(value) => value,
                None => return Key::Unknown,
            },
            _ => return Key::Unknown,
        };
    }
    Key::Known(at)
}

/// The known key whose dotted name needs the fewest edits to become `key`; sections are compared with sections too.
pub(crate) fn nearest(defaults: &Value, key: &str) -> Option<String> {
    let mut known = Vec::new();
    collect(defaults, &mut String::new(), &mut known);
    known.into_iter().min_by_key(|candidate| strsim::damerau_levenshtein(candidate, key))
}

fn collect(value: &Value, prefix: &mut String, known: &mut Vec<String>) {
    let Value::Object(table) = value else { return };
    for (name, child) in table {
        let length = prefix.len();
        if length > 0 {
            prefix.push('.');
        }
        prefix.push_str(name);
        known.push(prefix.clone());
        collect(child, prefix, known);
        prefix.truncate(length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn finds_tables_leaves_and_open_places() {
        let defaults = json!({"a": {"b": 1, "none": null, "map": {}}});
        assert_eq!(find(&defaults, &["a", "b"]), Key::Known(&json!(1)));
        assert_eq!(find(&defaults, &["a", "none", "x"]), Key::Open);
        assert_eq!(find(&defaults, &["a", "map", "x", "y"]), Key::Open);
        assert_eq!(find(&defaults, &["a", "b", "c"]), Key::Unknown);
        assert_eq!(find(&defaults, &["b"]), Key::Unknown);
    }

    #[test]
    fn names_the_nearest_key() {
        let defaults = json!({"gateway": {"http_port": 1, "grpc_port": 2}, "router": {"policy": ""}});
        assert_eq!(nearest(&defaults, "gateway.htp_port").as_deref(), Some("gateway.http_port"));
        assert_eq!(nearest(&defaults, "ruoter.policy").as_deref(), Some("router.policy"));
        assert_eq!(nearest(&json!({}), "x"), None);
    }
}
