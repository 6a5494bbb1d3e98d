//! `moesaic config`: prints the effective configuration.
use crate::{args, config};
use anyhow::{Context, Result};
use std::process::ExitCode;

pub fn run(args: args::Config) -> Result<ExitCode> {
    let config = config::load(&args.settings, &[])?;
    let text = match &args.service {
        None => moesaic_config::dump(&config),
        Some(name) => {
            let value = serde_json::to_value(&config)?;
            let key = name.replace('-', "_");
            let section = value.get(&key).with_context(|| {
                format!("--service {name}: use model, gateway, router, scheduler, expert_shard, kv_store or telemetry")
            })?;
            moesaic_config::dump(&serde_json::json!({ key: section }))
        }
    };
    print!("{text}");
    Ok(ExitCode::SUCCESS)
}
