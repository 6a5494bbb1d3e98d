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

/// What an error says instead of an unknown key: the known key that was probably meant, and the keys beside it.
pub(crate) struct Hint {
    pub(crate) nearest: Option<String>,
    pub(crate) known: Vec<String>,
}

/// The known keys of `key`'s section (of the whole, where the section is unknown too), and the one of them that needs
/// the fewest edits to become `key`; none that would have to change in more than every second letter.
pub(crate) fn hint(defaults: &Value, key: &str) -> Hint {
    let section = key.rsplit_once('.').map(|(section, _)| section);
    let path: Vec<&str> = section.unwrap_or_default().split('.').collect();
    let inside = section.and_then(|section| match find(defaults, &path) {
        Key::Known(Value::Object(table)) => Some(table.keys().map(|name| format!("{section}.{name}")).collect()),
        _ => None,
    });
    let known: Vec<String> = match inside {
        Some(known) => known,
        None if section.is_none() => defaults.as_object().into_iter().flatten().map(|(name, _)| name.clone()).collect(),
        None => {
            let mut known = Vec::new();
            collect(defaults, &mut String::new(), &mut known);
            let nearest = known.into_iter().min_by_key(|candidate| strsim::damerau_levenshtein(candidate, key));
            return Hint { nearest, known: Vec::new() };
        }
    };
    let name = |key: &str| key.rsplit_once('.').map_or(key, |(_, name)| name).to_owned();
    let wanted = name(key);
    let edits = |candidate: &String| strsim::damerau_levenshtein(&name(candidate), &wanted);
    let nearest =
        known.iter().filter(|candidate| edits(candidate) * 2 <= wanted.len()).min_by_key(|c| edits(c)).cloned();
    Hint { nearest, known }
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
    fn hints_at_the_keys_of_the_same_section() {
        let defaults = json!({"gateway": {"http_port": 1, "grpc_port": 2}, "router": {"policy": ""}});
        assert_eq!(hint(&defaults, "gateway.htp_port").nearest.as_deref(), Some("gateway.http_port"));
        assert_eq!(hint(&defaults, "ruoter.policy").nearest.as_deref(), Some("router.policy"));
        assert_eq!(hint(&defaults, "ruoter").nearest.as_deref(), Some("router"));
        let far = hint(&defaults, "gateway.foo");
        assert_eq!((far.nearest, far.known), (None, vec!["gateway.http_port".into(), "gateway.grpc_port".into()]));
        assert_eq!(hint(&json!({}), "x").nearest, None);
    }
}
