//! `Replica` over `moesaic.scheduler.v1`.
use super::answers::{Answer, Answers};
use super::{explain, traced};
use crate::channel::MAX_MESSAGE;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{self, BoxStream, StreamExt};
use moesaic_proto::into_status;
use moesaic_proto::scheduler::v1 as wire;
use moesaic_proto::scheduler::v1::scheduler_service_client::SchedulerServiceClient;
use moesaic_proto::scheduler::v1::scheduler_service_server::{SchedulerService, SchedulerServiceServer};
use moesaic_telemetry::propagation::{TRACEPARENT, extract_metadata, set_parent};
use moesaic_types::boundary::{DeltaStream, Replica, ReplicaLoad};
use moesaic_types::{Delta, GenerateRequest, RequestId, Result};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;

/// How long a call that has said enough is kept for the replica to hear it.
const HEARD_WITHIN: Duration = Duration::from_secs(2);

/// A scheduler in another process; cheap to clone. Dropping a request or its stream cancels it over there.
#[derive(Clone, Debug)]
pub struct GrpcReplica {
    peer: Arc<str>,
    client: SchedulerServiceClient<Channel>,
    answers: Arc<Answers<Streaming<wire::GenerateResponse>>>,
}

impl GrpcReplica {
    /// A replica behind a channel; `peer` names it in errors.
    pub fn new(peer: &str, channel: Channel) -> Self {
        let client = SchedulerServiceClient::new(channel);
        let client = client.max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE);
        Self { peer: peer.into(), client, answers: Arc::default() }
    }
}

impl Replica for GrpcReplica {
    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<DeltaStream>> {
        async move {
            let (id, traceparent) = (request.id.clone(), request.traceparent.clone());
            let mut call = traced(wire::GenerateRequest::from(request));
            // the request's own trace, where it has one: the caller's span may be another
            if let Some(traceparent) = traceparent.and_then(|text| MetadataValue::try_from(text).ok()) {
                call.metadata_mut().insert(TRACEPARENT, traceparent);
            }
            let answer = self.client.clone().generate(call).await;
            let answer = answer.map_err(|status| explain(&self.peer, &status))?;
            Ok(deltas(Arc::clone(&self.peer), self.answers.enter(id, answer.into_inner())))
        }
        .boxed()
    }

    fn enough(&self, id: &RequestId) {
        let Some(inheritance) = self.answers.inherit(id) else { return };
        let (mut client, id) = (self.client.clone(), id.to_string());
        tokio::spawn(async move {
            let told = client.enough(traced(wire::EnoughRequest { id }));
            // a replica that does not hear it counts a cancellation, which is all
            let _ = timeout(HEARD_WITHIN, told).await;
            drop(inheritance);
        });
    }

    fn load(&self) -> BoxFuture<'_, Result<ReplicaLoad>> {
        async move {
            let load = self.client.clone().get_load(traced(wire::GetLoadRequest {})).await;
            load.map(|load| load.into_inner().into()).map_err(|status| explain(&self.peer, &status))
        }
        .boxed()
    }
}

/// The pieces as they come; an error is the last.
fn deltas(peer: Arc<str>, pieces: Answer<Streaming<wire::GenerateResponse>>) -> DeltaStream {
    stream::unfold(Some(pieces), move |pieces| {
        let peer = Arc::clone(&peer);
        async move {
            let mut pieces = pieces?;
            let delta = match pieces.call().message().await {
                Ok(Some(piece)) => Delta::try_from(piece),
                Ok(None) => return None,
                Err(status) => Err(explain(&peer, &status)),
            };
            let rest = delta.is_ok().then_some(pieces);
            Some((delta, rest))
        }
    })
    .boxed()
}

/// Serves a replica to other processes.
#[derive(Debug)]
pub struct ReplicaService<R: ?Sized>(Arc<R>);

/// The gRPC service of a replica.
pub fn replica_service<R: Replica + ?Sized>(replica: Arc<R>) -> SchedulerServiceServer<ReplicaService<R>> {
    let service = SchedulerServiceServer::new(ReplicaService(replica));
    service.max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE)
}

#[tonic::async_trait]
impl<R: Replica + ?Sized> SchedulerService for ReplicaService<R> {
    type GenerateStream = BoxStream<'static, Result<wire::GenerateResponse, Status>>;

    async fn generate(
        &self,
        request: Request<wire::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let traceparent = request.metadata().get(TRACEPARENT).and_then(|text| text.to_str().ok()).map(str::to_owned);
        let request = GenerateRequest::try_from(request.into_inner()).map_err(into_status)?;
        let request = GenerateRequest { traceparent, ..request };
        let deltas = self.0.generate(request).await.map_err(into_status)?;
        Ok(Response::new(deltas.map(|delta| delta.map(Into::into).map_err(into_status)).boxed()))
    }

    async fn enough(&self, request: Request<wire::EnoughRequest>) -> Result<Response<wire::EnoughResponse>, Status> {
        let id = RequestId::new(request.into_inner().id);
        self.0.enough(&id);
        Ok(Response::new(wire::EnoughResponse {}))
    }

    async fn get_load(
        &self,
        request: Request<wire::GetLoadRequest>,
    ) -> Result<Response<wire::GetLoadResponse>, Status> {
        let span = tracing::debug_span!("get_load");
        set_parent(&span, extract_metadata(request.metadata()));
        let load = self.0.load().instrument(span).await.map_err(into_status)?;
        Ok(Response::new(load.into()))
    }
}
