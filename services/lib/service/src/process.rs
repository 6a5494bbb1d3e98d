//! What a service says of itself to be run as a process.
use crate::cluster::Cluster;
use crate::doors::Doors;
use moesaic_telemetry::TelemetryConfig;
use moesaic_transport::ClusterConfig;
use moesaic_types::Result;
use moesaic_types::boundary::ReplicaLoad;
use moesaic_types::cluster::{Role, Service};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// The sections that a service reads.
pub trait Settings: Clone + Default + Serialize + DeserializeOwned + Send + Sync + 'static {
    /// Checks all sections, before a port is bound.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field and its limits.
    fn validate(&self) -> Result<()>;
    /// The cluster.
    fn cluster(&self) -> &ClusterConfig;
    /// Logs and traces.
    fn telemetry(&self) -> &TelemetryConfig;
    /// The key that has the gRPC address, for messages, and the address.
    fn grpc(&self) -> (&'static str, &str);
    /// How long running work may go on after the signal to stop.
    fn drain_timeout(&self) -> Duration;
}

/// A service, as its process runs it: made, served while it prepares, drained, dropped.
pub trait Process: Send + Sync + Sized + 'static {
    /// Which service it is.
    const SERVICE: Service;
    /// Whether it does its job only where others see it in the cluster.
    const MUST_BE_SEEN: bool = true;
    /// Its sections.
    type Settings: Settings;

    /// Puts its parts together and binds what else it needs. Loads nothing, and waits for nobody.
    ///
    /// # Errors
    /// `InvalidArgument` naming the setting: the process ends with it.
    fn new(settings: Self::Settings, cluster: Cluster) -> impl Future<Output = Result<Self>> + Send;

    /// Answers calls until `stop` is true, then ends the running ones. Begins at once: a call before `prepare` ended is
    /// refused with `Unavailable`.
    ///
    /// # Errors
    /// When a door fails: the process ends with it.
    fn serve(self: Arc<Self>, doors: Doors, stop: watch::Receiver<bool>) -> impl Future<Output = Result<()>> + Send;

    /// Makes it able to do its job, and says what others must know of it. May be dropped at any await.
    ///
    /// # Errors
    /// What must be put right by a person: the process ends with it. What may come back is waited for.
    fn prepare(self: Arc<Self>) -> impl Future<Output = Result<Role>> + Send;

    /// Whether it could do its job now. Asked once it is prepared.
    ///
    /// # Errors
    /// With the reason.
    fn ready(&self) -> impl Future<Output = Result<()>> + Send;

    /// Whether the process can still recover by itself.
    ///
    /// # Errors
    /// With the reason why it must be restarted.
    fn live(&self) -> Result<()> {
        Ok(())
    }

    /// How busy it is, where that is of use to others.
    fn load(&self) -> impl Future<Output = Option<ReplicaLoad>> + Send {
        async { None }
    }

    /// Takes no new work and waits until what it has is done; whether it was by the deadline. Calls are still answered.
    fn drain(&self, _deadline: Instant) -> impl Future<Output = bool> + Send {
        async { true }
    }
}
