//! The model behind a replica: how an engine loads it, and loads it again after a crash.
use crate::engine::RunnerFactory;
use moesaic_model::backend::candle::CandleBackend;
use moesaic_model::backend::native::NativeBackend;
use moesaic_model::backend::{Backend, BackendKind};
use moesaic_model::decoder::{Progress, load_decoder, load_experts};
use moesaic_model::expert_pool::ExpertPool;
use moesaic_model::source::WeightSource;
use moesaic_model::spec::ModelSpec;
use moesaic_model::{LoadOptions, ModelConfig, Result, Runner, source, spec};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Who executes a replica's experts, on whatever backend it runs.
pub trait Experts: Send + Sync + 'static {
    /// The experts of the model in `source`; asked for again whenever an engine starts.
    ///
    /// # Errors
    /// What loading or reaching them says.
    fn pool<B: Backend>(
        &self,
        source: &dyn WeightSource,
        spec: &ModelSpec,
        backend: Arc<B>,
        options: &LoadOptions<'_>,
    ) -> Result<Arc<dyn ExpertPool<B>>>;
}

/// The replica's own process executes them.
#[derive(Clone, Copy, Debug, Default)]
pub struct OwnExperts;

impl Experts for OwnExperts {
    fn pool<B: Backend>(
        &self,
        source: &dyn WeightSource,
        spec: &ModelSpec,
        backend: Arc<B>,
        options: &LoadOptions<'_>,
    ) -> Result<Arc<dyn ExpertPool<B>>> {
        Ok(Arc::new(load_experts(source, spec, backend, options)?))
    }
}

/// Told how far loading is.
pub type Report = Arc<dyn Fn(Progress) + Send + Sync>;

/// Loads the model at `path` anew at each call: a crashed engine starts from the files.
pub fn runner_factory(path: PathBuf, config: ModelConfig, experts: impl Experts, report: Report) -> RunnerFactory {
    Arc::new(move || match config.backend {
        BackendKind::Native => runner(&path, &config, NativeBackend::new(config.threads()), &experts, &*report),
        BackendKind::Candle => runner(&path, &config, CandleBackend::new(config.threads())?, &experts, &*report),
    })
}

fn runner<B: Backend>(
    path: &Path,
    config: &ModelConfig,
    backend: B,
    experts: &impl Experts,
    report: &dyn Fn(Progress),
) -> Result<Box<dyn Runner>> {
    let source = source::open(path)?;
    let spec = spec::read(path, &*source)?;
    let backend = Arc::new(backend);
    let options =
        LoadOptions { weights: config.weights, kv: config.kv, threads: config.threads(), progress: Some(report) };
    let pool = experts.pool(&*source, &spec, backend.clone(), &options)?;
    Ok(Box::new(load_decoder(&*source, spec, backend, &options, pool)?))
}
