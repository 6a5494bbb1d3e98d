//! Writes a configuration down.
use crate::Error;
use serde::Serialize;
use serde_json::Value as Json;

/// The configuration as TOML; [`load`](crate::load) reads it back. A key without a value stands there as a comment, with
/// what `unset` says of it (by dotted key, as `scheduler.kv_blocks`).
///
/// # Errors
/// `Write` for what TOML cannot express.
pub fn dump<T: Serialize>(config: &T, unset: &[(&str, &str)]) -> Result<String, Error> {
    let failed = |error: &dyn std::fmt::Display| Error::Write(error.to_string());
    let mut text = toml::to_string_pretty(config).map_err(|error| failed(&error))?;
    let json = serde_json::to_value(config).map_err(|error| failed(&error))?;
    comment(&json, "", unset, &mut text);
    Ok(text)
}

/// Adds a comment for each key without a value, after the header of its section.
fn comment(table: &Json, section: &str, unset: &[(&str, &str)], text: &mut String) {
    let mut lines = String::new();
    for (name, value) in table.as_object().into_iter().flatten() {
        let key = if section.is_empty() { name.clone() } else { format!("{section}.{name}") };
        match value {
            Json::Null => {
                let meaning = unset.iter().find(|(known, _)| *known == key).map_or("not set", |(_, meaning)| meaning);
                lines.push_str(&format!("# {name} = # unset: {meaning}\n"));
            }
            other => comment(other, &key, unset, text),
        }
    }
    if lines.is_empty() {
        return;
    }
    let header = format!("[{section}]\n");
    // a header stands at the start of a line
    let found = text.match_indices(&header).find(|(at, _)| *at == 0 || text[..*at].ends_with('\n'));
    match (section, found) {
        ("", _) => text.insert_str(0, &lines),
        (_, Some((at, _))) => text.insert_str(at + header.len(), &lines),
        // a section without any value has no header yet
        (_, None) => text.push_str(&format!("\n{header}{lines}")),
    }
}
