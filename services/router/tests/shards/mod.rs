//! Shards that hold nothing but names, behind real gRPC, and the cluster that they are in.
use futures::stream::BoxStream;
use moesaic_config::HumanDuration;
use moesaic_proto::expert::v1 as wire;
use moesaic_proto::expert::v1::expert_service_server::{ExpertService, ExpertServiceServer};
use moesaic_proto::into_status;
use moesaic_router::PlacementLeader;
use moesaic_router::placement::Config;
use moesaic_testkit::servers::Server;
use moesaic_testkit::until;
use moesaic_transport::placement::{self, Follower};
use moesaic_transport::{Directory, MemoryBus, MemoryMetadata, RedisMetadata, Registration};
use moesaic_types::boundary::{EventBus, Metadata};
use moesaic_types::cluster::{Member, MemberState, Placement, Role, Service, ShardInfo, Shares};
use moesaic_types::{Digest, Error};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};

/// By layer: the tokens of each expert.
pub type Load = BTreeMap<usize, Vec<u64>>;

/// What a shard is, and what it does next.
#[derive(Debug, Default)]
pub struct State {
    pub epoch: u64,
    pub held: Shares,
    pub prepared: Option<(u64, Shares)>,
    pub load: Load,
    /// It says that it has no room.
    pub is_full: bool,
    /// Calls of Prepare so far.
    pub prepares: usize,
    /// Windows that were ended.
    pub windows: usize,
}

impl State {
    /// Whether it serves under this placement, at once or when it is first asked.
    fn serves(&self, epoch: u64, shares: &Shares) -> bool {
        let holds = |held: &Shares| shares.iter().all(|(layer, experts)| held.get(layer).is_some_and(|h| h == experts));
        match &self.prepared {
            Some((prepared, shares)) if *prepared == epoch => holds(shares),
            _ => self.epoch == epoch && holds(&self.held),
        }
    }
}

#[derive(Clone, Debug)]
pub struct FakeShard {
    pub state: Arc<Mutex<State>>,
    /// While it is closed, nothing gets loaded.
    pub gate: watch::Sender<bool>,
}

impl FakeShard {
    fn new() -> Self {
        let state = State { load: load([0; 6]), ..State::default() };
        Self { state: Arc::new(Mutex::new(state)), gate: watch::Sender::new(true) }
    }
}

#[tonic::async_trait]
impl ExpertService for FakeShard {
    type ComputeStream = BoxStream<'static, Result<wire::ComputeResponse, Status>>;

    async fn compute(
        &self,
        _: Request<Streaming<wire::ComputeRequest>>,
    ) -> Result<Response<Self::ComputeStream>, Status> {
        Err(Status::unimplemented("no test computes"))
    }

    async fn describe(
        &self,
        request: Request<wire::DescribeRequest>,
    ) -> Result<Response<wire::DescribeResponse>, Status> {
        let mut state = self.state.lock().unwrap();
        state.windows += usize::from(request.into_inner().end_window);
        let layer = |(layer, load): (&usize, &Vec<u64>)| wire::Layer {
            layer: *layer as u32,
            experts: state.held.get(layer).cloned().unwrap_or_default(),
            load: load.clone(),
        };
        let layers = state.load.iter().map(layer).collect();
        Ok(Response::new(wire::DescribeResponse { epoch: state.epoch, layers }))
    }

    async fn prepare(&self, request: Request<wire::PrepareRequest>) -> Result<Response<wire::PrepareResponse>, Status> {
        let request = request.into_inner();
        self.state.lock().unwrap().prepares += 1;
        self.gate.subscribe().wait_for(|open| *open).await.unwrap();
        let mut state = self.state.lock().unwrap();
        if state.is_full {
            return Err(into_status(Error::exhausted("no room for experts", Duration::from_secs(1))));
        }
        if request.epoch <= state.epoch {
            return Err(into_status(Error::invalid("epoch", format!("epoch {} is not above mine", request.epoch))));
        }
        let shares = request.shares.into_iter().map(|share| (share.layer as usize, share.experts)).collect();
        state.prepared = Some((request.epoch, shares));
        Ok(Response::new(wire::PrepareResponse { loaded: 0 }))
    }

    async fn commit(&self, request: Request<wire::CommitRequest>) -> Result<Response<wire::CommitResponse>, Status> {
        let epoch = request.into_inner().epoch;
        let mut state = self.state.lock().unwrap();
        match state.prepared.take_if(|(prepared, _)| *prepared == epoch) {
            Some((epoch, shares)) => (state.epoch, state.held) = (epoch, shares),
            None if state.epoch == epoch => {}
            None => return Err(into_status(Error::unavailable(format!("epoch {epoch} is not prepared")))),
        }
        Ok(Response::new(wire::CommitResponse { epoch: state.epoch }))
    }
}

pub fn model() -> Digest {
    Digest::of(b"a model")
}

/// Two layers of six experts.
pub fn load(counts: [u64; 6]) -> Load {
    Load::from([(1, counts.to_vec()), (3, counts.to_vec())])
}

/// A shard that runs; dropping it ends it, and its membership.
pub struct Running {
    pub id: String,
    pub group: usize,
    pub shard: FakeShard,
    registration: Registration,
    _stop: watch::Sender<bool>,
}

impl Running {
    pub fn state<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.shard.state.lock().unwrap())
    }

    pub async fn leave(self) {
        self.registration.leave().await;
    }
}

pub struct Cluster {
    pub metadata: Arc<dyn Metadata>,
    pub events: Arc<dyn EventBus>,
    pub lease: Duration,
}

impl Cluster {
    pub fn memory() -> Self {
        let lease = Duration::from_secs(60);
        Self { metadata: Arc::new(MemoryMetadata::new()), events: Arc::new(MemoryBus::new()), lease }
    }

    pub fn real(redis: &Server) -> Self {
        let metadata = Arc::new(RedisMetadata::connect(&redis.url(), "test").unwrap());
        Self { metadata, events: Arc::new(MemoryBus::new()), lease: Duration::from_secs(3) }
    }

    /// Starts a shard as a process that knows nothing would.
    pub async fn start(&self, group: usize, rank: usize, ranks: usize) -> Running {
        let shard = FakeShard::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = watch::channel(false);
        let routes = Routes::new(ExpertServiceServer::new(shard.clone()));
        tokio::spawn(moesaic_transport::serve(routes, listener, None, stopped));
        let id = format!("shard-{group}-{rank}");
        let member = Member {
            service: Service::ExpertShard,
            id: id.as_str().into(),
            generation: 0,
            address,
            socket: None,
            state: MemberState::Starting,
            role: Role::Shard(ShardInfo { model: model(), group, rank, ranks }),
        };
        let registration = Registration::start(self.metadata.clone(), self.events.clone(), member, self.lease);
        Running { id, group, shard, registration, _stop: stop }
    }

    pub async fn grid(&self, groups: usize, ranks: usize) -> Vec<Running> {
        let mut shards = Vec::new();
        for place in 0..groups * ranks {
            shards.push(self.start(place / ranks, place % ranks, ranks).await);
        }
        shards
    }

    pub fn lead(&self, config: &Config) -> PlacementLeader {
        let directory = Directory::start(self.metadata.clone(), self.events.clone(), Service::ExpertShard, self.lease);
        PlacementLeader::start(config, self.metadata.clone(), self.events.clone(), directory).unwrap()
    }

    pub fn follow(&self) -> Follower {
        placement::follow(self.metadata.clone(), self.events.clone(), model())
    }

    pub async fn record(&self) -> Option<Placement> {
        placement::read(&*self.metadata, &model()).await.ok().flatten().and_then(|standing| standing.placement)
    }

    /// Waits for a record that fits and that all these shards follow.
    pub async fn stands(&self, what: &str, shards: &[Running], fits: impl Fn(&Placement) -> bool) -> Placement {
        let found = Mutex::new(None);
        until(what, || async {
            let Some(record) = self.record().await.filter(|record| fits(record)) else { return false };
            let follows = |shard: &Running| {
                let shares = record.shares(shard.group);
                shard.state(|state| state.epoch == record.epoch && state.serves(record.epoch, &shares))
            };
            let all = shards.iter().all(follows);
            *found.lock().unwrap() = Some(record);
            all
        })
        .await;
        found.into_inner().unwrap().unwrap()
    }
}

/// Sees every placement the moment that it is known, when all shards must be able to serve under it.
pub struct Witness {
    pub seen: Arc<Mutex<Vec<u64>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Witness {
    pub fn start(cluster: &Cluster, shards: &[Running]) -> Self {
        let follower = cluster.follow();
        let shards: Vec<_> = shards.iter().map(|shard| (shard.id.clone(), shard.group, shard.shard.clone())).collect();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let epochs = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            let mut watch = follower.watch();
            while watch.changed().await.is_ok() {
                let Some(placement) = watch.borrow_and_update().clone() else { continue };
                epochs.lock().unwrap().push(placement.epoch);
                for (id, group, shard) in &shards {
                    let (state, shares) = (shard.state.lock().unwrap(), placement.shares(*group));
                    assert!(state.serves(placement.epoch, &shares) || state.epoch > placement.epoch, "{id}: {state:?}");
                }
            }
        });
        Self { seen, task }
    }

    /// The epochs that were seen; fails where a shard could not have served.
    pub async fn end(self) -> Vec<u64> {
        if self.task.is_finished() {
            self.task.await.unwrap();
        } else {
            self.task.abort();
        }
        self.seen.lock().unwrap().clone()
    }
}

pub fn config(groups: usize) -> Config {
    let ms = HumanDuration::from_millis;
    Config {
        min_groups: groups,
        settle: ms(0),
        rebalance_interval: ms(30),
        min_load: 0,
        check_interval: ms(10),
        lost_after: ms(300),
        retry_pause: ms(10),
        lease: ms(500),
        ..Config::default()
    }
}
