//! Later stages of the demo model behind real gRPC servers, and replicas over them.
use crate::common::{Gate, vocabulary};
use moesaic_model::backend::native::NativeBackend;
use moesaic_model::decoder::{load_decoder, load_experts, load_first_stage, load_stage};
use moesaic_model::pipeline::{LaterStages, StageInput, StageRunner, split_layers};
use moesaic_model::runner::Advanced;
use moesaic_model::{Error, LoadOptions, Result, source, spec};
use moesaic_scheduler::pipeline::{
    LateStage, RemoteStages, StageOptions, StageOwner, StagePeer, StageServer, stage_service,
};
use moesaic_scheduler::{Config, RunnerFactory, Scheduler};
use moesaic_transport::channel::to_address;
use moesaic_types::{BlockHasher, Digest, KvFormat, WeightFormat};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tonic::service::Routes;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../deploy/models/demo-moe")
}

const OPTIONS: LoadOptions<'static> = LoadOptions {
    weights: None,
    kv: KvFormat::F32,
    threads: 1,
    activations: moesaic_model::Activations::Int8,
    progress: None,
};

/// The id of the replica's process.
const REPLICA: &str = "s0";

/// What a test does to a stage from outside.
#[derive(Default)]
pub struct Levers {
    /// The next micro-batch fails.
    pub fail: AtomicBool,
    /// The next micro-batch panics.
    pub panic: AtomicBool,
    /// Holds micro-batches.
    pub gate: Gate,
    /// How far the one is that is held.
    pub advanced: AtomicU64,
    /// Micro-batches that were begun.
    pub runs: AtomicUsize,
}

impl Levers {
    /// Awaits that a micro-batch is held.
    pub async fn held(self: &Arc<Self>) {
        let levers = Arc::clone(self);
        tokio::task::spawn_blocking(move || levers.gate.wait()).await.unwrap();
    }
}

struct Levered {
    inner: Box<dyn StageRunner>,
    levers: Arc<Levers>,
}

impl StageRunner for Levered {
    fn block_bytes(&self) -> usize {
        self.inner.block_bytes()
    }

    fn hidden(&self) -> usize {
        self.inner.hidden()
    }

    fn advanced(&self) -> Advanced {
        let (inner, levers) = (self.inner.advanced(), Arc::clone(&self.levers));
        Box::new(move || inner() + levers.advanced.load(Ordering::SeqCst))
    }

    fn allocate_kv(&mut self, blocks: usize) -> Result<()> {
        self.inner.allocate_kv(blocks)
    }

    fn run(&mut self, input: &StageInput) -> Result<Vec<f32>> {
        self.levers.runs.fetch_add(1, Ordering::SeqCst);
        self.levers.gate.pass();
        assert!(!self.levers.panic.swap(false, Ordering::SeqCst), "the stage was told to panic");
        if self.levers.fail.swap(false, Ordering::SeqCst) {
            return Err(Error::Backend { backend: "native", reason: "the stage was told to fail".into() });
        }
        self.inner.run(input)
    }

    fn export_block(&self, block: u32) -> Result<Vec<u8>> {
        self.inner.export_block(block)
    }

    fn import_block(&mut self, block: u32, bytes: &[u8]) -> Result<()> {
        self.inner.import_block(block, bytes)
    }
}

/// A later stage's process; ending its runtime ends its connections.
pub struct StageProcess {
    pub address: String,
    pub levers: Arc<Levers>,
    pub server: Arc<StageServer>,
    runtime: Option<Runtime>,
}

impl StageProcess {
    pub async fn start(layers: Range<usize>, address: &str) -> Self {
        let levers: Arc<Levers> = Arc::default();
        let (of_stage, of_runner) = (layers.clone(), Arc::clone(&levers));
        let factory = move || {
            let source = source::open(&folder())?;
            let spec = spec::read(&folder(), &*source)?;
            let backend = Arc::new(NativeBackend::new(1, moesaic_model::Activations::Int8));
            let experts = Arc::new(load_experts(&*source, &spec, backend.clone(), &OPTIONS)?);
            let inner = Box::new(load_stage(&*source, &spec, backend, &OPTIONS, experts, of_stage)?);
            Ok(Box::new(Levered { inner, levers: of_runner }) as Box<dyn StageRunner>)
        };
        let server = StageServer::start(layers, REPLICA, Box::new(factory)).unwrap();
        server.loaded().await.unwrap();
        let listener = TcpListener::bind(address).await.unwrap().into_std().unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let served = Arc::clone(&server);
        runtime.spawn(async move {
            let (_never, stop) = watch::channel(false);
            let listener = TcpListener::from_std(listener).unwrap();
            let stage = Arc::new(LateStage::default());
            stage.set(served);
            moesaic_transport::serve(Routes::new(stage_service(stage)), listener, None, stop).await.unwrap();
        });
        Self { runtime: Some(runtime), address, levers, server }
    }

    /// Ends it as a killed process ends; its port is free then.
    pub async fn kill(&mut self) {
        let runtime = self.runtime.take().unwrap();
        tokio::task::spawn_blocking(move || runtime.shutdown_timeout(Duration::from_secs(10))).await.unwrap();
    }
}

impl Drop for StageProcess {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Layers of each stage of the demo model.
pub fn ranges(stages: usize) -> Vec<Range<usize>> {
    let source = source::open(&folder()).unwrap();
    split_layers(spec::read(&folder(), &*source).unwrap().layers.len(), stages)
}

/// Columns of its rows.
pub fn hidden() -> usize {
    let source = source::open(&folder()).unwrap();
    spec::read(&folder(), &*source).unwrap().hidden
}

/// All but the first of so many stages.
pub async fn later_stages(stages: usize) -> Vec<StageProcess> {
    let mut later = Vec::new();
    for range in ranges(stages).into_iter().skip(1) {
        later.push(StageProcess::start(range, "127.0.0.1:0").await);
    }
    later
}

/// The replica's process in the life that has this generation.
pub fn owner(generation: u64) -> StageOwner {
    StageOwner { replica: REPLICA.into(), generation, lives: Arc::default() }
}

fn peers(addresses: &[String]) -> Vec<StagePeer> {
    let later = ranges(addresses.len() + 1).into_iter().skip(1).zip(addresses);
    let peer = |(layers, address): (Range<usize>, &String)| StagePeer {
        name: format!("stage {layers:?}"),
        channel: to_address(&format!("http://{address}")).unwrap(),
        layers,
    };
    later.map(peer).collect()
}

fn addresses(later: &[StageProcess]) -> Vec<String> {
    later.iter().map(|stage| stage.address.clone()).collect()
}

/// The way to later stages alone.
pub fn remote(later: &[StageProcess], owner: StageOwner, options: StageOptions) -> Box<dyn LaterStages> {
    let runtime = tokio::runtime::Handle::current();
    Box::new(RemoteStages::new(peers(&addresses(later)), hidden(), owner, options, runtime))
}

/// A replica over later stages, in the first life of its process.
pub async fn start(later: &[StageProcess]) -> Arc<Scheduler> {
    replica(later, owner(1), StageOptions::default()).await
}

pub async fn replica(later: &[StageProcess], owner: StageOwner, options: StageOptions) -> Arc<Scheduler> {
    replica_at(addresses(later), owner, options).await
}

/// A replica whose later stages are at these addresses.
pub async fn replica_at(addresses: Vec<String>, owner: StageOwner, options: StageOptions) -> Arc<Scheduler> {
    let (first, peers) = (ranges(addresses.len() + 1)[0].end, peers(&addresses));
    let runtime = tokio::runtime::Handle::current();
    let factory: RunnerFactory = Arc::new(move || {
        let source = source::open(&folder())?;
        let spec = spec::read(&folder(), &*source)?;
        let backend = Arc::new(NativeBackend::new(1, moesaic_model::Activations::Int8));
        let experts = Arc::new(load_experts(&*source, &spec, backend.clone(), &OPTIONS)?);
        if peers.is_empty() {
            return Ok(Box::new(load_decoder(&*source, spec, backend, &OPTIONS, experts)?));
        }
        let later = RemoteStages::new(peers.clone(), spec.hidden, owner.clone(), options, runtime.clone());
        Ok(Box::new(load_first_stage(&*source, spec, backend, &OPTIONS, experts, first, Box::new(later))?))
    });
    let hasher = BlockHasher::new(&Digest::of(b"demo"), WeightFormat::default(), KvFormat::default(), None);
    let config = Config { kv_blocks: Some(24), max_chunk: 40, restart_backoff_ms: 50, ..Config::default() };
    Scheduler::start(config, factory, vocabulary(), hasher, None, None).await.unwrap()
}
