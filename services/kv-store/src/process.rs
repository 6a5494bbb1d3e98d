//! The kv-store as a process.
use crate::app::KvStore;
use crate::cluster::{Cluster, Joined};
use crate::config::Config;
use crate::grpc::kv_service;
use moesaic_service::{Doors, Process};
use moesaic_telemetry::TelemetryConfig;
use moesaic_transport::{ClusterConfig, serve};
use moesaic_types::Result;
use moesaic_types::cluster::{Role, Service};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::time::timeout_at;
use tonic::service::Routes;

/// The sections that a kv-store reads.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Stored prefix blocks.
    pub kv_store: Config,
    /// Redis, NATS, and this process's name.
    pub cluster: ClusterConfig,
    /// Logs and traces.
    pub telemetry: TelemetryConfig,
}

impl moesaic_service::Settings for Settings {
    fn validate(&self) -> Result<()> {
        self.kv_store.validate()
    }

    fn cluster(&self) -> &ClusterConfig {
        &self.cluster
    }

    fn telemetry(&self) -> &TelemetryConfig {
        &self.telemetry
    }

    fn grpc(&self) -> (&'static str, &str) {
        ("kv_store.grpc", &self.kv_store.grpc)
    }

    fn drain_timeout(&self) -> Duration {
        self.kv_store.drain_timeout.get()
    }
}

/// A kv-store's process.
pub struct KvStoreProcess {
    store: Arc<KvStore>,
    joined: Arc<Joined>,
    config: Config,
}

impl Process for KvStoreProcess {
    const SERVICE: Service = Service::KvStore;
    type Settings = Settings;

    async fn new(settings: Settings, cluster: moesaic_service::Cluster) -> Result<Self> {
        let Settings { kv_store: config, cluster: cluster_config, .. } = settings;
        let store = KvStore::start(&config)?;
        let cluster = Cluster {
            metadata: Arc::clone(&cluster.metadata),
            events: Arc::clone(&cluster.events),
            directory: cluster.directory(Service::KvStore),
            id: cluster.id,
            replication: config.replication,
            replication_queue: config.replication_queue,
            patience: cluster_config.kv_patience(),
        };
        let joined = Joined::start(&store, cluster);
        Ok(Self { store, joined, config })
    }

    async fn serve(self: Arc<Self>, doors: Doors, stop: watch::Receiver<bool>) -> Result<()> {
        let service = kv_service(Arc::clone(&self.store), Some(Arc::clone(&self.joined)), &self.config);
        let routes = Routes::new(service);
        serve(routes, doors.listener, doors.socket, stop).await
    }

    async fn prepare(self: Arc<Self>) -> Result<Role> {
        Ok(Role::Plain)
    }

    async fn ready(&self) -> Result<()> {
        self.store.size().await.map(|_| ())
    }

    async fn drain(&self, deadline: Instant) -> bool {
        match timeout_at(deadline.into(), self.store.save()).await {
            Ok(Ok(blocks)) => {
                tracing::info!(blocks, "wrote to disk what was in RAM alone");
                true
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, "what is in RAM alone is not written to disk, and is computed again");
                true
            }
            Err(_) => false,
        }
    }
}
