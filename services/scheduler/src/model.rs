//! The model behind a replica: how an engine loads it, and loads it again after a crash.
use crate::engine::RunnerFactory;
use crate::pipeline::{StageFactory, Stages};
use moesaic_model::backend::candle::CandleBackend;
use moesaic_model::backend::{Backend, BackendKind};
use moesaic_model::decoder::{Progress, load_decoder, load_experts_of, load_first_stage, load_stage};
use moesaic_model::expert_pool::ExpertPool;
use moesaic_model::pipeline::StageRunner;
use moesaic_model::source::WeightSource;
use moesaic_model::spec::ModelSpec;
use moesaic_model::{LoadOptions, ModelConfig, Result, Runner, source, spec};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

/// Who executes a replica's experts, on whatever backend it runs.
pub trait Experts: Send + Sync + 'static {
    /// The experts of these layers of the model in `source`; asked for again whenever an engine starts.
    ///
    /// # Errors
    /// What loading or reaching them says.
    fn pool<B: Backend>(
        &self,
        source: &dyn WeightSource,
        spec: &ModelSpec,
        backend: Arc<B>,
        options: &LoadOptions<'_>,
        layers: Range<usize>,
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
        layers: Range<usize>,
    ) -> Result<Arc<dyn ExpertPool<B>>> {
        Ok(Arc::new(load_experts_of(source, spec, backend, options, layers)?))
    }
}

/// Told how far loading is.
pub type Report = Arc<dyn Fn(Progress) + Send + Sync>;

/// Which model, where, and who hears how far loading is.
#[derive(Clone)]
pub struct Source {
    /// Its folder or file.
    pub path: PathBuf,
    /// How it runs.
    pub config: ModelConfig,
    /// Hears it.
    pub report: Report,
}

/// Loads the model anew at each call: a crashed engine starts from the files. Where there are later stages the engine
/// has the first layers, and what is before the first and after the last.
pub fn runner_factory(from: Source, experts: impl Experts, later: Option<Arc<Stages>>) -> RunnerFactory {
    Arc::new(move || match from.config.backend {
        BackendKind::Native => runner(&from, from.config.native(), &experts, later.as_deref()),
        BackendKind::Candle => runner(&from, CandleBackend::new(from.config.threads())?, &experts, later.as_deref()),
    })
}

fn runner<B: Backend>(
    from: &Source,
    backend: B,
    experts: &impl Experts,
    later: Option<&Stages>,
) -> Result<Box<dyn Runner>> {
    let source = source::open(&from.path)?;
    let spec = spec::read(&from.path, &*source)?;
    let (backend, options) = (Arc::new(backend), from.options());
    let layers = later.map_or(spec.layers.len(), Stages::first);
    // before weights are loaded in vain
    let stages = later.map(|later| later.connect(spec.hidden)).transpose();
    let stages = stages.map_err(|error| moesaic_model::Error::Stage { reason: error.message })?;
    let pool = experts.pool(&*source, &spec, backend.clone(), &options, 0..layers)?;
    let Some(later) = stages else {
        return Ok(Box::new(load_decoder(&*source, spec, backend, &options, pool)?));
    };
    Ok(Box::new(load_first_stage(&*source, spec, backend, &options, pool, layers, Box::new(later))?))
}

/// Loads a later stage's layers.
pub fn stage_factory(from: Source, experts: impl Experts, layers: Range<usize>) -> StageFactory {
    Box::new(move || match from.config.backend {
        BackendKind::Native => stage(&from, from.config.native(), &experts, layers),
        BackendKind::Candle => stage(&from, CandleBackend::new(from.config.threads())?, &experts, layers),
    })
}

fn stage<B: Backend>(
    from: &Source,
    backend: B,
    experts: &impl Experts,
    layers: Range<usize>,
) -> Result<Box<dyn StageRunner>> {
    let source = source::open(&from.path)?;
    let spec = spec::read(&from.path, &*source)?;
    let (backend, options) = (Arc::new(backend), from.options());
    let pool = experts.pool(&*source, &spec, backend.clone(), &options, layers.clone())?;
    Ok(Box::new(load_stage(&*source, &spec, backend, &options, pool, layers)?))
}

impl Source {
    fn options(&self) -> LoadOptions<'_> {
        let ModelConfig { weights, kv, activations, .. } = self.config;
        LoadOptions { weights, kv, threads: self.config.threads(), activations, progress: Some(&*self.report) }
    }
}
