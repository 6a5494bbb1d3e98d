//! `moesaic.kv.v1`: schedulers and other nodes read and offer blocks.
use crate::app::KvStore;
use crate::cluster::Joined;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use moesaic_proto::kv::v1 as wire;
use moesaic_proto::kv::v1::kv_store_service_server::{KvStoreService, KvStoreServiceServer};
use moesaic_proto::{Offered, chain_from_wire, into_status};
use moesaic_telemetry::propagation::{extract_metadata, set_parent};
use moesaic_transport::channel::MAX_MESSAGE;
use moesaic_types::boundary::PrefixStore;
use moesaic_types::{Error, Result};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tonic::{Request, Response, Status, Streaming};
use tracing::{Instrument, Span};

/// The longest pin.
const LONGEST_PIN: Duration = Duration::from_secs(600);

/// A call that offers nothing for so long is ended: it holds a place.
const IDLE: Duration = Duration::from_secs(30);

/// Serves a store to other processes.
pub struct KvService {
    store: Arc<KvStore>,
    joined: Option<Arc<Joined>>,
    streams: Arc<Semaphore>,
    max_streams: usize,
}

/// The gRPC service of a store; `joined`: its part in a cluster, which copies blocks to other nodes. Blocks are moved by
/// `max_streams` calls at once, each of which holds a group of the store's own blocks, or one that comes.
pub fn kv_service(
    store: Arc<KvStore>,
    joined: Option<Arc<Joined>>,
    max_streams: usize,
) -> KvStoreServiceServer<KvService> {
    let streams = Arc::new(Semaphore::new(max_streams));
    let service = KvStoreServiceServer::new(KvService { store, joined, streams, max_streams });
    service.max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE)
}

impl KvService {
    fn stream(&self) -> Result<OwnedSemaphorePermit, Status> {
        let place = Arc::clone(&self.streams).try_acquire_owned();
        place.map_err(|_| {
            let message = format!("{} calls move blocks already; the limit is kv_store.max_streams", self.max_streams);
            into_status(Error::exhausted(message, Duration::from_secs(1)))
        })
    }
}

fn chain_of<T>(
    request: Request<T>,
    span: &Span,
    chain: impl FnOnce(&T) -> &[u8],
) -> Result<(T, Vec<moesaic_types::BlockHash>), Status> {
    set_parent(span, extract_metadata(request.metadata()));
    let message = request.into_inner();
    let chain = chain_from_wire(chain(&message)).map_err(into_status)?;
    Ok((message, chain))
}

/// Offers of one call, one after another.
struct Offers {
    requests: Streaming<wire::OfferRequest>,
    store: Arc<KvStore>,
    joined: Option<Arc<Joined>>,
    _place: OwnedSemaphorePermit,
}

impl Offers {
    async fn next(&mut self) -> Result<Option<wire::OfferResponse>, Status> {
        let Ok(request) = timeout(IDLE, self.requests.message()).await else { return Ok(None) };
        let Some(request) = request? else { return Ok(None) };
        let Offered { link, block, replicate } = request.try_into().map_err(into_status)?;
        let stored = self.store.offer(link, block.clone()).await.map_err(into_status)?;
        if let Some(joined) = self.joined.as_ref().filter(|_| stored && replicate) {
            joined.copy(link, block);
        }
        Ok(Some(wire::OfferResponse { stored }))
    }
}

#[tonic::async_trait]
impl KvStoreService for KvService {
    async fn longest(&self, request: Request<wire::LongestRequest>) -> Result<Response<wire::LongestResponse>, Status> {
        let span = tracing::info_span!("kv longest");
        let (_, chain) = chain_of(request, &span, |request| &request.chain)?;
        let (blocks, in_ram) = self.store.longest_by_tier(chain).instrument(span).await.map_err(into_status)?;
        Ok(Response::new(wire::LongestResponse { blocks: blocks as u32, in_ram: in_ram as u32 }))
    }

    type FetchStream = BoxStream<'static, Result<wire::FetchResponse, Status>>;

    async fn fetch(&self, request: Request<wire::FetchRequest>) -> Result<Response<Self::FetchStream>, Status> {
        let span = tracing::info_span!("kv fetch", blocks = tracing::field::Empty);
        let (_, chain) = chain_of(request, &span, |request| &request.chain)?;
        span.record("blocks", chain.len());
        let place = self.stream()?;
        let blocks = self.store.blocks(chain).map(move |block| {
            let _held = (&place, &span);
            block.map(|block| wire::FetchResponse { block }).map_err(into_status)
        });
        Ok(Response::new(blocks.boxed()))
    }

    type OfferStream = BoxStream<'static, Result<wire::OfferResponse, Status>>;

    async fn offer(
        &self,
        request: Request<Streaming<wire::OfferRequest>>,
    ) -> Result<Response<Self::OfferStream>, Status> {
        let place = self.stream()?;
        let (store, joined) = (Arc::clone(&self.store), self.joined.clone());
        let offers = Offers { requests: request.into_inner(), store, joined, _place: place };
        let answers =
            stream::try_unfold(
                offers,
                |mut offers| async move { Ok(offers.next().await?.map(|answer| (answer, offers))) },
            );
        Ok(Response::new(answers.boxed()))
    }

    async fn pin(&self, request: Request<wire::PinRequest>) -> Result<Response<wire::PinResponse>, Status> {
        let span = tracing::debug_span!("kv pin");
        let (message, chain) = chain_of(request, &span, |request| &request.chain)?;
        let for_ = Duration::from_millis(message.for_ms.into());
        if for_ > LONGEST_PIN {
            let message = format!("for_ms is {}; use {} at most", message.for_ms, LONGEST_PIN.as_millis());
            return Err(into_status(Error::invalid("for_ms", message)));
        }
        let pinned = self.store.pin(chain, for_).instrument(span).await.map_err(into_status)?;
        Ok(Response::new(wire::PinResponse { pinned: pinned as u32 }))
    }

    async fn forget(&self, request: Request<wire::ForgetRequest>) -> Result<Response<wire::ForgetResponse>, Status> {
        let span = tracing::info_span!("kv forget");
        let (_, blocks) = chain_of(request, &span, |request| &request.chain)?;
        let forgotten = self.store.drop_blocks(blocks).instrument(span).await.map_err(into_status)?;
        tracing::warn!(forgotten, "a scheduler found blocks that are wrong; they are dropped");
        Ok(Response::new(wire::ForgetResponse { forgotten: forgotten as u32 }))
    }
}
