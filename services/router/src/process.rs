//! The router as a process: it follows the directory of schedulers and answers over gRPC.
use crate::app::Router;
use crate::config::Config;
use crate::grpc::{self, Following};
use crate::placement::PlacementLeader;
use moesaic_service::{Cluster, Doors, Process};
use moesaic_telemetry::TelemetryConfig;
use moesaic_transport::membership::View;
use moesaic_transport::{ClusterConfig, serve};
use moesaic_types::Result;
use moesaic_types::boundary::Placer;
use moesaic_types::cluster::{Role, Service};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::time::timeout_at;

/// The sections that a router reads.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Placement of requests.
    pub router: Config,
    /// Redis, NATS, and this process's name.
    pub cluster: ClusterConfig,
    /// Logs and traces.
    pub telemetry: TelemetryConfig,
}

impl moesaic_service::Settings for Settings {
    fn validate(&self) -> Result<()> {
        self.router.validate()
    }

    fn cluster(&self) -> &ClusterConfig {
        &self.cluster
    }

    fn telemetry(&self) -> &TelemetryConfig {
        &self.telemetry
    }

    fn grpc(&self) -> (&'static str, &str) {
        ("router.grpc", &self.router.grpc)
    }

    fn drain_timeout(&self) -> Duration {
        self.router.drain_timeout.get()
    }
}

/// A router's process.
pub struct RouterProcess {
    router: Arc<Router>,
    schedulers: watch::Receiver<Arc<View>>,
    _following: [Following; 2],
    /// Leads the placement of experts, or waits to.
    leader: PlacementLeader,
}

impl Process for RouterProcess {
    const SERVICE: Service = Service::Router;
    type Settings = Settings;

    async fn new(settings: Settings, cluster: Cluster) -> Result<Self> {
        let router = Router::start(&settings.router, Arc::clone(&cluster.events))?;
        let directory = cluster.directory(Service::Scheduler);
        let schedulers = directory.watch();
        let stores = grpc::follow_stores(&router, cluster.directory(Service::KvStore));
        let following = [grpc::follow(&router, directory), stores];
        let (metadata, events) = (Arc::clone(&cluster.metadata), Arc::clone(&cluster.events));
        let shards = cluster.directory(Service::ExpertShard);
        let leader = PlacementLeader::start(&settings.router.placement, metadata, events, shards)?;
        Ok(Self { router, schedulers, _following: following, leader })
    }

    async fn serve(self: Arc<Self>, doors: Doors, stop: watch::Receiver<bool>) -> Result<()> {
        let routes = grpc::services(Arc::clone(&self.router));
        serve(routes, doors.listener, doors.socket, stop).await
    }

    async fn prepare(self: Arc<Self>) -> Result<Role> {
        Ok(Role::Plain)
    }

    async fn ready(&self) -> Result<()> {
        let nobody = match self.router.ready().await {
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        Err(self.schedulers.borrow().explain(nobody))
    }

    /// Leaves the lead to another router; requests are placed until the server stops.
    async fn drain(&self, deadline: Instant) -> bool {
        timeout_at(deadline.into(), self.leader.stop()).await.is_ok()
    }
}
