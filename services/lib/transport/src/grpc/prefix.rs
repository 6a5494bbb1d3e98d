//! `PrefixStore` over `moesaic.kv.v1`.
use super::{explain, traced};
use crate::channel::MAX_MESSAGE;
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{self, BoxStream, StreamExt};
use moesaic_proto::kv::v1 as wire;
use moesaic_proto::kv::v1::kv_store_service_client::KvStoreServiceClient;
use moesaic_proto::kv::v1::kv_store_service_server::{KvStoreService, KvStoreServiceServer};
use moesaic_proto::{hashes_from_wire, hashes_to_wire, into_status};
use moesaic_telemetry::propagation::{extract_metadata, set_parent};
use moesaic_types::boundary::PrefixStore;
use moesaic_types::{BlockHash, Error, ErrorCode, Result};
use std::sync::Arc;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;

/// A kv-store in another process; cheap to clone.
#[derive(Clone, Debug)]
pub struct GrpcPrefixStore {
    peer: Arc<str>,
    client: KvStoreServiceClient<Channel>,
}

impl GrpcPrefixStore {
    /// A kv-store behind a channel; `peer` names it in errors.
    pub fn new(peer: &str, channel: Channel) -> Self {
        let client = KvStoreServiceClient::new(channel);
        let client = client.max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE);
        Self { peer: peer.into(), client }
    }
}

impl PrefixStore for GrpcPrefixStore {
    fn longest(&self, chain: &[BlockHash]) -> BoxFuture<'_, Result<usize>> {
        let request = traced(wire::LongestRequest { chain: hashes_to_wire(chain) });
        async move {
            let longest = self.client.clone().longest(request).await;
            longest.map(|longest| longest.into_inner().blocks as usize).map_err(|status| explain(&self.peer, &status))
        }
        .boxed()
    }

    fn fetch(&self, chain: &[BlockHash]) -> BoxFuture<'_, Result<Vec<Bytes>>> {
        let (request, most) = (traced(wire::FetchRequest { chain: hashes_to_wire(chain) }), chain.len());
        async move {
            let failed = |status: Status| explain(&self.peer, &status);
            let mut blocks = self.client.clone().fetch(request).await.map_err(failed)?.into_inner();
            let mut fetched = Vec::new();
            while let Some(wire::FetchResponse { block }) = blocks.message().await.map_err(failed)? {
                if fetched.len() == most {
                    return Err(Error::internal(format!("{}: more than the {most} blocks asked for", self.peer)));
                }
                fetched.push(block);
            }
            Ok(fetched)
        }
        .boxed()
    }

    fn offer(&self, hash: BlockHash, bytes: Bytes) -> BoxFuture<'_, Result<bool>> {
        let offer = wire::OfferRequest { hash: Bytes::copy_from_slice(&hash.0), block: bytes, replicate: true };
        async move {
            let failed = |status: Status| explain(&self.peer, &status);
            let mut answers =
                self.client.clone().offer(traced(stream::iter([offer]))).await.map_err(failed)?.into_inner();
            let answer = answers.message().await.map_err(failed)?;
            let unanswered = || Error::unavailable(format!("{}: an offer was not answered", self.peer));
            Ok(answer.ok_or_else(unanswered)?.stored)
        }
        .boxed()
    }
}

/// Serves a kv-store to other processes.
#[derive(Debug)]
pub struct PrefixService<S: ?Sized>(Arc<S>);

/// The gRPC service of a kv-store. It does not pin blocks.
pub fn prefix_service<S: PrefixStore + ?Sized>(store: Arc<S>) -> KvStoreServiceServer<PrefixService<S>> {
    let service = KvStoreServiceServer::new(PrefixService(store));
    service.max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE)
}

fn chain(bytes: &[u8]) -> Result<Vec<BlockHash>, Status> {
    hashes_from_wire("chain", bytes).map_err(into_status)
}

fn hash(bytes: &[u8]) -> Result<BlockHash, Error> {
    let bytes = bytes
        .try_into()
        .map_err(|_| Error::invalid("hash", format!("hash has {} bytes; the name of a block has 16", bytes.len())))?;
    Ok(BlockHash(bytes))
}

#[tonic::async_trait]
impl<S: PrefixStore + ?Sized> KvStoreService for PrefixService<S> {
    type FetchStream = BoxStream<'static, Result<wire::FetchResponse, Status>>;
    type OfferStream = BoxStream<'static, Result<wire::OfferResponse, Status>>;

    async fn longest(&self, request: Request<wire::LongestRequest>) -> Result<Response<wire::LongestResponse>, Status> {
        let span = tracing::debug_span!("longest");
        set_parent(&span, extract_metadata(request.metadata()));
        let chain = chain(&request.into_inner().chain)?;
        let blocks = self.0.longest(&chain).instrument(span).await.map_err(into_status)?;
        let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
        // all that this store keeps is in RAM
        Ok(Response::new(wire::LongestResponse { blocks, in_ram: blocks }))
    }

    async fn fetch(&self, request: Request<wire::FetchRequest>) -> Result<Response<Self::FetchStream>, Status> {
        let span = tracing::info_span!("fetch");
        set_parent(&span, extract_metadata(request.metadata()));
        let chain = chain(&request.into_inner().chain)?;
        let blocks = self.0.fetch(&chain).instrument(span).await.map_err(into_status)?;
        let blocks = blocks.into_iter().map(|block| Ok(wire::FetchResponse { block }));
        Ok(Response::new(stream::iter(blocks).boxed()))
    }

    async fn offer(
        &self,
        request: Request<Streaming<wire::OfferRequest>>,
    ) -> Result<Response<Self::OfferStream>, Status> {
        let store = Arc::clone(&self.0);
        let answers = request.into_inner().then(move |offer| {
            let store = Arc::clone(&store);
            async move {
                let wire::OfferRequest { hash: name, block, .. } = offer?;
                let stored = store.offer(hash(&name).map_err(into_status)?, block).await.map_err(into_status)?;
                Ok(wire::OfferResponse { stored })
            }
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn pin(&self, _: Request<wire::PinRequest>) -> Result<Response<wire::PinResponse>, Status> {
        let message = "this kv-store does not pin blocks; they stay as long as they are used";
        Err(into_status(Error::new(ErrorCode::Unimplemented, message)))
    }
}
