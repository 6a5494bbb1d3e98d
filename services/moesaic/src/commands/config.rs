//! `moesaic config`: prints the effective configuration.
use crate::{args, config};
use anyhow::{Context, Result};
use std::process::ExitCode;

pub fn run(args: args::Config) -> Result<ExitCode> {
    let config = config::load(&args.settings, Vec::new())?;
    print!("{}", dump(&config, args.service.as_deref())?);
    Ok(ExitCode::SUCCESS)
}

/// All sections, or one.
pub fn dump(config: &config::Config, service: Option<&str>) -> Result<String> {
    let Some(name) = service else { return Ok(moesaic_config::dump(config)) };
    let key = name.replace('-', "_");
    let value = serde_json::to_value(config)?;
    let section = value.get(&key).with_context(|| {
        format!("--service {name}: use model, gateway, router, scheduler, expert_shard, kv_store, cluster or telemetry")
    })?;
    Ok(moesaic_config::dump(&serde_json::json!({ key: section })))
}
