//! The whole configuration: one section for each service.
use crate::args::ModelArgs;
use anyhow::{Context, Result};
use moesaic_model::ModelConfig;
use moesaic_service::SettingsArgs;
use moesaic_transport::ClusterConfig;
use serde::{Deserialize, Serialize};

/// Everything that `moesaic up` reads.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Which model, and how it runs.
    pub model: ModelConfig,
    /// The door: HTTP and gRPC.
    pub gateway: moesaic_gateway::Config,
    /// Placement of requests.
    pub router: moesaic_router::Config,
    /// The engine.
    pub scheduler: moesaic_scheduler::Config,
    /// Experts.
    pub expert_shard: moesaic_expert_shard::Config,
    /// Stored prefix blocks.
    pub kv_store: moesaic_kv_store::Config,
    /// The cluster's servers, for the services that run as processes of their own.
    pub cluster: ClusterConfig,
    /// Logs and traces.
    pub telemetry: moesaic_telemetry::TelemetryConfig,
}

/// Reads all layers: defaults, file, environment, flags.
pub fn load(settings: &SettingsArgs, flags: Vec<(String, String)>) -> Result<Config> {
    let config: Config = moesaic_service::load(settings, flags).context("read the configuration")?;
    config.validate()?;
    Ok(config)
}

impl Config {
    /// Checks every section, before a port is bound or a weight is read.
    fn validate(&self) -> moesaic_types::Result<()> {
        self.model.validate()?;
        self.gateway.validate()?;
        self.router.validate()?;
        self.scheduler.validate()?;
        self.expert_shard.validate()?;
        self.kv_store.validate()?;
        self.cluster.validate()
    }
}

impl ModelArgs {
    /// The flags as overrides of the `[model]` section.
    pub fn overrides(&self) -> Vec<(String, String)> {
        let mut list = Vec::new();
        let mut put = |key: &str, value: Option<String>| list.extend(value.map(|v| (format!("model.{key}"), v)));
        put("path", self.model.as_ref().map(|p| p.display().to_string()));
        put("backend", self.backend.map(|b| format!("{b:?}").to_lowercase()));
        put("weights", self.weights.map(|w| w.to_string()));
        put("kv", self.kv.map(|k| k.to_string()));
        put("activations", self.activations.map(|a| format!("{a:?}").to_lowercase()));
        put("threads", self.threads.map(|t| t.to_string()));
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_section_is_known_to_all_services() {
        let whole = serde_json::to_value(Config::default()).expect("plain data");
        let sections: Vec<&str> = whole.as_object().expect("a table").keys().map(String::as_str).collect();
        assert_eq!(sections, moesaic_service::SECTIONS);
    }
}
