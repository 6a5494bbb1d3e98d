//! What can be wrong with a configuration.
use std::path::PathBuf;

/// A configuration that cannot be used; the message names the key and where it was set.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// No such key.
    #[error("{source_name}: unknown key '{key}'{}", instead(nearest.as_deref(), known))]
    Unknown {
        /// The dotted key.
        key: String,
        /// The file, variable or flag that sets it.
        source_name: String,
        /// The known key that looks most like it, where one does.
        nearest: Option<String>,
        /// The known keys of its section.
        known: Vec<String>,
    },
    /// A value of the wrong type, or out of range.
    #[error("{source_name}: '{key}': {reason}")]
    Invalid {
        /// The dotted key.
        key: String,
        /// The file, variable or flag that sets it.
        source_name: String,
        /// What is wrong.
        reason: String,
    },
    /// The configuration cannot be written as TOML.
    #[error("cannot write the configuration: {0}")]
    Write(String),
    /// The file cannot be read or is no TOML.
    #[error("cannot read configuration file {}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

fn instead(nearest: Option<&str>, known: &[String]) -> String {
    match nearest {
        Some(nearest) => format!(", did you mean '{nearest}'?"),
        None if known.is_empty() => String::new(),
        None => format!("; known are {}", known.join(", ")),
    }
}
