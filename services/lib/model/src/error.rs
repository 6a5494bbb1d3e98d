//! What can go wrong with a model's files and shapes.
use std::path::PathBuf;

/// An error of loading or running a model. Every message names the file and, where there is one, the tensor or key.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not what its name says, is truncated or contradicts itself.
    #[error("{}: {reason}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        reason: String,
    },
    /// A tensor is missing, or has another shape or type than the configuration says.
    #[error("tensor '{tensor}' in {}: {reason}", path.display())]
    Tensor {
        /// The file or folder.
        path: PathBuf,
        /// The tensor's name in the file.
        tensor: String,
        /// What is wrong.
        reason: String,
    },
    /// A configuration value is missing, impossible or not supported.
    #[error("{}: '{key}': {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong and what is supported.
        reason: String,
    },
    /// Text cannot be tokenized or a chat cannot be rendered.
    #[error("{0}")]
    Text(String),
    /// The device or backend failed.
    #[error("backend {backend}: {reason}")]
    Backend {
        /// Its name.
        backend: &'static str,
        /// What failed.
        reason: String,
    },
    /// A pipeline stage is lost, with its keys and values, or cannot be.
    #[error("pipeline stage: {reason}")]
    Stage {
        /// Which, and why.
        reason: String,
    },
    /// Experts cannot be reached now.
    #[error("experts of layer {layer} unavailable: {reason}")]
    Experts {
        /// The layer.
        layer: usize,
        /// Why.
        reason: String,
    },
}

impl From<Error> for moesaic_types::Error {
    /// Inside a service, all of these but lost experts and stages need a person.
    fn from(error: Error) -> Self {
        match error {
            Error::Experts { .. } | Error::Stage { .. } => Self::unavailable(error.to_string()),
            _ => Self::internal(error.to_string()),
        }
    }
}

/// Shorthand.
pub type Result<T, E = Error> = std::result::Result<T, E>;
