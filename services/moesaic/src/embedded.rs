//! All services in one process, each behind the same boundary as in a cluster.
use crate::args::BackendName;
use crate::config::Config;
use crate::{commands, demo, progress::Bar};
use anyhow::{Context, Result};
use moesaic_expert_shard::ExpertShard;
use moesaic_gateway::ServedModel;
use moesaic_gateway::core::Core;
use moesaic_kv_store::KvStore;
use moesaic_model::backend::Backend;
use moesaic_model::backend::candle::CandleBackend;
use moesaic_model::backend::native::NativeBackend;
use moesaic_model::chat::ChatTemplate;
use moesaic_model::decoder::{Progress, load_decoder, load_experts};
use moesaic_model::generation_config::{GenerationConfig, end_tokens};
use moesaic_model::spec::ModelSpec;
use moesaic_model::tokenizer::Tokenizer;
use moesaic_model::{LoadOptions, Runner, source, spec};
use moesaic_router::Router;
use moesaic_scheduler::{Scheduler, Vocabulary};
use moesaic_transport::MemoryBus;
use moesaic_types::BlockHasher;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// The services behind the gateway.
pub struct Services {
    /// The replica, to drain.
    pub scheduler: Arc<Scheduler>,
}

/// Loads the model and starts every service; the gateway answers from then on.
pub async fn start(config: &Config, gateway: &Core) -> Result<Services> {
    let path = match &config.model.path {
        Some(path) => path.clone(),
        None => demo::find()?,
    };
    let source = source::open(&path).with_context(|| format!("open {}", path.display()))?;
    let model = spec::read(&path, &*source)?;
    let digest = source::digest(&*source)?;
    // "as stored" and a format that happens to be stored may differ, and backends lay blocks out in their own ways
    let stored = if config.model.weights.is_none() { " as stored" } else { "" };
    let served_as = digest.tagged(&format!("{:?} blocks v1{stored}", config.model.backend));
    let weights = config.model.weights.unwrap_or_default();
    let hasher = BlockHasher::new(&served_as, weights, config.model.kv, None);
    let mut served = served(&path, config, &model, hasher.clone())?;
    drop(source);

    let events = Arc::new(MemoryBus::new());
    let store = KvStore::start(&config.kv_store)?;
    let router = Router::start(&config.router, events.clone())?;
    // ids beyond the tokenizer's stand for nothing, and tokens beyond the model's cannot be generated
    let mut token_bytes = served.tokenizer.all_token_bytes().to_vec();
    token_bytes.resize(served.vocab, Vec::new());
    let vocabulary = Vocabulary {
        token_bytes,
        special: (0..served.tokenizer.vocab_size() as u32).map(|id| served.tokenizer.is_special(id)).collect(),
        eos: served.eos.clone(),
    };
    let mut scheduler_config = config.scheduler.clone();
    scheduler_config.model_name = served.id.clone();
    let replica = scheduler_config.replica_id();
    let scheduler = Scheduler::start(
        scheduler_config,
        runner_factory(path, config.clone()),
        vocabulary,
        hasher,
        Some(store),
        Some(events),
    )
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

fn served(path: &Path, config: &Config, model: &ModelSpec, hasher: BlockHasher) -> Result<ServedModel> {
    let tokenizer = Tokenizer::open(path)?;
    let defaults = GenerationConfig::open(path)?;
    let eos = end_tokens(path, model.vocab, &tokenizer)?;
    let template = match ChatTemplate::open(path) {
        Ok(template) => Some(template),
        // a template that is broken is an error: clients would read that there is none
        Err(moesaic_model::Error::Text(reason)) => {
            tracing::warn!(reason, "chat is off");
            None
        }
        Err(error) => return Err(error.into()),
    };
    let file_name = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let file_name = file_name.file_stem().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned());
    Ok(ServedModel {
        id: config.model.name.clone().unwrap_or(file_name),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        max_context: model.max_context,
        vocab: model.vocab,
        eos,
        tokenizer,
        template,
        defaults,
        hasher,
    })
}

/// Loads the model anew at each call: a crashed engine starts from the files.
fn runner_factory(path: PathBuf, config: Config) -> moesaic_scheduler::RunnerFactory {
    Arc::new(move || {
        let threads = match config.model.threads {
            0 => commands::default_threads(),
            threads => threads,
        };
        match config.model.backend {
            BackendName::Native => runner(&path, &config, NativeBackend::new(threads), threads),
            BackendName::Candle => runner(&path, &config, CandleBackend::new(threads)?, threads),
        }
    })
}

fn runner<B: Backend>(
    path: &Path,
    config: &Config,
    backend: B,
    threads: usize,
) -> moesaic_model::Result<Box<dyn Runner>> {
    let source = source::open(path)?;
    let model = spec::read(path, &*source)?;
    let backend = Arc::new(backend);
    let bar = Bar::new("load");
    let report = |progress: Progress| bar.layers(progress);
    let options = LoadOptions { weights: config.model.weights, kv: config.model.kv, threads, progress: Some(&report) };
    let store = load_experts(&*source, &model, backend.clone(), &options)?;
    let shard = ExpertShard::start(&config.expert_shard, &model, store)
        .map_err(|error| moesaic_model::Error::Experts { layer: 0, reason: error.to_string() })?;
    let decoder = load_decoder(&*source, model, backend, &options, shard)?;
    bar.finish();
    Ok(Box::new(decoder))
}
