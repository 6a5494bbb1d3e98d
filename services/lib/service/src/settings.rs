//! The layers of a configuration, of which a service reads its own sections.
use crate::args::SettingsArgs;
use moesaic_config::{HumanDuration, Sources};
use moesaic_types::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::PathBuf;

/// All sections that there are: one file and one environment may serve all services.
pub const SECTIONS: &[&str] =
    &["model", "gateway", "router", "scheduler", "expert_shard", "kv_store", "cluster", "telemetry"];

/// What it means that an option is not set, by its key.
pub const UNSET: &[(&str, &str)] = &[
    ("model.path", "the demo model"),
    ("model.name", "the folder's or file's name"),
    ("model.weights", "as stored; f32, bf16, q8, q4, q4-g64 or q4-g128"),
    ("scheduler.kv_blocks", "as many blocks of 64 tokens as kv_memory_bytes holds"),
    (
        "scheduler.kv_memory_bytes",
        "two requests of the model's context, at most half the available memory, at least 512MiB",
    ),
    ("kv_store.disk_folder", "no disk tier, RAM alone"),
    ("cluster.socket_folder", "no Unix socket, TCP alone"),
    ("telemetry.otlp_endpoint", "no traces are sent"),
    ("telemetry.service_name", "moesaic"),
];

/// The file that is read where none is named.
const FILE: &str = "moesaic.toml";

/// The longest time that a process may take to end.
const LONGEST_DRAIN: HumanDuration = HumanDuration::from_secs(24 * 60 * 60);

/// Reads all layers: defaults, file, environment, `--set`, then `flags` (keys and values). Sections of [`SECTIONS`]
/// that `T` does not have are passed over in the file and the environment; other unknown ones are errors.
///
/// # Errors
/// `InvalidArgument` naming the key and who set it.
pub fn load<T: Serialize + DeserializeOwned + Default>(args: &SettingsArgs, flags: Vec<(String, String)>) -> Result<T> {
    let (file, required) = match &args.config {
        Some(file) => (file.clone(), true),
        None => (PathBuf::from(FILE), false),
    };
    let mut sources = Sources { others: SECTIONS, ..Sources::from_process(Some(file), required) };
    for pair in &args.set {
        let wrong = || Error::invalid("set", format!("--set {pair}: write SECTION.KEY=VALUE"));
        let (key, value) = pair.split_once('=').ok_or_else(wrong)?;
        sources.overrides.push((key.to_owned(), value.to_owned()));
    }
    sources.overrides.extend(flags);
    moesaic_config::load(&sources).map_err(|error| Error::invalid("config", error.to_string()))
}

/// Checks a section's `drain_timeout`.
///
/// # Errors
/// `InvalidArgument` naming the field and its limits.
pub fn check_drain(section: &str, drain_timeout: HumanDuration) -> Result<()> {
    if drain_timeout.get() > LONGEST_DRAIN.get() {
        let name = format!("{section}.drain_timeout");
        let message = format!("{name} is {drain_timeout}; use 0s to {LONGEST_DRAIN}");
        return Err(Error::invalid(name, message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Own {
        router: Router,
    }

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Router {
        mailbox: usize,
    }

    fn read(content: &str, set: &[&str]) -> Result<Own> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("shared.toml");
        std::fs::write(&file, content).unwrap();
        let set = set.iter().map(|pair| (*pair).to_owned()).collect();
        load(&SettingsArgs { config: Some(file), set }, Vec::new())
    }

    #[test]
    fn own_sections_are_strict_others_are_passed_over_and_unknown_ones_refused() {
        let own = read("[router]\nmailbox = 7\n[scheduler]\nanything = 1\n[cluster]\nid = 'x'\n", &[]);
        assert_eq!(own, Ok(Own { router: Router { mailbox: 7 } }));
        assert_eq!(read("", &["router.mailbox=8"]), Ok(Own { router: Router { mailbox: 8 } }));
        for (content, set, named) in [
            ("[router]\nmialbox = 7\n", &[][..], "router.mailbox"),
            ("[rooter]\nmailbox = 7\n", &[], "rooter"),
            ("", &["scheduler.token_budget=1"], "scheduler.token_budget"),
            ("", &["router.mailbox"], "SECTION.KEY=VALUE"),
            ("", &["router.mailbox=many"], "router.mailbox"),
        ] {
            let error = read(content, set).unwrap_err();
            assert!(error.message.contains(named), "{error}");
        }
    }

    #[test]
    fn a_drain_that_is_too_long_is_named() {
        assert_eq!(check_drain("router", LONGEST_DRAIN), Ok(()));
        let error = check_drain("router", HumanDuration::from_secs(86_401)).unwrap_err();
        assert_eq!(error.field.as_deref(), Some("router.drain_timeout"));
    }
}
