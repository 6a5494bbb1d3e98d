//! Replicas and routers behind real gRPC servers: the boundaries' promises, and what happens when the server dies.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use futures::StreamExt;
use futures::future::{BoxFuture, FutureExt};
use futures::stream;
use moesaic_testkit::{Open, conformance, soon, until};
use moesaic_transport::channel::{channel, to_address};
use moesaic_transport::grpc::{Routers, placer_service, replica_service};
use moesaic_transport::{
    Directory, GrpcPlacer, GrpcReplica, MemoryBus, MemoryMetadata, Registration, SocketListener, host,
};
use moesaic_types::boundary::{DeltaStream, PlaceRequest, Placed, Placer, Replica, ReplicaLoad};
use moesaic_types::cluster::{Member, MemberState, Role, Service, Socket};
use moesaic_types::{
    Delta, Error, ErrorCode, GenerateRequest, Priority, ReplicaId, RequestId, Result, SamplingParams, StopConditions,
    TenantSalt,
};
use std::future::ready;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::service::Routes;

/// What a lost server may take to be noticed, and what a busy machine adds to it.
const NOTICED: Duration = Duration::from_millis(3500);

/// A server; its running calls end with the test.
struct Serving {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    task: JoinHandle<Result<()>>,
}

async fn serve(routes: Routes, socket: Option<&Path>) -> Serving {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let socket = socket.map(|path| SocketListener::bind(path).unwrap());
    let (stop, stopped) = watch::channel(false);
    let task = tokio::spawn(moesaic_transport::serve(routes, listener, socket, stopped));
    Serving { address, stop, task }
}

async fn serve_replica(replica: Arc<dyn Replica>) -> Serving {
    serve(Routes::new(replica_service(replica)), None).await
}

fn replica_at(address: SocketAddr) -> GrpcReplica {
    GrpcReplica::new("replica r0", to_address(&format!("http://{address}")).unwrap())
}

/// The services' tasks go on until the test's runtime ends.
async fn reach(replica: Arc<dyn Replica>) -> Arc<dyn Replica> {
    let serving = serve_replica(replica).await;
    let reached = replica_at(serving.address);
    std::mem::forget(serving.stop);
    Arc::new(reached)
}

async fn reach_placer(placer: Arc<dyn Placer>) -> Arc<dyn Placer> {
    let serving = serve(Routes::new(placer_service(placer)), None).await;
    let channel = to_address(&format!("http://{}", serving.address)).unwrap();
    std::mem::forget(serving.stop);
    Arc::new(GrpcPlacer::new("router", channel))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_replica_in_the_process_keeps_the_boundary_s_promises() {
    conformance::replica(ready).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_replica_over_grpc_keeps_the_boundary_s_promises() {
    conformance::replica(reach).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_replica_over_two_hops_keeps_the_boundary_s_promises() {
    conformance::replica(async |replica| reach(reach(replica).await).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn routers_keep_the_boundary_s_promises() {
    conformance::placer(ready).await;
    conformance::placer(reach_placer).await;
}

/// Sends one token and hangs.
struct Hanging {
    open: watch::Sender<usize>,
}

impl Hanging {
    fn new() -> Arc<Self> {
        Arc::new(Self { open: watch::Sender::new(0) })
    }
}

impl Replica for Hanging {
    fn generate(&self, _: GenerateRequest) -> BoxFuture<'_, Result<DeltaStream>> {
        let open = Open::new(&self.open);
        let deltas = stream::iter([Ok(Delta::default())]).chain(stream::pending());
        let deltas = deltas.map(move |delta| (delta, &open).0);
        async move { Ok(deltas.boxed()) }.boxed()
    }

    fn load(&self) -> BoxFuture<'_, Result<ReplicaLoad>> {
        async { Ok(ReplicaLoad::default()) }.boxed()
    }
}

fn request() -> GenerateRequest {
    GenerateRequest {
        id: RequestId::new("r"),
        prompt: vec![1].into(),
        resumed_tokens: 0,
        sampling: SamplingParams::default(),
        stop: StopConditions { max_tokens: 1, ..StopConditions::default() },
        top_logprobs: None,
        prompt_logprobs: false,
        grammar: None,
        priority: Priority::default(),
        deadline: None,
        salt: TenantSalt([0; 16]),
        traceparent: None,
    }
}

async fn first(replica: &dyn Replica) -> DeltaStream {
    let mut deltas = soon("it is accepted", replica.generate(request())).await.unwrap();
    soon("a token", deltas.next()).await.unwrap().unwrap();
    deltas
}

/// The next piece is `Unavailable`, and soon.
async fn is_lost(mut deltas: DeltaStream) {
    let start = Instant::now();
    let error = soon("the loss is noticed", deltas.next()).await.unwrap().unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
    assert!(error.message.starts_with("replica r0: "), "{error}");
    assert!(error.retry_after.is_some());
    assert!(start.elapsed() < NOTICED, "{:?}", start.elapsed());
    assert!(deltas.next().await.is_none(), "an error is the last");
}

/// What a cable does.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cable {
    /// It passes bytes on.
    Whole,
    /// Its connections stay open, and nothing passes.
    Cut,
    /// Its connections are closed and new ones refused, as those of a process that was killed.
    Gone,
}

/// Lays a cable from an address of this host to a server.
async fn lay(from: &str, server: SocketAddr) -> (SocketAddr, watch::Sender<Cable>) {
    let listener = TcpListener::bind(from).await.unwrap();
    let address = listener.local_addr().unwrap();
    let state = watch::Sender::new(Cable::Whole);
    let mut now = state.subscribe();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    tokio::spawn(pass(accepted.unwrap().0, server, now.clone()));
                }
                () = is(&mut now, Cable::Gone) => return,
            }
        }
    });
    (address, state)
}

async fn is(now: &mut watch::Receiver<Cable>, state: Cable) {
    if now.wait_for(|now| *now == state).await.is_err() {
        // the test is over
        std::future::pending::<()>().await;
    }
}

async fn pass(mut client: TcpStream, server: SocketAddr, mut now: watch::Receiver<Cable>) {
    let mut gone = now.clone();
    let passing = async {
        let mut server = TcpStream::connect(server).await.unwrap();
        tokio::select! {
            _ = copy_bidirectional(&mut client, &mut server) => return,
            () = is(&mut now, Cable::Cut) => {}
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = passing => {}
        () = is(&mut gone, Cable::Gone) => {}
    }
}

#[tokio::test]
async fn a_server_that_dies_is_unavailable_at_once_and_found_again_when_it_is_back() {
    let hanging = Hanging::new();
    let serving = serve_replica(hanging.clone()).await;
    let (address, cable) = lay("127.0.0.1:0", serving.address).await;
    let replica = replica_at(address);
    let deltas = first(&replica).await;
    cable.send_replace(Cable::Gone);
    is_lost(deltas).await;
    let start = Instant::now();
    let error = soon("the refusal", replica.load()).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
    assert!(error.message.contains("onnection refused"), "{error}");
    assert!(start.elapsed() < NOTICED, "{:?}", start.elapsed());
    let (_, _again) = lay(&address.to_string(), serving.address).await;
    until("it is back", || async { replica.load().await.is_ok() }).await;
}

#[tokio::test]
async fn a_connection_that_is_cut_is_noticed_at_both_ends() {
    let hanging = Hanging::new();
    let serving = serve_replica(hanging.clone()).await;
    let (address, cable) = lay("127.0.0.1:0", serving.address).await;
    let replica = replica_at(address);
    let deltas = first(&replica).await;
    assert_eq!(*hanging.open.borrow(), 1);
    cable.send_replace(Cable::Cut);
    is_lost(deltas).await;
    let mut open = hanging.open.subscribe();
    soon("the server cancels", open.wait_for(|open| *open == 0)).await.unwrap();
    let start = Instant::now();
    let refused = soon("the refusal", replica.load()).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Unavailable);
    assert!(start.elapsed() < NOTICED, "{:?}", start.elapsed());
}

fn member(address: &str, socket: Option<Socket>) -> Member {
    Member {
        service: Service::Scheduler,
        id: "s0".into(),
        generation: 1,
        address: address.into(),
        socket,
        state: MemberState::Ready,
        role: Role::Plain,
    }
}

#[tokio::test]
async fn a_member_on_the_same_host_is_reached_by_its_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s0.sock");
    let serving = serve(Routes::new(replica_service(Hanging::new())), Some(&path)).await;
    // nobody listens at the address
    let nowhere = "http://127.0.0.1:9";
    let here = Socket { host: host::id().unwrap(), path: path.clone() };
    let replica = GrpcReplica::new("s0", channel(&member(nowhere, Some(here.clone()))).unwrap());
    assert_eq!(soon("the load", replica.load()).await, Ok(ReplicaLoad::default()));
    drop(first(&replica).await);
    assert_eq!(soon("the load", replica_at(serving.address).load()).await, Ok(ReplicaLoad::default()), "by both");
    let there = Socket { host: "another".into(), ..here.clone() };
    let missing = Socket { path: folder.path().join("missing.sock"), ..here };
    for socket in [there, missing] {
        let replica = GrpcReplica::new("s0", channel(&member(nowhere, Some(socket))).unwrap());
        assert_eq!(soon("the refusal", replica.load()).await.unwrap_err().code, ErrorCode::Unavailable);
    }
    serving.stop.send_replace(true);
    soon("it stops", serving.task).await.unwrap().unwrap();
    assert!(!path.exists(), "its socket is gone with it");
}

#[tokio::test]
async fn a_server_that_stops_lets_running_calls_end() {
    let hanging = Hanging::new();
    let serving = serve_replica(hanging.clone()).await;
    let replica = replica_at(serving.address);
    let running = first(&replica).await;
    serving.stop.send_replace(true);
    let other = replica_at(serving.address);
    until("it takes no more", || async { other.load().await.is_err() }).await;
    assert_eq!(*hanging.open.borrow(), 1, "the call goes on");
    assert!(!serving.task.is_finished());
    drop(running);
    soon("it ends with its last call", serving.task).await.unwrap().unwrap();
}

/// A router that sends everything to one replica, or says that there is none.
struct Sure(Option<&'static str>);

impl Placer for Sure {
    fn place(&self, _: PlaceRequest) -> BoxFuture<'_, Result<Placed>> {
        let placed = self.0.map(|id| Placed { replica: ReplicaId::new(id), overlap_blocks: 0 });
        async { placed.ok_or_else(|| Error::unavailable("no replica is ready")) }.boxed()
    }

    fn ready(&self) -> BoxFuture<'_, Result<Vec<ReplicaId>>> {
        let ready = self.0.map(|id| vec![ReplicaId::new(id)]);
        async { ready.ok_or_else(|| Error::new(ErrorCode::Internal, "a bug")) }.boxed()
    }
}

fn place_request() -> PlaceRequest {
    PlaceRequest::new(RequestId::new("r"), 1, 1)
}

#[tokio::test]
async fn any_router_that_answers_will_do() {
    let (metadata, events) = (Arc::new(MemoryMetadata::new()), Arc::new(MemoryBus::new()));
    let lease = Duration::from_secs(60);
    let directory = Directory::start(metadata.clone(), events.clone(), Service::Router, lease);
    let mut views = directory.watch();
    let routers = Routers::new(directory);
    let place =
        || async { soon("an answer", routers.place(place_request())).await.map(|placed| placed.replica.to_string()) };
    assert!(place().await.unwrap_err().message.contains("no router is ready (0 known)"));
    let (a, b) = (Arc::new(Sure(Some("a"))), Arc::new(Sure(Some("b"))));
    let serving =
        [serve(Routes::new(placer_service(a)), None).await, serve(Routes::new(placer_service(b)), None).await];
    let addresses = serving.each_ref().map(|serving| format!("http://{}", serving.address));
    // nobody listens at the last one's
    let places = [("a", &*addresses[0]), ("b", &*addresses[1]), ("dead", "http://127.0.0.1:9")].map(|(id, address)| {
        let member = Member { service: Service::Router, id: id.into(), ..member(address, None) };
        Registration::start(metadata.clone(), events.clone(), member, lease)
    });
    soon("all are known", views.wait_for(|view| view.members.len() == 3)).await.unwrap();
    let mut placed = Vec::new();
    for _ in 0..6 {
        placed.push(place().await.unwrap());
    }
    placed.sort();
    assert!(placed.iter().filter(|id| *id == "a").count() >= 2, "the work is spread: {placed:?}");
    assert!(placed.iter().filter(|id| *id == "b").count() >= 2, "the work is spread: {placed:?}");
    for registration in &places[..2] {
        registration.set_state(MemberState::Draining);
    }
    soon("both drain", views.wait_for(|view| view.ready().count() == 1)).await.unwrap();
    let error = place().await.unwrap_err();
    assert!(error.message.starts_with("router dead: "), "{error}");
    let none = Routes::new(placer_service(Arc::new(Sure(None))));
    let sure = serve(none, None).await;
    let member =
        Member { service: Service::Router, id: "none".into(), ..member(&format!("http://{}", sure.address), None) };
    let _none = Registration::start(metadata, events, member, lease);
    soon("it is known", views.wait_for(|view| view.ready().count() == 2)).await.unwrap();
    assert_eq!(place().await.unwrap_err().code, ErrorCode::Unavailable);
    until("a bug is told as it is", || async {
        routers.ready().await.is_err_and(|error| error.code == ErrorCode::Internal)
    })
    .await;
}

/// A router whose requests wait.
struct Patient(watch::Sender<usize>, Duration);

impl Placer for Patient {
    fn place(&self, _: PlaceRequest) -> BoxFuture<'_, Result<Placed>> {
        let open = Open::new(&self.0);
        let wait = self.1;
        async move {
            tokio::time::sleep(wait).await;
            drop(open);
            Ok(Placed { replica: ReplicaId::new("late"), overlap_blocks: 3 })
        }
        .boxed()
    }

    fn ready(&self) -> BoxFuture<'_, Result<Vec<ReplicaId>>> {
        async { Ok(vec![]) }.boxed()
    }
}

#[tokio::test]
async fn a_request_may_wait_at_a_router_longer_than_a_router_may_say_nothing() {
    let router = Arc::new(Patient(watch::Sender::new(0), Duration::from_secs(3)));
    let serving = serve(Routes::new(placer_service(router.clone())), None).await;
    let placer = GrpcPlacer::new("router", to_address(&format!("http://{}", serving.address)).unwrap());
    let placed = soon("a late answer", placer.place(place_request())).await.unwrap();
    assert_eq!(placed, Placed { replica: ReplicaId::new("late"), overlap_blocks: 3 });

    let mut open = router.0.subscribe();
    let waiting = tokio::spawn(async move { placer.place(place_request()).await });
    soon("it stands in line", open.wait_for(|open| *open == 1)).await.unwrap();
    waiting.abort();
    soon("it left the line", open.wait_for(|open| *open == 0)).await.unwrap();
}

#[tokio::test]
async fn a_request_that_waits_at_a_lost_router_stands_in_line_at_another() {
    let (metadata, events) = (Arc::new(MemoryMetadata::new()), Arc::new(MemoryBus::new()));
    let lease = Duration::from_secs(60);
    let directory = Directory::start(metadata.clone(), events.clone(), Service::Router, lease);
    let mut views = directory.watch();
    let routers = Arc::new(Routers::new(directory));
    let lines = [(); 2].map(|()| Arc::new(Patient(watch::Sender::new(0), Duration::from_secs(600))));
    let mut lives = Vec::new();
    let mut registrations = Vec::new();
    for (id, line) in ["a", "b"].into_iter().zip(&lines) {
        // on a runtime of its own, which can be lost with all that it holds
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let routes = Routes::new(placer_service(line.clone()));
        let serving = runtime.spawn(async { serve(routes, None).await }).await.unwrap();
        std::mem::forget(serving.stop);
        let member =
            Member { service: Service::Router, id: id.into(), ..member(&format!("http://{}", serving.address), None) };
        registrations.push(Registration::start(metadata.clone(), events.clone(), member, lease));
        lives.push(Some(runtime));
    }
    soon("both are known", views.wait_for(|view| view.members.len() == 2)).await.unwrap();
    let waiting = tokio::spawn(async move { routers.place(place_request()).await });
    let stands = || async { lines.iter().position(|line| *line.0.borrow() == 1) };
    until("it stands in line", || async { stands().await.is_some() }).await;
    let first = stands().await.unwrap();
    lives[first].take().unwrap().shutdown_background();
    until("it stands in the other's line", || async { *lines[1 - first].0.borrow() == 1 }).await;
    waiting.abort();
    until("it left", || async { *lines[1 - first].0.borrow() == 0 }).await;
    for life in lives.into_iter().flatten() {
        life.shutdown_background();
    }
}

/// Lays a cable whose first connection breaks when something is sent on it: as one that broke while nobody looked.
async fn lay_with_a_break(server: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let whole = watch::Sender::new(Cable::Whole);
    tokio::spawn(async move {
        let (first, _) = listener.accept().await.unwrap();
        first.readable().await.unwrap();
        drop(first);
        loop {
            tokio::spawn(pass(listener.accept().await.unwrap().0, server, whole.subscribe()));
        }
    });
    address
}

#[tokio::test]
async fn a_router_behind_a_broken_connection_is_asked_again() {
    let serving = serve(Routes::new(placer_service(Arc::new(Sure(Some("a"))))), None).await;
    for is_placed in [true, false] {
        let address = format!("http://{}", lay_with_a_break(serving.address).await);
        let router = GrpcPlacer::new("router r0", channel(&member(&address, None)).unwrap());
        match is_placed {
            true => assert_eq!(soon("a place", router.place(place_request())).await.unwrap().replica.to_string(), "a"),
            false => assert_eq!(soon("a list", router.ready()).await.unwrap().len(), 1),
        }
    }
    drop(serving.stop);
    let router = GrpcPlacer::new("router r0", channel(&member("http://127.0.0.1:9", None)).unwrap());
    let error = soon("a refusal", router.place(place_request())).await.unwrap_err();
    assert!(error.code == ErrorCode::Unavailable && error.message.starts_with("router r0: "), "{error}");
}
