//! `Placer` over `moesaic.router.v1`.
use super::{explain, traced};
use crate::channel::MAX_MESSAGE;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{self, BoxStream, Stream, StreamExt};
use moesaic_proto::router::v1 as wire;
use moesaic_proto::router::v1::router_service_client::RouterServiceClient;
use moesaic_proto::router::v1::router_service_server::{RouterService, RouterServiceServer};
use moesaic_proto::{from_status, into_status};
use moesaic_telemetry::propagation::{extract_metadata, set_parent};
use moesaic_types::boundary::{PlaceRequest, Placed, Placer};
use moesaic_types::{Error, ErrorCode, ReplicaId, Result};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, interval_at, sleep, timeout};
use tonic::transport::Channel;
use tonic::{Request, Response, Status};
use tracing::Instrument;

/// How long a router may say nothing.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often a router says that a request still waits.
const STILL_WAITS: Duration = Duration::from_millis(500);

/// Before a call is made again whose connection failed.
const PAUSES: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(20)];

/// A router in another process; cheap to clone. One that says nothing for two seconds is `Unavailable`; a request that
/// waits there is spoken of.
#[derive(Clone, Debug)]
pub struct GrpcPlacer {
    peer: Arc<str>,
    client: RouterServiceClient<Channel>,
}

impl GrpcPlacer {
    /// A router behind a channel; `peer` names it in errors.
    pub fn new(peer: &str, channel: Channel) -> Self {
        let client = RouterServiceClient::new(channel);
        let client = client.max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE);
        Self { peer: peer.into(), client }
    }

    /// Makes a call, and again where the connection failed: one that broke while nobody looked is noticed by the calls
    /// on it, and the next has a new one. A decision that nobody heard of costs nothing.
    async fn call<T, F>(&self, call: impl Fn(RouterServiceClient<Channel>) -> F) -> Result<T>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        // a router that refuses says so in details
        let is_broken =
            |status: &Status| status.details().is_empty() && from_status(status).code == ErrorCode::Unavailable;
        let called = async {
            let mut answer = call(self.client.clone()).await;
            for pause in PAUSES {
                if !answer.as_ref().is_err_and(is_broken) {
                    break;
                }
                sleep(pause).await;
                answer = call(self.client.clone()).await;
            }
            answer.map(Response::into_inner)
        };
        self.heard(called).await
    }

    /// What a router says, if it says it in time: one that hangs is as good as gone.
    async fn heard<T>(&self, said: impl Future<Output = Result<T, Status>>) -> Result<T> {
        let late = |_| Error::unavailable(format!("{} did not answer within {PATIENCE:?}", self.peer));
        timeout(PATIENCE, said).await.map_err(late)?.map_err(|status| explain(&self.peer, &status))
    }
}

impl Placer for GrpcPlacer {
    fn place(&self, request: PlaceRequest) -> BoxFuture<'_, Result<Placed>> {
        async move {
            let request = wire::PlaceRequest::from(request);
            let place = |mut client: RouterServiceClient<Channel>| {
                let request = traced(request.clone());
                async move { client.place(request).await }
            };
            let mut words = self.call(place).await?;
            while let Some(word) = self.heard(words.message()).await? {
                if let Some(placed) = word.placed() {
                    return Ok(placed);
                }
            }
            Err(Error::unavailable(format!("{} said nothing; send the request again", self.peer)))
        }
        .boxed()
    }

    fn ready(&self) -> BoxFuture<'_, Result<Vec<ReplicaId>>> {
        async move {
            let list = |mut client: RouterServiceClient<Channel>| async move {
                client.list_ready(traced(wire::ListReadyRequest {})).await
            };
            Ok(self.call(list).await?.replicas.into_iter().map(ReplicaId::new).collect())
        }
        .boxed()
    }
}

/// Serves a router to other processes.
#[derive(Debug)]
pub struct PlacerService<P: ?Sized>(Arc<P>);

/// The gRPC service of a router.
pub fn placer_service<P: Placer + ?Sized>(placer: Arc<P>) -> RouterServiceServer<PlacerService<P>> {
    let service = RouterServiceServer::new(PlacerService(placer));
    service.max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE)
}

/// That the request waits, every so often, and then where it goes. Dropping the stream drops the placing.
fn words(placing: BoxFuture<'static, Result<Placed>>) -> impl Stream<Item = Result<wire::PlaceResponse, Status>> {
    let ticks = interval_at(Instant::now() + STILL_WAITS, STILL_WAITS);
    stream::unfold(Some((placing, ticks)), |state| async {
        let (mut placing, mut ticks) = state?;
        // both are cancel-safe
        tokio::select! {
            placed = &mut placing => Some((placed.map(Into::into).map_err(into_status), None)),
            _ = ticks.tick() => Some((Ok(wire::PlaceResponse::waiting()), Some((placing, ticks)))),
        }
    })
}

#[tonic::async_trait]
impl<P: Placer + ?Sized> RouterService for PlacerService<P> {
    type PlaceStream = BoxStream<'static, Result<wire::PlaceResponse, Status>>;

    async fn place(&self, request: Request<wire::PlaceRequest>) -> Result<Response<Self::PlaceStream>, Status> {
        let span = tracing::info_span!("place");
        set_parent(&span, extract_metadata(request.metadata()));
        let request = PlaceRequest::try_from(request.into_inner()).map_err(into_status)?;
        let placer = Arc::clone(&self.0);
        let placing = async move { placer.place(request).await }.instrument(span).boxed();
        Ok(Response::new(words(placing).boxed()))
    }

    async fn list_ready(
        &self,
        request: Request<wire::ListReadyRequest>,
    ) -> Result<Response<wire::ListReadyResponse>, Status> {
        let span = tracing::debug_span!("list_ready");
        set_parent(&span, extract_metadata(request.metadata()));
        let ready = self.0.ready().instrument(span).await.map_err(into_status)?;
        let replicas = ready.iter().map(ToString::to_string).collect();
        Ok(Response::new(wire::ListReadyResponse { replicas }))
    }
}
