//! `moesaic config`: prints the effective configuration.
use crate::{args, config};
use anyhow::{Result, bail};
use serde::Serialize;
use std::collections::BTreeMap;
use std::process::ExitCode;

pub fn run(args: args::Config) -> Result<ExitCode> {
    let config = config::load(&args.settings, Vec::new())?;
    print!("{}", dump(&config, args.service.as_deref())?);
    Ok(ExitCode::SUCCESS)
}

/// All sections, or one.
pub fn dump(config: &config::Config, service: Option<&str>) -> Result<String> {
    let Some(name) = service else { return Ok(moesaic_config::dump(config, moesaic_service::UNSET)?) };
    match name.replace('-', "_").as_str() {
        "model" => section("model", &config.model),
        "gateway" => section("gateway", &config.gateway),
        "router" => section("router", &config.router),
        "scheduler" => section("scheduler", &config.scheduler),
        "expert_shard" => section("expert_shard", &config.expert_shard),
        "kv_store" => section("kv_store", &config.kv_store),
        "cluster" => section("cluster", &config.cluster),
        "telemetry" => section("telemetry", &config.telemetry),
        _ => bail!(
            "--service {name}: use model, gateway, router, scheduler, expert_shard, kv_store, cluster or telemetry"
        ),
    }
}

fn section<T: Serialize>(name: &str, section: &T) -> Result<String> {
    Ok(moesaic_config::dump(&BTreeMap::from([(name, section)]), moesaic_service::UNSET)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    #[test]
    fn each_section_is_part_of_the_whole_and_can_be_read_back() {
        let config = config::Config::default();
        let whole: toml::Table = toml::from_str(&dump(&config, None).unwrap()).unwrap();
        for name in ["model", "gateway", "router", "scheduler", "expert-shard", "kv_store", "cluster", "telemetry"] {
            let text = dump(&config, Some(name)).unwrap();
            let key = name.replace('-', "_");
            let one: toml::Table = toml::from_str(&text).unwrap();
            assert_eq!(one.keys().collect::<Vec<_>>(), [&key], "{text}");
            assert_eq!(one[&key], whole[&key]);
        }
        assert!(dump(&config, Some("other")).unwrap_err().to_string().contains("kv_store"));
    }

    #[test]
    fn every_option_that_is_not_set_says_what_that_means() {
        let text = dump(&config::Config::default(), None).unwrap();
        assert!(text.contains("# kv_blocks = # unset: "), "{text}");
        assert!(!text.contains("unset: not set"), "{text}");
        assert_eq!(text.matches("# unset: ").count(), moesaic_service::UNSET.len(), "{text}");
    }
}
