//! The kv-store as a process.
use crate::app::KvStore;
use crate::config::Config;
use moesaic_service::{Cluster, Doors, Process};
use moesaic_telemetry::TelemetryConfig;
use moesaic_transport::grpc::prefix_service;
use moesaic_transport::{ClusterConfig, serve};
use moesaic_types::Result;
use moesaic_types::cluster::{Role, Service};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
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
}

impl Process for KvStoreProcess {
    const SERVICE: Service = Service::KvStore;
    type Settings = Settings;

    async fn new(settings: Settings, _cluster: Cluster) -> Result<Self> {
        Ok(Self { store: KvStore::start(&settings.kv_store)? })
    }

    async fn serve(self: Arc<Self>, doors: Doors, stop: watch::Receiver<bool>) -> Result<()> {
        let routes = Routes::new(prefix_service(Arc::clone(&self.store)));
        serve(routes, doors.listener, doors.socket, stop).await
    }

    async fn prepare(self: Arc<Self>) -> Result<Role> {
        Ok(Role::Plain)
    }

    async fn ready(&self) -> Result<()> {
        self.store.size().await.map(|_| ())
    }
}
