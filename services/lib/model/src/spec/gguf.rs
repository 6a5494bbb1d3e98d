//! Reads the architecture from GGUF metadata.
use super::ModelSpec;
use crate::{Error, Result};
use std::path::Path;

/// Reads a `.gguf` file's metadata.
pub fn read_file(path: &Path) -> Result<ModelSpec> {
    Err(Error::Corrupt { path: path.to_owned(), reason: "GGUF files are not supported yet".into() })
}
