//! The scheduler as a process: it loads the model, then answers over gRPC.
use crate::app::Scheduler;
use crate::config::Config;
use crate::experts::ReplicaExperts;
use crate::model::{Source, runner_factory, stage_factory};
use crate::pipeline::{Generation, LateStage, StageOptions, StageServer, Stages, stage_service};
use crate::vocabulary::Vocabulary;
use futures::future::{BoxFuture, FutureExt};
use moesaic_model::ModelConfig;
use moesaic_model::config::Found;
use moesaic_model::decoder::{Part, Progress};
use moesaic_model::generation_config::end_tokens;
use moesaic_model::pipeline::split_layers;
use moesaic_model::source::text_digest;
use moesaic_model::tokenizer::Tokenizer;
use moesaic_service::{Cluster, Doors, Process};
use moesaic_telemetry::TelemetryConfig;
use moesaic_transport::grpc::replica_service;
use moesaic_transport::{ClusterConfig, RemotePrefixStore, serve, stopped};
use moesaic_types::boundary::{DeltaStream, PrefixStore, Replica, ReplicaLoad};
use moesaic_types::cluster::{ReplicaInfo, Role, Service, StageInfo};
use moesaic_types::{Digest, Error, GenerateRequest, RequestId, Result};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tonic::service::Routes;

/// The sections that a scheduler reads.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Which model, and how it runs.
    pub model: ModelConfig,
    /// The engine.
    pub scheduler: Config,
    /// Redis, NATS, and this process's name.
    pub cluster: ClusterConfig,
    /// Logs and traces.
    pub telemetry: TelemetryConfig,
}

impl moesaic_service::Settings for Settings {
    fn validate(&self) -> Result<()> {
        self.model.validate()?;
        self.scheduler.validate()
    }

    fn cluster(&self) -> &ClusterConfig {
        &self.cluster
    }

    fn telemetry(&self) -> &TelemetryConfig {
        &self.telemetry
    }

    fn grpc(&self) -> (&'static str, &str) {
        ("scheduler.grpc", &self.scheduler.grpc)
    }

    fn drain_timeout(&self) -> Duration {
        self.scheduler.drain_timeout.get()
    }
}

/// A scheduler's process.
pub struct SchedulerProcess {
    settings: Settings,
    cluster: Cluster,
    replica: Arc<Late>,
    /// In place of the replica, in a process that has later layers of another's.
    stage: Arc<LateStage>,
    experts: OnceLock<Arc<ReplicaExperts>>,
    /// Of a replica in stages.
    later: OnceLock<Arc<Stages>>,
    loading: watch::Sender<Option<Progress>>,
}

/// The replica, which is there once the model is loaded.
#[derive(Default)]
struct Late(OnceLock<Arc<Scheduler>>);

impl Late {
    fn get(&self) -> Result<&Arc<Scheduler>> {
        self.0.get().ok_or_else(|| Error::unavailable("the model is being loaded; send the request to another replica"))
    }
}

impl Replica for Late {
    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<DeltaStream>> {
        async move { self.get()?.generate(request).await }.boxed()
    }

    fn enough(&self, id: &RequestId) {
        if let Ok(scheduler) = self.get() {
            scheduler.enough(id);
        }
    }

    fn load(&self) -> BoxFuture<'_, Result<ReplicaLoad>> {
        async move { self.get()?.load().await }.boxed()
    }
}

impl Process for SchedulerProcess {
    const SERVICE: Service = Service::Scheduler;
    type Settings = Settings;

    async fn new(settings: Settings, cluster: Cluster) -> Result<Self> {
        let (replica, stage, loading) = (Arc::default(), Arc::default(), watch::Sender::default());
        Ok(Self { settings, cluster, replica, stage, experts: OnceLock::new(), later: OnceLock::new(), loading })
    }

    async fn serve(self: Arc<Self>, doors: Doors, stop: watch::Receiver<bool>) -> Result<()> {
        let routes = Routes::new(replica_service(Arc::clone(&self.replica)));
        let routes = routes.add_service(stage_service(Arc::clone(&self.stage)));
        tokio::select! {
            served = serve(routes, doors.listener, doors.socket, stop.clone()) => served,
            // a replica's stream to its stage never ends by itself
            () = stopped(stop), if self.settings.scheduler.stage > 0 => Ok(()),
        }
    }

    async fn prepare(self: Arc<Self>) -> Result<Role> {
        let Settings { model, scheduler: config, .. } = self.settings.clone();
        let looking = model.clone();
        let looked = tokio::task::spawn_blocking(move || Looked::at(&looking)).await;
        let Looked { mut found, text, vocabulary } =
            looked.map_err(|error| Error::internal(format!("open the model: {error}")))??;
        if let Some(rounding) = config.rounding() {
            found.served_as.digest = found.served_as.digest.tagged(&rounding);
        }
        let config = Config { replica: self.cluster.id.to_string(), model_name: model.name_of(&found.path), ..config };
        let loading = self.loading.clone();
        let report = Arc::new(move |progress: Progress| {
            loading.send_replace(Some(progress));
        });
        let experts = Arc::new(ReplicaExperts::start(&config, &found, &self.cluster));
        let experts = Arc::clone(self.experts.get_or_init(|| experts));
        let source = Source { path: found.path.clone(), config: model, report };
        if config.stage > 0 {
            return self.become_stage(&config, found, source, experts).await;
        }
        let later = (config.stages > 1).then(|| {
            let cluster = self.cluster.clone();
            let own = (Arc::clone(&self.cluster.id), Box::new(move || cluster.generation()) as Generation);
            let served = found.served_as.clone();
            let directory = self.cluster.directory(Service::Scheduler);
            let silence = Duration::from_millis(config.stage_silence_ms);
            let options = StageOptions { silence, ..StageOptions::default() };
            let ranges = split_layers(found.spec.layers.len(), config.stages);
            let stages = Stages::new(directory, own, served, ranges, options);
            Arc::clone(self.later.get_or_init(|| Arc::new(stages)))
        });
        if let Some(later) = &later {
            later.reached().await;
        }
        let factory = runner_factory(source, Arc::clone(&experts), later);
        let events = Arc::clone(&self.cluster.events);
        let hasher = found.served_as.hasher();
        let nodes = self.cluster.directory(Service::KvStore);
        let patience = self.settings.cluster.kv_patience();
        let store = RemotePrefixStore::new(nodes, Arc::clone(&self.cluster.metadata), patience);
        let store = Some(Arc::new(store) as Arc<dyn PrefixStore>);
        let scheduler = Scheduler::start(config, factory, vocabulary, hasher, store, Some(events)).await?;
        let max_context = scheduler.info()?.max_context;
        experts.reached().await;
        self.replica.0.get_or_init(|| scheduler);
        Ok(Role::Replica(ReplicaInfo { model: found.served_as, text, max_context }))
    }

    async fn ready(&self) -> Result<()> {
        if let Some(stage) = self.stage.get() {
            return stage.ready().and_then(|()| self.experts_ready());
        }
        match self.replica.0.get() {
            Some(scheduler) => scheduler.ready().and_then(|()| self.experts_ready()),
            None => {
                let far = how_far(*self.loading.borrow());
                let missing = self.experts.get().and_then(|experts| experts.ready().err());
                let mut reasons = vec![far];
                reasons.extend(missing.map(|error| format!("experts: {error}")));
                reasons.extend(self.later.get().and_then(|later| later.peers().err()).map(|error| error.message));
                Err(Error::unavailable(reasons.join("; ")))
            }
        }
    }

    fn live(&self) -> Result<()> {
        if let Some(stage) = self.stage.get() {
            return stage.live();
        }
        self.replica.0.get().map_or(Ok(()), |scheduler| scheduler.live())
    }

    async fn load(&self) -> Option<ReplicaLoad> {
        self.replica.load().await.ok()
    }

    async fn drain(&self, deadline: Instant) -> bool {
        match self.replica.0.get() {
            Some(scheduler) => scheduler.drain(deadline).await,
            None => true,
        }
    }
}

impl SchedulerProcess {
    fn experts_ready(&self) -> Result<()> {
        self.experts.get().map_or(Ok(()), |experts| experts.ready())
    }

    /// Loads later layers for another process's replica.
    async fn become_stage(
        &self,
        config: &Config,
        found: Found,
        source: Source,
        experts: Arc<ReplicaExperts>,
    ) -> Result<Role> {
        let ranges = split_layers(found.spec.layers.len(), config.stages);
        let layers = ranges[config.stage].clone();
        let server =
            StageServer::start(layers.clone(), &config.stage_of, stage_factory(source, Arc::clone(&experts), layers))?;
        self.stage.set(Arc::clone(&server));
        server.loaded().await?;
        experts.reached().await;
        let (replica, stages) = (config.stage_of.as_str().into(), config.stages);
        Ok(Role::Stage(StageInfo { model: found.served_as, replica, stage: config.stage, stages }))
    }
}

/// What is known of the model before it is loaded.
struct Looked {
    found: Found,
    text: Digest,
    vocabulary: Vocabulary,
}

impl Looked {
    fn at(model: &ModelConfig) -> moesaic_model::Result<Self> {
        let found = model.look()?;
        let tokenizer = Tokenizer::open(&found.path)?;
        let eos = end_tokens(&found.path, found.spec.vocab, &tokenizer)?;
        let text = text_digest(&found.path)?;
        let vocabulary = Vocabulary::new(&tokenizer, found.spec.vocab, eos);
        Ok(Self { found, text, vocabulary })
    }
}

fn how_far(progress: Option<Progress>) -> String {
    match progress {
        None => "the model is being opened".into(),
        Some(Progress { part, layers_done, layers_total }) => {
            let what = match part {
                Part::Decoder => "layers",
                Part::Experts => "experts of layers",
            };
            format!("the model is being loaded: {what} {layers_done} of {layers_total}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loading_says_how_far_it_is() {
        assert!(how_far(None).contains("opened"));
        let progress = Progress { part: Part::Experts, layers_done: 3, layers_total: 24 };
        assert!(how_far(Some(progress)).ends_with("experts of layers 3 of 24"));
    }

    #[tokio::test]
    async fn a_replica_that_is_not_loaded_refuses_so_that_others_are_asked() {
        let error = Late::default().load().await.unwrap_err();
        assert_eq!(error.code, moesaic_types::ErrorCode::Unavailable);
    }
}
