//! Two replicas of the demo model over one kv-store: what one computed serves the other, to the bit.
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use futures::StreamExt;
use moesaic_kv_store::{Cluster, Joined, KvStore, kv_service};
use moesaic_model::tokenizer::Tokenizer;
use moesaic_model::{BackendKind, LoadOptions};
use moesaic_scheduler::config::FetchPolicy;
use moesaic_scheduler::{RunnerFactory, Scheduler, Vocabulary};
use moesaic_testkit::conformance::{block, fetched};
use moesaic_testkit::{soon, until};
use moesaic_transport::kv::Patience;
use moesaic_transport::{Directory, MemoryBus, MemoryMetadata, Registration, RemotePrefixStore};
use moesaic_types::boundary::{EventBus, Metadata, PrefixStore, Replica};
use moesaic_types::cluster::{Member, MemberState, Role, Service};
use moesaic_types::{
    BLOCK_TOKENS, BlockHasher, Digest, GenerateRequest, Link, Priority, RequestId, SampledToken, SamplingParams,
    StopConditions, TenantSalt,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::service::Routes;

const LEASE: Duration = Duration::from_secs(3);

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/models/demo-moe")
}

fn hasher() -> BlockHasher {
    let LoadOptions { weights, kv, .. } = LoadOptions::default();
    BlockHasher::new(&Digest::of(b"demo"), weights.unwrap_or_default(), kv, None)
}

async fn replica(store: Option<RemotePrefixStore>) -> Arc<Scheduler> {
    let tokenizer = Tokenizer::from_dir(&folder()).unwrap();
    let token_bytes = tokenizer.all_token_bytes().to_vec();
    let special = (0..token_bytes.len() as u32).map(|id| tokenizer.is_special(id)).collect();
    let vocabulary = Vocabulary { token_bytes, special, eos: Vec::new() };
    let factory: RunnerFactory = Arc::new(|| {
        let options = LoadOptions { threads: 1, ..LoadOptions::default() };
        moesaic_model::load(&folder(), BackendKind::Native, &options)
    });
    let config = moesaic_scheduler::Config {
        kv_blocks: Some(64),
        prefix_store_fetch: FetchPolicy::Always,
        ..moesaic_scheduler::Config::default()
    };
    let store = store.map(|store| Arc::new(store) as Arc<dyn PrefixStore>);
    Scheduler::start(config, factory, vocabulary, hasher(), store, None).await.unwrap()
}

fn request(id: &str, tenant: &str) -> GenerateRequest {
    GenerateRequest {
        id: RequestId::new(id),
        prompt: (0..PROMPT as u32).map(|n| 1 + n * n % 199).collect(),
        resumed_tokens: 0,
        sampling: SamplingParams::greedy(),
        stop: StopConditions { max_tokens: 24, ignore_eos: true, ..Default::default() },
        top_logprobs: Some(3),
        prompt_logprobs: false,
        grammar: None,
        priority: Priority(0),
        deadline: None,
        salt: TenantSalt::derive(b"secret", tenant),
        traceparent: None,
    }
}

const PROMPT: usize = 20 * BLOCK_TOKENS + 7;

/// The tokens with their log-probabilities, and how many of the prompt's came from a cache.
async fn generate(replica: &Scheduler, request: GenerateRequest) -> (Vec<SampledToken>, usize) {
    let mut deltas = replica.generate(request).await.unwrap();
    let (mut tokens, mut cached) = (Vec::new(), None);
    while let Some(delta) = soon("the next tokens", deltas.next()).await {
        let delta = delta.unwrap();
        tokens.extend(delta.tokens);
        cached = cached.or(delta.finish.map(|(_, usage)| usage.cached_tokens));
    }
    (tokens, cached.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_s_blocks_serve_another_to_the_bit_and_only_its_tenant() {
    let metadata: Arc<dyn Metadata> = Arc::new(MemoryMetadata::new());
    let events: Arc<dyn EventBus> = Arc::new(MemoryBus::new());
    let directory = || Directory::start(metadata.clone(), events.clone(), Service::KvStore, LEASE);
    let config = moesaic_kv_store::Config::default();
    let store = KvStore::start(&config).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let member = Member {
        service: Service::KvStore,
        id: "kv-0".into(),
        generation: 0,
        address: format!("http://{}", listener.local_addr().unwrap()),
        socket: None,
        state: MemberState::Ready,
        role: Role::Plain,
    };
    let _registration = Registration::start(metadata.clone(), events.clone(), member, LEASE);
    let cluster = Cluster {
        metadata: metadata.clone(),
        events: events.clone(),
        directory: directory(),
        id: "kv-0".into(),
        replication: config.replication,
        replication_queue: config.replication_queue,
        patience: Patience::default(),
    };
    let joined = Joined::start(&store, cluster);
    let routes = Routes::new(kv_service(store.clone(), Some(joined), &config));
    let (_stop, stopped) = watch::channel(false);
    tokio::spawn(moesaic_transport::serve(routes, listener, None, stopped));
    let remote = async || {
        let patience = Patience { answer: Duration::from_secs(10), ..Patience::default() };
        let remote = RemotePrefixStore::new(directory(), metadata.clone(), patience);
        let mut views = remote.nodes().directory().watch();
        soon("the node is seen", views.wait_for(|view| view.ready().count() == 1)).await.unwrap();
        remote
    };

    let alone = replica(None).await;
    let expected = generate(&alone, request("alone", "a")).await.0;
    drop(alone);
    let one = replica(Some(remote().await)).await;
    assert_eq!(generate(&one, request("first", "a")).await, (expected.clone(), 0));
    let wanted = request("second", "a");
    let chain = hasher().chain(&wanted.salt, &wanted.prompt);
    until("its blocks are stored", || async { store.longest(&chain, 0).await == Ok(20) }).await;
    let two = replica(Some(remote().await)).await;
    assert_eq!(generate(&two, wanted).await, (expected.clone(), 20 * BLOCK_TOKENS));
    assert_eq!(generate(&two, request("third", "b")).await, (expected.clone(), 0), "another tenant's are another's");

    // one that is not what it should be: it is not used, and a good one takes its place
    let wanted = |id: &str| request(id, "c");
    let chain = hasher().chain(&wanted("").salt, &wanted("").prompt);
    let wrong = block(9).1;
    assert_eq!(store.offer(Link::of(&chain, 3), wrong.clone()).await, Ok(true));
    assert_eq!(generate(&one, wanted("fourth")).await, (expected.clone(), 0));
    until("the others are stored", || async { store.longest(&chain, 0).await == Ok(20) }).await;
    assert_eq!(generate(&two, wanted("fifth")).await, (expected.clone(), 3 * BLOCK_TOKENS));
    until("a good one is stored", || async {
        let fourth = fetched(&*store, &chain[..4], 3).await;
        fourth.is_ok_and(|blocks| blocks.first().is_some_and(|block| *block != wrong))
    })
    .await;
    let three = replica(Some(remote().await)).await;
    assert_eq!(generate(&three, wanted("sixth")).await, (expected, 20 * BLOCK_TOKENS));
}
