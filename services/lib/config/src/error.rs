//! What can be wrong with a configuration.
use std::path::PathBuf;

/// A configuration that cannot be used; the message names the key and where it was set.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// No such key.
    #[error("{source_name}: unknown key '{key}'{}", nearest.as_ref().map(|k| format!(", did you mean '{k}'?")).unwrap_or_default())]
    Unknown {
        /// The dotted key.
        key: String,
        /// The file, variable or flag that sets it.
        source_name: String,
        /// The known key that looks most like it.
        nearest: Option<String>,
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
    /// The file cannot be read or is no TOML.
    #[error("cannot read configuration file {}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}
