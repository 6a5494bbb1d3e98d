//! All services in one process, each behind the same boundary as in a cluster.
use crate::config::Config;
use crate::progress::loading;
use anyhow::{Context, Result};
use moesaic_expert_shard::ExpertShard;
use moesaic_gateway::ServedModel;
use moesaic_gateway::core::Core;
use moesaic_kv_store::KvStore;
use moesaic_model::backend::Backend;
use moesaic_model::decoder::load_experts_of;
use moesaic_model::expert_pool::ExpertPool;
use moesaic_model::source::WeightSource;
use moesaic_model::spec::ModelSpec;
use moesaic_model::{LoadOptions, ModelConfig, config::Found};
use moesaic_router::Router;
use moesaic_scheduler::model::{Experts, Source, runner_factory};
use moesaic_scheduler::{Scheduler, Vocabulary};
use moesaic_transport::MemoryBus;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

/// The services behind the gateway.
pub struct Services {
    /// The replica, to drain.
    pub scheduler: Arc<Scheduler>,
}

/// Loads the model and starts every service; the gateway answers from then on.
pub async fn start(config: &Config, gateway: &Core) -> Result<Services> {
    let model = config.model.clone();
    // files may be slow: the doors answer and signals are seen meanwhile
    let prepared = tokio::task::spawn_blocking(move || prepare(&model)).await;
    let (path, mut served, vocabulary) = prepared.context("read the model")??;
    let hasher = served.hasher.clone();

    let events = Arc::new(MemoryBus::new());
    let store = KvStore::start(&config.kv_store)?;
    let router = Router::start(&config.router, events.clone())?;
    let mut scheduler_config = config.scheduler.clone();
    scheduler_config.model_name = served.id.clone();
    let replica = scheduler_config.replica_id();
    let experts = ShardExperts(config.expert_shard.clone());
    let source = Source { path, config: config.model.clone(), report: Arc::new(loading()) };
    let runner_factory = runner_factory(source, experts, None);
    let scheduler = Scheduler::start(scheduler_config, runner_factory, vocabulary, hasher, Some(store), Some(events))
        .await
        .context("start the scheduler")?;
    router.register(replica, scheduler.clone());
    // a prompt and its answer must fit the KV pool as well as the model
    served.max_context = scheduler.info()?.max_context;
    let engine = scheduler.clone();
    gateway.follow_life(Arc::new(move || engine.live()));
    let lookup = router.clone();
    gateway.serve(vec![Arc::new(served)], router, Arc::new(move |id| lookup.replica(id)));
    Ok(Services { scheduler })
}

/// What the model's files say, weights aside.
fn prepare(model: &ModelConfig) -> Result<(PathBuf, ServedModel, Vocabulary)> {
    let Found { path, spec, served_as, .. } = model.look().context("open the model")?;
    let served = ServedModel::open(&path, model.name_of(&path), &spec, served_as.hasher())?;
    let vocabulary = Vocabulary::new(&served.tokenizer, spec.vocab, served.eos.clone());
    Ok((path, served, vocabulary))
}

/// The experts are those of a shard in this process.
struct ShardExperts(moesaic_expert_shard::Config);

impl Experts for ShardExperts {
    fn pool<B: Backend>(
        &self,
        source: &dyn WeightSource,
        spec: &ModelSpec,
        backend: Arc<B>,
        options: &LoadOptions<'_>,
        layers: Range<usize>,
    ) -> moesaic_model::Result<Arc<dyn ExpertPool<B>>> {
        let store = load_experts_of(source, spec, backend, options, layers)?;
        let shard = ExpertShard::start(&self.0, spec, store)
            .map_err(|error| moesaic_model::Error::Experts { layer: 0, reason: error.to_string() })?;
        Ok(shard)
    }
}
