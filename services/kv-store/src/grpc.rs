//! `moesaic.kv.v1`: schedulers and other nodes read and offer blocks.
use crate::app::KvStore;
use crate::budget::{Budget, Room};
use crate::cluster::Joined;
use crate::config::Config;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use moesaic_proto::kv::v1 as wire;
use moesaic_proto::kv::v1::kv_store_service_server::{KvStoreService, KvStoreServiceServer};
use moesaic_proto::{Offered, chain_from_wire, into_status};
use moesaic_telemetry::count;
use moesaic_telemetry::propagation::{extract_metadata, set_parent};
use moesaic_transport::channel::MAX_MESSAGE;
use moesaic_types::boundary::PrefixStore;
use moesaic_types::{Error, Result};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{Instrument, Span};

/// The longest pin.
const LONGEST_PIN: Duration = Duration::from_secs(600);

/// Serves a store to other processes.
pub struct KvService {
    store: Arc<KvStore>,
    joined: Option<Arc<Joined>>,
    streams: Arc<Semaphore>,
    max_streams: usize,
    budget: Arc<Budget>,
    /// A call that moves no block for so long is ended.
    idle: Duration,
}

/// The gRPC service of a store; `joined`: its part in a cluster, which copies blocks to other nodes.
pub fn kv_service(
    store: Arc<KvStore>,
    joined: Option<Arc<Joined>>,
    config: &Config,
) -> KvStoreServiceServer<KvService> {
    let max_streams = config.max_streams;
    let streams = Arc::new(Semaphore::new(max_streams));
    let budget = Arc::new(Budget::new(config.transfer_memory.bytes(), MAX_MESSAGE as u64));
    let idle = config.stream_idle.get();
    let service = KvStoreServiceServer::new(KvService { store, joined, streams, max_streams, budget, idle });
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
    budget: Arc<Budget>,
    idle: Duration,
    _place: OwnedSemaphorePermit,
}

impl Offers {
    async fn next(&mut self) -> Result<Option<wire::OfferResponse>, Status> {
        // before it comes: what is not read waits at its sender
        let mut room = reserve(&self.budget, self.idle).await?;
        let Ok(request) = timeout(self.idle, self.requests.message()).await else { return Ok(None) };
        let Some(request) = request? else { return Ok(None) };
        let Offered { link, block, replicate } = request.try_into().map_err(into_status)?;
        room.fit(block.len());
        let stored = self.store.offer(link, block.clone()).await.map_err(into_status)?;
        if let Some(joined) = self.joined.as_ref().filter(|_| stored && replicate) {
            joined.copy(link, block);
        }
        Ok(Some(wire::OfferResponse { stored }))
    }
}

/// Room for a block, unless it takes too long.
async fn reserve(budget: &Arc<Budget>, idle: Duration) -> Result<Room, Status> {
    timeout(idle, budget.reserve()).await.map_err(|_| {
        let message = "other blocks take all of kv_store.transfer_memory";
        into_status(Error::exhausted(message, Duration::from_secs(1)))
    })
}

/// A block on its way to a reader, until it is taken by it, or taken back.
type Slot = Arc<Mutex<Option<(Bytes, Room)>>>;

fn take(slot: &Slot) -> Option<(Bytes, Room)> {
    slot.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Sends a chain's blocks, each as soon as the one before was taken. Ends when the reader is gone, or takes nothing for
/// too long.
async fn send(
    mut blocks: BoxStream<'static, Result<Bytes>>,
    budget: Arc<Budget>,
    idle: Duration,
    reader: mpsc::Sender<Result<Slot, Status>>,
) {
    let mut last = Slot::default();
    loop {
        let Ok(place) = timeout(idle, reader.reserve()).await else {
            // what it did not take is not kept for it
            drop(take(&last));
            return;
        };
        let Ok(place) = place else { return };
        let next = async {
            let mut room = reserve(&budget, idle).await?;
            let block = blocks.next().await.transpose().map_err(into_status)?;
            Ok(block.map(|block| {
                room.fit(block.len());
                Arc::new(Mutex::new(Some((block, room))))
            }))
        };
        match next.await {
            Ok(Some(slot)) => {
                last = Arc::clone(&slot);
                place.send(Ok(slot));
            }
            Ok(None) => return,
            Err(status) => {
                place.send(Err(status));
                return;
            }
        }
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
        span.record("blocks", count(chain.len()));
        let place = self.stream()?;
        let (sender, slots) = mpsc::channel(1);
        let sending = send(self.store.blocks(chain), Arc::clone(&self.budget), self.idle, sender);
        tokio::spawn(sending.instrument(span));
        let mut held = None;
        let blocks = ReceiverStream::new(slots).map(move |slot| {
            let _place = &place;
            // the one before has left
            drop(held.take());
            let (block, room) = take(&slot?).ok_or_else(|| Status::aborted("the blocks were not read in time"))?;
            held = Some(room);
            Ok(wire::FetchResponse { block })
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
        let (budget, idle) = (Arc::clone(&self.budget), self.idle);
        let offers = Offers { requests: request.into_inner(), store, joined, budget, idle, _place: place };
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
