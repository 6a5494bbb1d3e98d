//! A router and replicas in a cluster, over real gRPC: who joins takes requests, who drains or goes takes none.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use futures::FutureExt;
use futures::future::BoxFuture;
use moesaic_config::HumanDuration;
use moesaic_router::{Config, Router, grpc};
use moesaic_testkit::{soon, until};
use moesaic_transport::channel::to_address;
use moesaic_transport::grpc::replica_service;
use moesaic_transport::{Directory, GrpcPlacer, MemoryBus, MemoryMetadata, Registration};
use moesaic_types::boundary::{DeltaStream, PlaceRequest, Placer, Replica, ReplicaLoad};
use moesaic_types::cluster::{Member, MemberState, ReplicaInfo, Role, ServedAs, Service, StageInfo};
use moesaic_types::{Digest, Error, ErrorCode, GenerateRequest, KvFormat, ReplicaId, RequestId, Result};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::service::Routes;

const LEASE: Duration = Duration::from_secs(60);

/// A replica of which only the load matters here.
struct Idle;

impl Replica for Idle {
    fn generate(&self, _: GenerateRequest) -> BoxFuture<'_, Result<DeltaStream>> {
        async { Err(Error::internal("no test generates")) }.boxed()
    }

    fn load(&self) -> BoxFuture<'_, Result<ReplicaLoad>> {
        async { Ok(ReplicaLoad { max_context: 1000, ..ReplicaLoad::default() }) }.boxed()
    }
}

async fn serve(routes: Routes) -> (String, watch::Sender<bool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(moesaic_transport::serve(routes, listener, None, stopped));
    (address, stop)
}

struct Cluster {
    metadata: Arc<MemoryMetadata>,
    events: Arc<MemoryBus>,
}

impl Cluster {
    fn join(&self, id: &str, address: &str, role: Role) -> Registration {
        let member = Member {
            service: Service::Scheduler,
            id: id.into(),
            generation: 0,
            address: address.into(),
            socket: None,
            state: MemberState::Starting,
            role,
        };
        Registration::start(self.metadata.clone(), self.events.clone(), member, LEASE)
    }
}

fn served() -> ServedAs {
    ServedAs { digest: Digest::default(), weights: None, kv: KvFormat::default() }
}

fn replica() -> Role {
    Role::Replica(ReplicaInfo { model: served(), text: Digest::default(), max_context: 1000 })
}

#[tokio::test]
async fn replicas_are_those_of_the_directory() {
    let cluster = Cluster { metadata: Arc::default(), events: Arc::default() };
    let canary_interval = HumanDuration::default();
    let config = Config { poll_interval: HumanDuration::from_millis(10), canary_interval, ..Config::default() };
    let router = Router::start(&config, cluster.events.clone()).unwrap();
    let directory = Directory::start(cluster.metadata.clone(), cluster.events.clone(), Service::Scheduler, LEASE);
    let following = grpc::follow(&router, directory);
    let (address, _router_stop) = serve(grpc::services(router.clone())).await;
    let placer = GrpcPlacer::new("router", to_address(&address).unwrap());
    let ready = async |ids: &[&str]| {
        let ids: Vec<ReplicaId> = ids.iter().map(|id| ReplicaId::new(*id)).collect();
        until(&format!("{ids:?} are ready"), || async { placer.ready().await.unwrap_or_default() == ids }).await;
    };

    assert_eq!(placer.ready().await.unwrap_err().code, ErrorCode::Unavailable);
    let (at_a, stop_a) = serve(Routes::new(replica_service(Arc::new(Idle)))).await;
    let (at_b, _stop_b) = serve(Routes::new(replica_service(Arc::new(Idle)))).await;
    let a = cluster.join("a", &at_a, replica());
    let b = cluster.join("b", &at_b, replica());
    let stage = StageInfo { model: served(), replica: "a".into(), stage: 1, stages: 2 };
    let stage = cluster.join("a-1", &at_b, Role::Stage(stage));
    for member in [&a, &stage] {
        member.set_state(MemberState::Ready);
    }
    ready(&["a"]).await;
    b.set_state(MemberState::Ready);
    ready(&["a", "b"]).await;

    let request = |exclude: &[&str]| PlaceRequest {
        exclude: exclude.iter().map(|id| ReplicaId::new(*id)).collect(),
        model: Some(served().hasher().digest()),
        ..PlaceRequest::new(RequestId::new("r"), 10, 10)
    };
    let placed = soon("a placement", placer.place(request(&["a"]))).await.unwrap();
    assert_eq!(placed.replica, ReplicaId::new("b"));
    let other = PlaceRequest { model: Some(Digest::of(b"other")), ..request(&[]) };
    let refused = soon("a refusal", placer.place(other)).await.unwrap_err();
    assert!(refused.message.contains("2 with another model"), "{refused}");
    b.set_state(MemberState::Draining);
    ready(&["a"]).await;
    let refused = soon("a refusal", placer.place(request(&["a"]))).await.unwrap_err();
    assert!(refused.message.contains("no replica is ready (1 known, 1 tried)"), "{refused}");

    // a dies: its lease holds still, and the router's own polls find out
    drop(stop_a);
    until("it is found out", || async { placer.ready().await.is_err() }).await;
    let (at_a, _stop_a) = serve(Routes::new(replica_service(Arc::new(Idle)))).await;
    let again = cluster.join("a", &at_a, replica());
    again.set_state(MemberState::Ready);
    ready(&["a"]).await;
    soon("it leaves", again.leave()).await;
    until("nobody is known", || async { router.replicas().await.unwrap().is_empty() }).await;
    drop(following);
}
