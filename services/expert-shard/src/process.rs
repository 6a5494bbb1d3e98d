//! The shard as a process: it opens the model's files and waits for the placement that says which experts are its own.
use crate::app::ExpertShard;
use crate::config::Config;
use crate::executor::Executor;
use crate::grpc::{Shard, ShardServer, expert_service};
use crate::leaving;
use crate::library::Library;
use moesaic_model::backend::candle::CandleBackend;
use moesaic_model::backend::{Backend, BackendKind, TensorSlice};
use moesaic_model::config::Found;
use moesaic_model::decoder::ExpertStore;
use moesaic_model::memory::Memory;
use moesaic_model::{ModelConfig, source};
use moesaic_service::{Cluster, Doors, Process};
use moesaic_telemetry::TelemetryConfig;
use moesaic_transport::{ClusterConfig, serve, stopped};
use moesaic_types::cluster::{Role, Service, ShardInfo};
use moesaic_types::{Error, Result};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tonic::service::Routes;

/// The sections that an expert-shard reads.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Which model, and how it runs.
    pub model: ModelConfig,
    /// The shard.
    pub expert_shard: Config,
    /// Redis, NATS, and this process's name.
    pub cluster: ClusterConfig,
    /// Logs and traces.
    pub telemetry: TelemetryConfig,
}

impl moesaic_service::Settings for Settings {
    fn validate(&self) -> Result<()> {
        self.model.validate()?;
        self.expert_shard.validate()
    }

    fn cluster(&self) -> &ClusterConfig {
        &self.cluster
    }

    fn telemetry(&self) -> &TelemetryConfig {
        &self.telemetry
    }

    fn grpc(&self) -> (&'static str, &str) {
        ("expert_shard.grpc", &self.expert_shard.grpc)
    }

    fn drain_timeout(&self) -> Duration {
        self.expert_shard.drain_timeout.get()
    }
}

/// A shard's process.
pub struct ShardProcess {
    settings: Settings,
    cluster: Cluster,
    shard: Arc<Shard>,
    info: OnceLock<ShardInfo>,
}

impl Process for ShardProcess {
    const SERVICE: Service = Service::ExpertShard;
    type Settings = Settings;

    async fn new(settings: Settings, cluster: Cluster) -> Result<Self> {
        Ok(Self { settings, cluster, shard: Arc::default(), info: OnceLock::new() })
    }

    async fn serve(self: Arc<Self>, doors: Doors, stop: watch::Receiver<bool>) -> Result<()> {
        let routes = Routes::new(expert_service(Arc::clone(&self.shard)));
        // streams to schedulers never end by themselves: they are cut when nobody waits for an answer
        let shard = Arc::clone(&self.shard);
        tokio::select! {
            served = serve(routes, doors.listener, doors.socket, stop.clone()) => served,
            () = stopped_and_idle(stop, &shard) => Ok(()),
        }
    }

    async fn prepare(self: Arc<Self>) -> Result<Role> {
        let Settings { model, expert_shard, .. } = self.settings.clone();
        let opened = tokio::task::spawn_blocking(move || open(&model, &expert_shard)).await;
        let (info, shard) = opened.map_err(|error| Error::internal(format!("open the model: {error}")))??;
        self.shard.set(shard);
        self.info.get_or_init(|| info.clone());
        Ok(Role::Shard(info))
    }

    async fn ready(&self) -> Result<()> {
        let shard = self.shard.get()?;
        if shard.epoch() == 0 {
            return Err(Error::unavailable("no experts yet: no router has placed any here"));
        }
        shard.ready()
    }

    fn live(&self) -> Result<()> {
        self.shard.get().map_or(Ok(()), |shard| shard.live())
    }

    /// The router that leads sees that it leaves, and moves what nobody else has; schedulers ask the others then. What
    /// they wait for here is computed.
    async fn drain(&self, deadline: Instant) -> bool {
        let (Ok(shard), Some(info)) = (self.shard.get(), self.info.get()) else { return true };
        let leaving = leaving::handed_over(&self.cluster, info);
        // what is left after a hand-over that does not end is for the last answers
        let until = deadline.checked_sub(LAST_ANSWERS).unwrap_or(deadline);
        if tokio::time::timeout_at(until.into(), leaving).await.is_err() {
            tracing::warn!("nobody took the experts that only this shard has");
        }
        shard.idle_by(deadline).await
    }
}

async fn stopped_and_idle(stop: watch::Receiver<bool>, shard: &Shard) {
    stopped(stop).await;
    if let Ok(shard) = shard.get() {
        shard.idle_by(Instant::now() + LAST_ANSWERS).await;
    }
}

/// How long the last answers may take to be computed after the drain.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

fn open(model: &ModelConfig, config: &Config) -> Result<(ShardInfo, Arc<dyn ShardServer>)> {
    let failed = |error: moesaic_model::Error| Error::invalid("model.path", error.to_string());
    let Found { path, spec, experts, .. } = model.look().map_err(failed)?;
    let source = source::open(&path).map_err(failed)?;
    let threads = model.threads();
    let library = Library { source, spec, weights: model.weights, threads, available: || Memory::now().available };
    let info = ShardInfo { model: experts, group: config.group, rank: config.rank, ranks: config.ranks };
    let shard = match model.backend {
        BackendKind::Native => start(config, model.native(), library)?,
        BackendKind::Candle => start(config, CandleBackend::new(threads).map_err(failed)?, library)?,
    };
    Ok((info, shard))
}

fn start<B: Backend>(config: &Config, backend: B, library: Library) -> Result<Arc<dyn ShardServer>> {
    let slice = TensorSlice { rank: config.rank, ranks: config.ranks };
    let shard = ExpertShard::start(config, &library.spec, ExpertStore::empty(Arc::new(backend), slice))?;
    let executor = Executor::start(Arc::clone(&shard), config.queue, config.max_batch_tokens)?;
    Ok(crate::grpc::server(shard, executor, library))
}
