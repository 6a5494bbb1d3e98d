//! Shards of a reference checkpoint behind real gRPC servers on loopback, and a decoder over them.
use moesaic_expert_shard::executor::{Executor, Job, Outcome};
use moesaic_expert_shard::grpc::{self, ShardServer, expert_service};
use moesaic_expert_shard::library::Library;
use moesaic_expert_shard::{Config, ExpertShard};
use moesaic_model::backend::TensorSlice;
use moesaic_model::backend::native::NativeBackend;
use moesaic_model::decoder::{Decoder, ExpertStore, load_decoder};
use moesaic_model::spec::ModelSpec;
use moesaic_model::{LoadOptions, source, spec};
use moesaic_scheduler::experts::RemotePool;
use moesaic_testkit::soon;
use moesaic_transport::placement::Placements;
use moesaic_transport::{Directory, ExpertsOptions, MemoryBus, MemoryMetadata, Registration, RemoteExperts, serve};
use moesaic_types::cluster::{Member, MemberState, Placement, Role, Service, ShardInfo, Shares};
use moesaic_types::{Digest, KvFormat, Routing, WeightFormat};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::{Notify, watch};
use tonic::service::Routes;

const LEASE: Duration = Duration::from_secs(2);

/// Groups of shards, and slices in each.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    pub groups: usize,
    pub ranks: usize,
}

/// A shard that runs.
pub struct Shard {
    pub shard: Arc<ExpertShard<NativeBackend>>,
    pub executor: Executor<NativeBackend>,
    pub served: Arc<dyn ShardServer>,
    library: Library,
    _registration: Registration,
    /// Its own, so that ending it ends its connections.
    server: Option<Runtime>,
    group: usize,
}

/// Keeps a shard's thread from going on.
pub struct Hang {
    _release: std::sync::mpsc::Sender<()>,
    _caller: Arc<()>,
}

impl Shard {
    /// A job of its first MoE layer for so many tokens, all for one of its experts; `reply` runs on its thread.
    pub fn job(
        &self,
        tokens: usize,
        caller: &Arc<()>,
        reply: impl FnOnce(Outcome) + Send + 'static,
    ) -> Job<NativeBackend> {
        let (layer, experts) = self.shares().into_iter().find(|(_, experts)| !experts.is_empty()).unwrap();
        let mut routing = Routing::new();
        (0..tokens).for_each(|_| routing.push([(experts[0], 1.0)]));
        Job {
            held: self.shard.shelf().current(),
            layer,
            x: vec![0.5; tokens * self.shard.hidden()],
            routing,
            is_again: true,
            caller: Arc::downgrade(caller),
            span: tracing::Span::none(),
            submitted: Instant::now(),
            reply: Box::new(reply),
        }
    }

    /// Makes its thread hang until what is returned is dropped; its server goes on.
    pub async fn hang(&self) -> Hang {
        let (release, held) = std::sync::mpsc::channel();
        let (began, begun) = tokio::sync::oneshot::channel();
        let caller = Arc::new(());
        let reply = move |_| {
            began.send(()).unwrap();
            let _ = held.recv();
        };
        self.executor.submit(self.job(1, &caller, reply)).await.unwrap();
        soon("it hangs", begun).await.unwrap();
        Hang { _release: release, _caller: caller }
    }

    /// Tokens that it counted as load, over all layers and experts.
    pub async fn counted(&self) -> u64 {
        self.shard.load().await.unwrap().values().flatten().sum()
    }

    /// Follows a placement that was prepared, as when another scheduler asked by it first.
    pub fn switch(&self, epoch: u64) {
        self.shard.shelf().commit(epoch).unwrap();
    }

    /// What the leading router does before a placement is published.
    fn prepare(&self, placement: &Placement) {
        let shelf = self.shard.shelf();
        let store = self.library.load(&shelf.current().experts, None, &placement.shares(self.group), &|_| {}).unwrap();
        let held = moesaic_expert_shard::shelf::Held { epoch: placement.epoch, experts: Arc::new(store) };
        shelf.prepare(held).unwrap();
    }

    /// What it holds.
    pub fn shares(&self) -> Shares {
        self.shard.shelf().current().experts.shares()
    }

    /// Ends its connections and waits until nothing of them is left; its thread goes on.
    pub async fn cut_off(&mut self) {
        let server = self.server.take().expect("it was not killed before");
        on_a_thread(move || server.shutdown_timeout(Duration::from_secs(10))).await;
    }

    /// Ends as a killed process does: its connections break, and its place is not given back.
    pub fn kill(&mut self) {
        self.server.take().expect("it was not killed before").shutdown_background();
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        if self.server.is_some() {
            self.kill();
        }
    }
}

/// The shards, their placement, and the directory that shows them.
pub struct Cluster {
    pub model: ModelSpec,
    path: PathBuf,
    weights: WeightFormat,
    metadata: Arc<MemoryMetadata>,
    events: Arc<MemoryBus>,
    pub shards: Vec<Shard>,
    placement: watch::Sender<Option<Arc<Placement>>>,
    /// Told when a scheduler finds that its placement is not the last.
    pub outdated: Arc<Notify>,
}

const MODEL: Digest = Digest([7; 32]);

impl Cluster {
    /// Starts the shards; expert `e` of a layer is in the groups that `place` gives.
    pub async fn start(path: &Path, weights: WeightFormat, grid: Grid, place: impl Fn(usize) -> Vec<usize>) -> Self {
        Self::start_uneven(path, weights, &vec![grid.ranks; grid.groups], place).await
    }

    /// The same with as many ranks in each group as `ranks` says.
    pub async fn start_uneven(
        path: &Path,
        weights: WeightFormat,
        ranks: &[usize],
        place: impl Fn(usize) -> Vec<usize>,
    ) -> Self {
        let model = spec::read(path, &*source::open(path).unwrap()).unwrap();
        let (metadata, events) = (Arc::new(MemoryMetadata::new()), Arc::new(MemoryBus::new()));
        let (placement, _) = watch::channel(None);
        let path = path.to_owned();
        let (shards, outdated) = (Vec::new(), Arc::default());
        let mut cluster = Self { model, path, weights, metadata, events, shards, placement, outdated };
        for (group, ranks) in ranks.iter().copied().enumerate() {
            for rank in 0..ranks {
                let shard = cluster.shard(group, TensorSlice { rank, ranks }).await;
                cluster.shards.push(shard);
            }
        }
        cluster.place(1, ranks.len(), place);
        cluster
    }

    /// Starts one shard, with nothing in it.
    pub async fn shard(&self, group: usize, slice: TensorSlice) -> Shard {
        let backend = Arc::new(NativeBackend::new(1, moesaic_model::Activations::F32));
        let shard = ExpertShard::start(&Config::default(), &self.model, ExpertStore::empty(backend, slice)).unwrap();
        let library = || Library {
            source: source::open(&self.path).unwrap(),
            spec: self.model.clone(),
            weights: Some(self.weights),
            threads: 1,
            available: || u64::MAX,
        };
        let executor = Executor::start(Arc::clone(&shard), 16, 64).unwrap();
        let served = grpc::server(Arc::clone(&shard), executor.clone(), library());
        let service = Arc::new(grpc::Shard::default());
        service.set(Arc::clone(&served));
        let routes = Routes::new(expert_service(service));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let server = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = listener.into_std().unwrap();
        server.spawn(async move {
            let (_never, stop) = watch::channel(false);
            serve(routes, TcpListener::from_std(listener).unwrap(), None, stop).await.unwrap();
        });
        let info = ShardInfo { model: MODEL, group, rank: slice.rank, ranks: slice.ranks };
        let member = Member {
            service: Service::ExpertShard,
            id: format!("shard-{group}-{}", slice.rank).into(),
            generation: 0,
            address,
            socket: None,
            state: MemberState::Ready,
            role: Role::Shard(info),
        };
        let registration = Registration::start(self.metadata.clone(), self.events.clone(), member, LEASE);
        let library = library();
        Shard { shard, executor, served, library, _registration: registration, server: Some(server), group }
    }

    /// Prepares a placement at all shards and publishes it.
    pub fn place(&self, epoch: u64, groups: usize, place: impl Fn(usize) -> Vec<usize>) {
        let placement = self.prepare(epoch, groups, place);
        self.publish(placement);
    }

    /// Has schedulers follow a placement.
    pub fn publish(&self, placement: Placement) {
        self.placement.send_replace(Some(Arc::new(placement)));
    }

    /// Prepares a placement at all shards.
    pub fn prepare(&self, epoch: u64, groups: usize, place: impl Fn(usize) -> Vec<usize>) -> Placement {
        let experts = |layer| self.model.moe(layer).map_or(0, |moe| moe.experts);
        let of_layer = |layer| (layer, (0..experts(layer)).map(&place).collect());
        let layers: BTreeMap<_, _> = self.model.moe_layers().map(of_layer).collect();
        let placement = Placement { epoch, model: MODEL, groups, layers };
        assert!(placement.is_complete());
        self.shards.iter().for_each(|shard| shard.prepare(&placement));
        placement
    }

    /// A scheduler's way to the experts, as soon as all are reached.
    pub async fn experts(&self, options: ExpertsOptions) -> Arc<RemoteExperts> {
        let directory = Directory::start(self.metadata.clone(), self.events.clone(), Service::ExpertShard, LEASE);
        let placements = Placements { latest: self.placement.subscribe(), outdated: Arc::clone(&self.outdated) };
        let experts = RemoteExperts::start(directory, placements, MODEL, options);
        moesaic_testkit::until("all experts are reached", || async { experts.ready().is_ok() }).await;
        experts
    }

    /// The model over those experts.
    pub fn decoder(&self, experts: Arc<RemoteExperts>) -> Decoder<NativeBackend> {
        let source = source::open(&self.path).unwrap();
        let backend = Arc::new(NativeBackend::new(1, moesaic_model::Activations::F32));
        let options = LoadOptions {
            weights: Some(self.weights),
            kv: KvFormat::F32,
            threads: 1,
            activations: moesaic_model::Activations::F32,
            progress: None,
        };
        let pool = RemotePool::new(experts, Arc::clone(&backend), self.model.hidden);
        load_decoder(&*source, self.model.clone(), backend, &options, Arc::new(pool)).unwrap()
    }

    /// The embedded model.
    pub fn embedded(&self) -> Decoder<NativeBackend> {
        let source = source::open(&self.path).unwrap();
        let backend = Arc::new(NativeBackend::new(1, moesaic_model::Activations::F32));
        let options = LoadOptions {
            weights: Some(self.weights),
            kv: KvFormat::F32,
            threads: 1,
            activations: moesaic_model::Activations::F32,
            progress: None,
        };
        let pool = moesaic_model::decoder::load_experts(&*source, &self.model, backend.clone(), &options).unwrap();
        load_decoder(&*source, self.model.clone(), backend, &options, Arc::new(pool)).unwrap()
    }
}

/// Runs what waits for shards on a thread of its own.
pub async fn on_a_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    soon("the thread ends", tokio::task::spawn_blocking(work)).await.unwrap()
}
