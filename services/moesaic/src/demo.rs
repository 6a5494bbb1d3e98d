//! Finds the demo model, which is served where no model is named.
use anyhow::{Result, bail};
use std::path::{Path, PathBuf};

const FOLDER: &str = "deploy/models/demo-moe";

/// The demo model's folder: under the working folder or one of its parents, beside the binary (a build tree, or an
/// installation's `share/moesaic`).
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
    bail!(
        "the demo model is not here (looked for {FOLDER} from {} up); name a model with --model DIR|FILE.gguf",
        tried.first().map(|p| p.display().to_string()).unwrap_or_default()
    )
}

fn is_model(folder: &Path) -> bool {
    folder.join("config.json").is_file()
}
