//! `Placer` over `moesaic.router.v1`.
use super::{explain, traced};
use crate::channel::MAX_MESSAGE;
use futures::future::{BoxFuture, FutureExt};
use moesaic_proto::into_status;
use moesaic_proto::router::v1 as wire;
use moesaic_proto::router::v1::router_service_client::RouterServiceClient;
use moesaic_proto::router::v1::router_service_server::{RouterService, RouterServiceServer};
use moesaic_telemetry::propagation::{extract_metadata, set_parent};
use moesaic_types::boundary::{PlaceRequest, Placed, Placer};
use moesaic_types::{ReplicaId, Result};
use std::sync::Arc;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};
use tracing::Instrument;

/// A router in another process; cheap to clone.
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
}

impl Placer for GrpcPlacer {
    fn place(&self, request: PlaceRequest) -> BoxFuture<'_, Result<Placed>> {
        async move {
            let placed = self.client.clone().place(traced(request.into())).await;
            placed.map(|placed| placed.into_inner().into()).map_err(|status| explain(&self.peer, &status))
        }
        .boxed()
    }

    fn ready(&self) -> BoxFuture<'_, Result<Vec<ReplicaId>>> {
        async move {
            let ready = self.client.clone().list_ready(traced(wire::ListReadyRequest {})).await;
            let ready = ready.map_err(|status| explain(&self.peer, &status))?.into_inner();
            Ok(ready.replicas.into_iter().map(ReplicaId::new).collect())
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

#[tonic::async_trait]
impl<P: Placer + ?Sized> RouterService for PlacerService<P> {
    async fn place(&self, request: Request<wire::PlaceRequest>) -> Result<Response<wire::PlaceResponse>, Status> {
        let span = tracing::info_span!("place");
        set_parent(&span, extract_metadata(request.metadata()));
        let request = PlaceRequest::try_from(request.into_inner()).map_err(into_status)?;
        let placed = self.0.place(request).instrument(span).await.map_err(into_status)?;
        Ok(Response::new(placed.into()))
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
