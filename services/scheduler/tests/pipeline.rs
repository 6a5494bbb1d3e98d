//! A replica in stages over real gRPC streams: the bits of the whole one, and what happens when a stage is lost.
#![allow(clippy::unwrap_used, reason = "a test fails there")]

mod common;

use common::{Answer, generate, prompt, request, until_idle, vocabulary};
use moesaic_model::backend::native::NativeBackend;
use moesaic_model::decoder::{load_decoder, load_experts, load_first_stage, load_stage};
use moesaic_model::pipeline::split_layers;
use moesaic_model::{LoadOptions, source, spec};
use moesaic_scheduler::pipeline::{LateStage, RemoteStages, StagePeer, StageServer, stage_service};
use moesaic_scheduler::{Config, RunnerFactory, Scheduler};
use moesaic_transport::channel::to_address;
use moesaic_types::{BlockHasher, Digest, ErrorCode, KvFormat, WeightFormat};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tonic::service::Routes;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../deploy/models/demo-moe")
}

const OPTIONS: LoadOptions<'static> = LoadOptions { weights: None, kv: KvFormat::F32, threads: 1, progress: None };

/// A later stage's process; ending its runtime ends its connections.
struct StageProcess {
    runtime: Option<Runtime>,
    address: String,
}

impl StageProcess {
    async fn start(layers: Range<usize>, address: &str) -> Self {
        let of_stage = layers.clone();
        let server = StageServer::start(
            layers,
            Box::new(move || {
                let source = source::open(&folder())?;
                let spec = spec::read(&folder(), &*source)?;
                let backend = Arc::new(NativeBackend::new(1));
                let experts = Arc::new(load_experts(&*source, &spec, backend.clone(), &OPTIONS)?);
                Ok(Box::new(load_stage(&*source, &spec, backend, &OPTIONS, experts, of_stage)?))
            }),
        );
        let server = server.unwrap();
        server.loaded().await.unwrap();
        let listener = TcpListener::bind(address).await.unwrap().into_std().unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.spawn(async move {
            let (_never, stop) = watch::channel(false);
            let listener = TcpListener::from_std(listener).unwrap();
            let stage = Arc::new(LateStage::default());
            stage.set(server);
            moesaic_transport::serve(Routes::new(stage_service(stage)), listener, None, stop).await.unwrap();
        });
        Self { runtime: Some(runtime), address }
    }

    fn kill(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

impl Drop for StageProcess {
    fn drop(&mut self) {
        if self.runtime.is_some() {
            self.kill();
        }
    }
}

/// Layers of each stage of the demo model.
fn ranges(stages: usize) -> Vec<Range<usize>> {
    let source = source::open(&folder()).unwrap();
    split_layers(spec::read(&folder(), &*source).unwrap().layers.len(), stages)
}

/// A replica whose later stages are at these addresses.
async fn replica(later: Vec<String>) -> Arc<Scheduler> {
    let mut ranges = ranges(later.len() + 1).into_iter();
    let first = ranges.next().unwrap().end;
    let peer = |(layers, address): (Range<usize>, &String)| StagePeer {
        name: format!("stage {layers:?}"),
        channel: to_address(&format!("http://{address}")).unwrap(),
        layers,
    };
    let peers: Vec<_> = ranges.zip(&later).map(peer).collect();
    let runtime = tokio::runtime::Handle::current();
    let factory: RunnerFactory = Arc::new(move || {
        let source = source::open(&folder())?;
        let spec = spec::read(&folder(), &*source)?;
        let backend = Arc::new(NativeBackend::new(1));
        let experts = Arc::new(load_experts(&*source, &spec, backend.clone(), &OPTIONS)?);
        if peers.is_empty() {
            return Ok(Box::new(load_decoder(&*source, spec, backend, &OPTIONS, experts)?));
        }
        let later = Box::new(RemoteStages::new(peers.clone(), spec.hidden, runtime.clone()));
        Ok(Box::new(load_first_stage(&*source, spec, backend, &OPTIONS, experts, first, later)?))
    });
    let hasher = BlockHasher::new(&Digest::of(b"demo"), WeightFormat::default(), KvFormat::default(), None);
    let config = Config { kv_blocks: Some(24), max_chunk: 40, restart_backoff_ms: 50, ..Config::default() };
    Scheduler::start(config, factory, vocabulary(), hasher, None, None).await.unwrap()
}

async fn answers(scheduler: &Scheduler) -> Vec<Answer> {
    let requests = (0..5u64).map(|n| {
        let mut request = request(prompt(n % 3, 30 + 25 * n as usize), 8);
        request.top_logprobs = Some(2);
        request.prompt_logprobs = n == 2;
        request
    });
    let answers = futures::future::try_join_all(requests.map(|request| generate(scheduler, request))).await.unwrap();
    until_idle(scheduler).await;
    answers
}

fn assert_equal(expected: &[Answer], found: &[Answer]) {
    for (n, (expected, found)) in expected.iter().zip(found).enumerate() {
        assert_eq!(expected.tokens, found.tokens, "request {n}");
        assert_eq!(expected.prompt_logprobs, found.prompt_logprobs, "prompt of request {n}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stages_in_other_processes_give_the_same_bits() {
    let whole = replica(Vec::new()).await;
    let expected = answers(&whole).await;
    for stages in [2, 3] {
        let mut later = Vec::new();
        for range in ranges(stages).into_iter().skip(1) {
            later.push(StageProcess::start(range, "127.0.0.1:0").await);
        }
        let split = replica(later.iter().map(|stage| stage.address.clone()).collect()).await;
        assert_equal(&expected, &answers(&split).await);
        assert_equal(&expected, &answers(&split).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_stage_ends_its_requests_and_a_new_one_serves() {
    let range = ranges(2)[1].clone();
    let mut stage = StageProcess::start(range.clone(), "127.0.0.1:0").await;
    let scheduler = replica(vec![stage.address.clone()]).await;
    let expected = answers(&scheduler).await;
    let long = tokio::spawn({
        let scheduler = Arc::clone(&scheduler);
        async move { generate(&scheduler, request(prompt(1, 40), 800)).await }
    });
    let mut snapshots = scheduler.watch();
    moesaic_testkit::soon("it runs", snapshots.wait_for(|snapshot| snapshot.running == 1)).await.unwrap();
    let address = stage.address.clone();
    stage.kill();
    let error = long.await.unwrap().unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable, "another replica can go on: {error}");
    let _again = StageProcess::start(range, &address).await;
    moesaic_testkit::until("the replica serves again", || async { scheduler.info().is_ok() }).await;
    assert_equal(&expected, &answers(&scheduler).await);
}
