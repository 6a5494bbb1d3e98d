//! Finds the demo model, which is served where no model is named.
use crate::{Error, Result};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

const FOLDER: &str = "deploy/models/demo-moe";

/// The demo model's folder: under the working folder or one of its parents, beside the binary (a build tree, or an
/// installation's `share/moesaic`).
///
/// # Errors
/// `Io`, saying how to name a model, when it is not there.
pub fn find() -> Result<PathBuf> {
    let here = std::env::current_dir().ok();
    let binary = std::env::current_exe().ok();
    let starts = here.iter().map(PathBuf::as_path).chain(binary.iter().filter_map(|b| b.parent()));
    let mut tried = Vec::new();
    for start in starts {
        for folder in start.ancestors() {
            for place in [folder.join(FOLDER), folder.join("share/moesaic/models/demo-moe")] {
                if is_model(&place) {
                    return Ok(place);
                }
                tried.push(place);
            }
        }
    }
    let path = tried.into_iter().next().unwrap_or_else(|| FOLDER.into());
    let reason = format!(
        "the demo model is not here (looked for {FOLDER} from there up); name a model: --model DIR|FILE.gguf, or model.path"
    );
    Err(Error::Io { path, source: std::io::Error::new(ErrorKind::NotFound, reason) })
}

fn is_model(folder: &Path) -> bool {
    folder.join("config.json").is_file()
}
