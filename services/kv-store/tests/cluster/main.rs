//! Kv-stores as a cluster sees them: real gRPC servers, over memory and over real Redis.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails there")]
mod announce;
mod memory;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream;
use moesaic_config::ByteSize;
use moesaic_kv_store::{Cluster, Config, Joined, KvStore, kv_service};
use moesaic_proto::kv::v1 as wire;
use moesaic_proto::kv::v1::kv_store_service_client::KvStoreServiceClient;
use moesaic_proto::offer_to_wire;
use moesaic_testkit::conformance::{self, block, chain, fetched};
use moesaic_testkit::{servers, soon, until};
use moesaic_transport::channel::to_address;
use moesaic_transport::kv::{Holding, Patience, Tier, ranked};
use moesaic_transport::membership::View;
use moesaic_transport::subjects::Subject;
use moesaic_transport::{Directory, MemoryBus, MemoryMetadata, RedisMetadata, Registration, RemotePrefixStore};
use moesaic_types::boundary::{EventBus, KvEvent, Metadata, PrefixStore};
use moesaic_types::cluster::{Member, MemberState, Role, Service};
use moesaic_types::{BlockHash, ErrorCode, GROUP_BLOCKS, Link};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tonic::Code;
use tonic::service::Routes;

const LEASE: Duration = Duration::from_secs(1);
const PATIENCE: Patience = Patience { answer: Duration::from_secs(2), rate: 1 << 20 };

/// What a cluster stands on.
#[derive(Clone)]
struct Ground {
    metadata: Arc<dyn Metadata>,
    events: Arc<dyn EventBus>,
}

impl Ground {
    fn memory() -> Self {
        Self { metadata: Arc::new(MemoryMetadata::new()), events: Arc::new(MemoryBus::new()) }
    }

    fn directory(&self) -> Directory {
        Directory::start(self.metadata.clone(), self.events.clone(), Service::KvStore, LEASE)
    }

    /// What a scheduler has.
    fn remote(&self) -> RemotePrefixStore {
        RemotePrefixStore::new(self.directory(), self.metadata.clone(), PATIENCE)
    }

    async fn holding(&self, group: &BlockHash, node: &str) -> Option<Holding> {
        let found = self.metadata.get(&Holding::key(group, node)).await.unwrap();
        found.and_then(|(bytes, _)| Holding::read(&bytes))
    }
}

/// A node; it dies when it is dropped, and its place is given back.
struct Node {
    id: &'static str,
    store: Arc<KvStore>,
    registration: Registration,
    address: SocketAddr,
    server: AbortHandle,
    /// What it sees of the others.
    views: watch::Receiver<Arc<View>>,
    _stop: watch::Sender<bool>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn node(ground: &Ground, id: &'static str, config: &Config) -> Node {
    node_that_tells(ground, id, config, ground.metadata.clone()).await
}

/// A node that says elsewhere what it has.
async fn node_that_tells(ground: &Ground, id: &'static str, config: &Config, metadata: Arc<dyn Metadata>) -> Node {
    let store = KvStore::start(config).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let member = Member {
        service: Service::KvStore,
        id: id.into(),
        generation: 0,
        address: format!("http://{address}"),
        socket: None,
        state: MemberState::Ready,
        role: Role::Plain,
    };
    let registration = Registration::start(ground.metadata.clone(), ground.events.clone(), member, LEASE);
    let directory = ground.directory();
    let views = directory.watch();
    let cluster = Cluster {
        metadata,
        events: ground.events.clone(),
        directory,
        id: id.into(),
        replication: config.replication,
        replication_queue: config.replication_queue,
        patience: PATIENCE,
    };
    let joined = Joined::start(&store, cluster);
    let service = kv_service(store.clone(), Some(joined), config);
    let (stop, stopped) = watch::channel(false);
    let serving = moesaic_transport::serve(Routes::new(service), listener, None, stopped);
    let server = tokio::spawn(async move { serving.await.unwrap() }).abort_handle();
    Node { id, store, registration, address, server, views, _stop: stop }
}

async fn sees(store: &RemotePrefixStore, nodes: usize) {
    let mut views = store.nodes().directory().watch();
    soon("the nodes are seen", views.wait_for(|view| view.ready().count() == nodes)).await.unwrap();
}

async fn offer(store: &dyn PrefixStore, chain: &[BlockHash], numbers: std::ops::Range<u32>) {
    for (position, number) in numbers.enumerate() {
        assert_eq!(store.offer(Link::of(chain, position), block(number).1).await, Ok(true));
    }
}

fn expected(numbers: std::ops::Range<u32>) -> Vec<Bytes> {
    numbers.map(|number| block(number).1).collect()
}

async fn conforms(ground: Ground) {
    for count in [1, 3] {
        let mut nodes = Vec::new();
        for id in ["a", "b", "c"].into_iter().take(count) {
            nodes.push(node(&ground, id, &Config::default()).await);
        }
        let remote = ground.remote();
        sees(&remote, count).await;
        conformance::prefix_store(Arc::new(remote)).await;
        for node in nodes {
            let Node { registration, .. } = &node;
            registration.set_state(MemberState::Draining);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_cluster_over_memory_keeps_the_boundary_s_promises() {
    conforms(Ground::memory()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_cluster_over_redis_keeps_the_boundary_s_promises() {
    let redis = servers::redis();
    let metadata = Arc::new(RedisMetadata::connect(&redis.url(), "test").unwrap());
    conforms(Ground { metadata, events: Arc::new(MemoryBus::new()) }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn chains_are_found_where_they_were_left_when_nodes_come() {
    let ground = Ground::memory();
    let a = node(&ground, "a", &Config::default()).await;
    let remote = ground.remote();
    sees(&remote, 1).await;
    let chain = chain(0..100);
    offer(&remote, &chain, 0..100).await;
    let groups: Vec<_> = chain.iter().step_by(16).copied().collect();
    for group in &groups {
        until("a says what it has", || async {
            ground.holding(group, "a").await.is_some_and(|holding| holding.tier == Tier::Ram)
        })
        .await;
    }
    let b = node(&ground, "b", &Config::default()).await;
    sees(&remote, 2).await;
    assert!(groups.iter().any(|group| ranked(group, ["a", "b"])[0] == "b"), "some belong elsewhere now");
    assert_eq!(remote.longest(&chain, 0).await, Ok(100));
    assert_eq!(fetched(&remote, &chain, 5).await, Ok(expected(5..100)));
    assert_eq!(b.store.size().await.unwrap().ram_blocks, 0);

    // a life that is over had said so: it is not believed
    let group = groups.iter().find(|group| ranked(group, ["a", "b"])[0] == "b").unwrap();
    let record = ground.holding(group, "a").await.unwrap();
    let (_, version) = ground.metadata.get(&Holding::key(group, "a")).await.unwrap().unwrap();
    let stale = Holding { generation: record.generation - 1, ..record }.to_bytes();
    ground.metadata.compare_and_set(&Holding::key(group, "a"), Some(version), stale, None).await.unwrap().unwrap();
    let at = chain.iter().position(|hash| hash == group).unwrap();
    assert_eq!(remote.longest(&chain, at).await, Ok(0));
    assert_eq!(a.id, "a");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_node_that_started_again_has_what_its_disk_has_under_its_new_generation() {
    let ground = Ground::memory();
    let folder = tempfile::tempdir().unwrap();
    let small = |folder: Option<PathBuf>| Config {
        capacity: ByteSize(2 * block(0).1.len() as u64),
        disk_folder: folder,
        ..Config::default()
    };
    let first = node(&ground, "a", &small(Some(folder.path().to_owned()))).await;
    let remote = ground.remote();
    sees(&remote, 1).await;
    let chain = chain(0..16);
    offer(&remote, &chain, 0..16).await;
    let files =
        || std::fs::read_dir(folder.path()).unwrap().filter(|entry| entry.as_ref().unwrap().file_name().len() == 2);
    until("most is on disk", || async { files().count() == 14 }).await;
    until("it says so", || async { ground.holding(&chain[0], "a").await.is_some() }).await;
    let before = ground.holding(&chain[0], "a").await.unwrap();
    drop(first);
    until("the folder is free", || async { moesaic_kv_store::disk::Folder::open(folder.path()).is_ok() }).await;
    let second = node(&ground, "a", &small(Some(folder.path().to_owned()))).await;
    until("the second life says what it has", || async {
        let holding = ground.holding(&chain[0], "a").await;
        holding.is_some_and(|now| now.generation > before.generation && now.tier == Tier::Disk)
    })
    .await;
    until("the second life is reached", || async { remote.longest(&chain, 2).await == Ok(14) }).await;
    assert_eq!(fetched(&remote, &chain, 2).await, Ok(expected(2..16)));
    drop(second);
    // a life without anything: its predecessor's records are nobody's
    let empty = node(&ground, "a", &small(None)).await;
    until("the empty one is reached", || async { remote.longest(&chain, 2).await == Ok(0) }).await;
    assert_eq!(fetched(&remote, &chain, 2).await, Ok(vec![]));
    drop(empty);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_copy_serves_when_a_node_is_lost_also_in_the_middle() {
    let ground = Ground::memory();
    let config = Config { replication: 2, replication_queue: 1024, ..Config::default() };
    let a = node(&ground, "a", &config).await;
    let b = node(&ground, "b", &config).await;
    let remote = ground.remote();
    sees(&remote, 2).await;
    for node in [&a, &b] {
        let mut views = node.views.clone();
        soon("the nodes see each other", views.wait_for(|view| view.ready().count() == 2)).await.unwrap();
    }
    let chain = chain(0..64);
    offer(&remote, &chain, 0..64).await;
    until("each has all", || async {
        a.store.longest(&chain, 0).await == Ok(64) && b.store.longest(&chain, 0).await == Ok(64)
    })
    .await;
    for group in chain.iter().step_by(16) {
        for id in ["a", "b"] {
            until("both say so", || async { ground.holding(group, id).await.is_some() }).await;
        }
    }
    let mut coming = remote.fetch(&chain, 0);
    let mut got = Vec::new();
    for _ in 0..3 {
        got.push(soon("a block", coming.next()).await.unwrap().unwrap());
    }
    drop(a);
    while let Some(next) = soon("the rest", coming.next()).await {
        got.push(next.unwrap());
    }
    assert_eq!(got, expected(0..64));
    drop(b);
    // with both lost: nothing, and no error that would cost a request
    until("nothing is left", || async { remote.longest(&chain, 0).await == Ok(0) }).await;
    assert_eq!(fetched(&remote, &chain, 0).await.unwrap_or_default(), Vec::<Bytes>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn without_nodes_there_is_nothing_and_without_redis_the_known_nodes_serve() {
    let nobody = Ground::memory().remote();
    let chain = chain(0..40);
    assert_eq!(nobody.longest(&chain, 0).await, Ok(0));
    assert_eq!(fetched(&nobody, &chain, 0).await, Ok(vec![]));
    assert_eq!(nobody.offer(Link::of(&chain, 0), block(0).1).await, Ok(false));

    let mut redis = servers::redis();
    let metadata = Arc::new(RedisMetadata::connect(&redis.url(), "test").unwrap());
    let ground = Ground { metadata, events: Arc::new(MemoryBus::new()) };
    let _a = node(&ground, "a", &Config::default()).await;
    let _b = node(&ground, "b", &Config::default()).await;
    let remote = ground.remote();
    sees(&remote, 2).await;
    offer(&remote, &chain[..20], 0..20).await;
    redis.kill();
    assert_eq!(remote.longest(&chain, 0).await, Ok(20));
    assert_eq!(fetched(&remote, &chain, 0).await, Ok(expected(0..20)));
    assert_eq!(remote.offer(Link::of(&chain, 20), block(20).1).await, Ok(true));
    assert_eq!(remote.longest(&chain, 0).await, Ok(21));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn without_redis_and_with_the_first_node_lost_its_copy_is_asked() {
    let mut redis = servers::redis();
    let metadata = Arc::new(RedisMetadata::connect(&redis.url(), "test").unwrap());
    let ground = Ground { metadata, events: Arc::new(MemoryBus::new()) };
    let config = Config { replication: 2, replication_queue: 1024, ..Config::default() };
    let nodes = [node(&ground, "a", &config).await, node(&ground, "b", &config).await];
    let remote = ground.remote();
    sees(&remote, 2).await;
    for node in &nodes {
        let mut views = node.views.clone();
        soon("the nodes see each other", views.wait_for(|view| view.ready().count() == 2)).await.unwrap();
    }
    let chain = chain(0..64);
    offer(&remote, &chain, 0..64).await;
    for node in &nodes {
        until("each has all", || async { node.store.longest(&chain, 0).await == Ok(64) }).await;
    }
    redis.kill();
    let first = ranked(&chain[0], ["a", "b"])[0];
    let (lost, _kept): (Vec<_>, Vec<_>) = nodes.into_iter().partition(|node| node.id == first);
    drop(lost);
    assert_eq!(fetched(&remote, &chain, 0).await, Ok(expected(0..64)));
    assert_eq!(remote.longest(&chain, 0).await, Ok(64));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_long_chain_is_found_among_many_nodes() {
    let ground = Ground::memory();
    let blocks = 40 * GROUP_BLOCKS as u32;
    let first = node(&ground, "a", &Config::default()).await;
    let remote = ground.remote();
    sees(&remote, 1).await;
    let chain = chain(0..blocks);
    offer(&remote, &chain, 0..blocks).await;
    for group in chain.iter().step_by(GROUP_BLOCKS) {
        until("it says so", || async { ground.holding(group, "a").await.is_some() }).await;
    }
    // each group has now eleven others to look for
    let mut others = Vec::new();
    for id in ["b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"] {
        others.push(node(&ground, id, &Config::default()).await);
    }
    sees(&remote, 12).await;
    assert_eq!(remote.longest(&chain, 0).await, Ok(blocks as usize));
    assert_eq!(fetched(&remote, &chain, 0).await, Ok(expected(0..blocks)));
    assert_eq!(first.id, "a");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn requests_out_of_bounds_are_refused_and_calls_are_limited() {
    let ground = Ground::memory();
    let node = node(&ground, "a", &Config { max_streams: 1, ..Config::default() }).await;
    let mut client = KvStoreServiceClient::new(to_address(&format!("http://{}", node.address)).unwrap());
    let odd = Bytes::from_static(&[0; 17]);
    let error = client.longest(wire::LongestRequest { chain: odd.clone() }).await.unwrap_err();
    assert_eq!(moesaic_proto::from_status(&error).field.as_deref(), Some("chain"));
    let error = client.fetch(wire::FetchRequest { chain: odd.clone() }).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    let pin = wire::PinRequest { chain: Bytes::new(), for_ms: 600_001 };
    let error = moesaic_proto::from_status(&client.pin(pin).await.unwrap_err());
    assert_eq!((error.code, error.field.as_deref()), (ErrorCode::InvalidArgument, Some("for_ms")));

    let (hash, bytes) = block(0);
    let good = offer_to_wire(&Link::of(&[hash], 0), bytes, false);
    let wrong = wire::OfferRequest { hash: odd, ..good.clone() };
    let mut answers = client.offer(stream::iter([good.clone(), good, wrong])).await.unwrap().into_inner();
    assert!(answers.message().await.unwrap().unwrap().stored);
    assert!(!answers.message().await.unwrap().unwrap().stored, "it is there");
    assert_eq!(answers.message().await.unwrap_err().code(), Code::InvalidArgument);
    drop(answers);

    let (open, offers) = futures::channel::mpsc::channel(1);
    let answers = client.offer(offers).await.unwrap();
    let error = client.fetch(wire::FetchRequest { chain: Bytes::new() }).await.unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted);
    drop((open, answers));
    until("its place is free", || {
        let mut client = client.clone();
        async move { client.fetch(wire::FetchRequest { chain: Bytes::new() }).await.is_ok() }
    })
    .await;
    let chain = Bytes::copy_from_slice(&hash.0);
    let pinned = client.pin(wire::PinRequest { chain, for_ms: 1000 }).await.unwrap().into_inner().pinned;
    assert_eq!(pinned, 1);
}

#[tokio::test]
async fn routers_hear_which_blocks_are_here_and_everything_anew_when_they_ask() {
    let ground = Ground::memory();
    let mut events = ground.events.subscribe("moesaic.v1.kv.kv-store.a.ram").await.unwrap();
    let node = node(&ground, "a", &Config::default()).await;
    let chain = chain(0..3);
    offer(&*node.store, &chain, 0..2).await;
    let mut known = std::collections::BTreeSet::new();
    let mut hear = async |known: &mut std::collections::BTreeSet<BlockHash>| {
        let event = soon("an event", events.next()).await.unwrap();
        match serde_json::from_slice(&event.payload).unwrap() {
            KvEvent::Cleared => known.clear(),
            KvEvent::Stored { blocks } => known.extend(blocks),
            KvEvent::Evicted { blocks } => known.retain(|block| !blocks.contains(block)),
        }
        event.sequence
    };
    while known.len() < 2 {
        hear(&mut known).await;
    }
    assert!(known.contains(&chain[0]) && known.contains(&chain[1]));
    known.clear();
    let question = Subject::kv_anew(Service::KvStore, "a").to_string();
    let mut last = 0;
    let told_anew = async {
        while known.len() < 2 {
            // until it listens nobody hears the question; a router asks again as well
            ground.events.publish("router", &question, Bytes::new()).await.unwrap();
            let sequence = hear(&mut known).await;
            assert!(last == 0 || sequence == last + 1, "numbered without a gap");
            last = sequence;
        }
    };
    soon("everything anew", told_anew).await;
}
