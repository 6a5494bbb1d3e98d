//! The gateway as a process: routers and replicas are those of the cluster.
use crate::app::{Gateway, bind_http};
use crate::config::Config;
use crate::core::Core;
use crate::replicas::{Replicas, Served, choose, explain};
use crate::salt;
use crate::served::ServedModel;
use moesaic_model::ModelConfig;
use moesaic_model::source::text_digest;
use moesaic_model::spec::read_text_side;
use moesaic_service::{Cluster, Doors, Process};
use moesaic_telemetry::TelemetryConfig;
use moesaic_transport::ClusterConfig;
use moesaic_transport::grpc::Routers;
use moesaic_types::cluster::{Role, ServedAs, Service};
use moesaic_types::{Digest, Error, ReplicaId, Result};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

/// How often the secret is looked at: Redis may have lost it.
const SALT_INTERVAL: Duration = Duration::from_secs(2);

/// The sections that a gateway reads.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Which model: its tokenizer and template are read here, its weights are not.
    pub model: ModelConfig,
    /// The doors.
    pub gateway: Config,
    /// Redis, NATS, and this process's name.
    pub cluster: ClusterConfig,
    /// Logs and traces.
    pub telemetry: TelemetryConfig,
}

impl moesaic_service::Settings for Settings {
    fn validate(&self) -> Result<()> {
        self.gateway.validate()
    }

    fn cluster(&self) -> &ClusterConfig {
        &self.cluster
    }

    fn telemetry(&self) -> &TelemetryConfig {
        &self.telemetry
    }

    fn grpc(&self) -> (&'static str, &str) {
        ("gateway.grpc", &self.gateway.grpc)
    }

    fn drain_timeout(&self) -> Duration {
        self.gateway.drain_timeout.get()
    }
}

/// A gateway's process.
pub struct GatewayProcess {
    settings: Settings,
    cluster: Cluster,
    core: Arc<Core>,
    /// Until it is served.
    http: Mutex<Option<TcpListener>>,
    routers: Arc<Routers>,
    replicas: Arc<Replicas>,
}

impl Process for GatewayProcess {
    const SERVICE: Service = Service::Gateway;
    const MUST_BE_SEEN: bool = false;
    type Settings = Settings;

    async fn new(settings: Settings, cluster: Cluster) -> Result<Self> {
        let http = bind_http(&settings.gateway).await?;
        let core = Arc::new(Core::new(settings.gateway.clone()));
        let routers = Arc::new(Routers::new(cluster.directory(Service::Router)));
        let replicas = Arc::new(Replicas::new(cluster.directory(Service::Scheduler)));
        Ok(Self { settings, cluster, core, http: Mutex::new(Some(http)), routers, replicas })
    }

    async fn serve(self: Arc<Self>, doors: Doors, stop: watch::Receiver<bool>) -> Result<()> {
        let http = self.http.lock().unwrap_or_else(PoisonError::into_inner).take();
        let http = http.ok_or_else(|| Error::internal("the gateway is served already"))?;
        let gateway = Gateway::new(Arc::clone(&self.core), http, doors.listener);
        tracing::info!(http = %gateway.http_address()?, "the doors are open");
        gateway.run(stop).await
    }

    async fn prepare(self: Arc<Self>) -> Result<Role> {
        let model = self.settings.model.clone();
        let opened = tokio::task::spawn_blocking(move || TextSide::open(&model)).await;
        let text_side = opened.map_err(|error| Error::internal(format!("open the model: {error}")))??;
        if self.settings.gateway.salt_secret.expose().is_empty() && !self.settings.gateway.share_prefixes {
            self.core.wait_for("the secret of tenants' salts was not read yet: redis does not answer");
            self.share_salt().await;
        }
        let (told, mut is_served) = watch::channel(false);
        let (core, routers, replicas) = (Arc::downgrade(&self.core), self.routers.clone(), self.replicas.clone());
        tokio::spawn(follow(core, text_side, routers, replicas, told));
        let served = is_served.wait_for(|is_served| *is_served).await.map(|_| ());
        served.map_err(|_| Error::internal("nobody looks for replicas any longer"))?;
        Ok(Role::Plain)
    }

    async fn ready(&self) -> Result<()> {
        let missing = match self.core.ready().await {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        Err(self.replicas.directory().view().explain(missing))
    }
}

impl GatewayProcess {
    /// Agrees with the other gateways on the secret, and keeps to it.
    async fn share_salt(&self) {
        let (metadata, core) = (Arc::clone(&self.cluster.metadata), Arc::downgrade(&self.core));
        let mut own = self.core.salt_secret();
        let (agreed, mut first) = watch::channel(false);
        // ends with the gateway
        tokio::spawn(async move {
            let mut ticks = interval(SALT_INTERVAL);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                let Some(core) = core.upgrade() else { return };
                match salt::agree(&*metadata, &own).await {
                    Ok(secret) => {
                        own = secret.to_vec();
                        core.set_salt_secret(own.clone());
                        agreed.send_replace(true);
                    }
                    // the cluster's other watchers tell the log
                    Err(error) => tracing::debug!(%error, "read the secret of tenants' salts"),
                }
            }
        });
        // an error means that the gateway is gone
        let _ = first.wait_for(|agreed| *agreed).await;
    }
}

/// The model's text side.
struct TextSide {
    /// With the model's own context, and names of blocks that are nobody's.
    model: ServedModel,
    digest: Digest,
}

impl TextSide {
    fn open(model: &ModelConfig) -> moesaic_model::Result<Self> {
        let path = model.find()?;
        let digest = text_digest(&path)?;
        let nobody = ServedAs { digest, weights: None, kv: model.kv };
        let model = ServedModel::open(&path, model.name_of(&path), &read_text_side(&path)?, nobody.hasher())?;
        Ok(Self { model, digest })
    }
}

/// Serves what the replicas serve, as they come and go, until the gateway is dropped.
async fn follow(
    core: Weak<Core>,
    TextSide { model, digest }: TextSide,
    routers: Arc<Routers>,
    replicas: Arc<Replicas>,
    is_served: watch::Sender<bool>,
) {
    let mut views = replicas.directory().watch();
    let mut now: Option<Served> = None;
    loop {
        let view = Arc::clone(&views.borrow_and_update());
        let Some(core) = core.upgrade() else { return };
        match choose(&view, &digest, now.as_ref().map(|now| &now.model)) {
            None => core.wait_for(&explain(&view, &digest)),
            Some(next) if now.as_ref() == Some(&next) => {}
            Some(Served { model: served_as, max_context }) => {
                let served = ServedModel { hasher: served_as.hasher(), max_context, ..model.clone() };
                tracing::info!(model = served.id, max_context, fingerprint = served.fingerprint(), "serving");
                let (reached, looked_up) = (Arc::clone(&replicas), served_as.clone());
                let lookup = Arc::new(move |id: &ReplicaId| reached.get(id, &looked_up));
                core.serve(vec![Arc::new(served)], routers.clone(), lookup);
                now = Some(Served { model: served_as, max_context });
                is_served.send_replace(true);
            }
        }
        drop(core);
        if views.changed().await.is_err() {
            return;
        }
    }
}
