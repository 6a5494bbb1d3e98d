//! The whole configuration: one section for each service.
use crate::args::{BackendName, ModelArgs, SettingsArgs};
use anyhow::{Context, Result};
use moesaic_types::{KvFormat, WeightFormat};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Everything that `moesaic up` reads.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Which model, and how it runs.
    pub model: Model,
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
    /// Logs and traces.
    pub telemetry: moesaic_telemetry::TelemetryConfig,
}

/// The `[model]` section.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Model {
    /// Folder or .gguf file; empty: the demo model.
    pub path: Option<PathBuf>,
    /// The name that clients use; empty: the folder's or file's name.
    pub name: Option<String>,
    /// `native` or `candle`.
    pub backend: BackendName,
    /// f32, bf16, q8, q4, q4-g64, q4-g128; empty: as stored.
    pub weights: Option<WeightFormat>,
    /// Cached keys and values: f32, bf16 or int8.
    pub kv: KvFormat,
    /// Threads of the maths; 0: all cores.
    pub threads: usize,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            path: None,
            name: None,
            backend: BackendName::Native,
            weights: None,
            kv: KvFormat::default(),
            threads: 0,
        }
    }
}

/// The file that is read where none is named.
const FILE: &str = "moesaic.toml";

/// Reads all layers: defaults, file, environment, flags.
pub fn load(settings: &SettingsArgs, flags: Vec<(String, String)>) -> Result<Config> {
    let (file, required) = match &settings.config {
        Some(file) => (file.clone(), true),
        None => (PathBuf::from(FILE), false),
    };
    let mut sources = moesaic_config::Sources::from_process(Some(file), required);
    for pair in &settings.set {
        let (key, value) = pair.split_once('=').with_context(|| format!("--set {pair}: write SECTION.KEY=VALUE"))?;
        sources.overrides.push((key.to_owned(), value.to_owned()));
    }
    sources.overrides.extend(flags);
    let config: Config = moesaic_config::load(&sources).context("read the configuration")?;
    config.validate()?;
    Ok(config)
}

impl Config {
    /// Checks every section, before a port is bound or a weight is read.
    fn validate(&self) -> moesaic_types::Result<()> {
        self.gateway.validate()?;
        self.router.validate()?;
        self.scheduler.validate()?;
        self.expert_shard.validate()?;
        self.kv_store.validate()
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
        put("threads", self.threads.map(|t| t.to_string()));
        list
    }
}
