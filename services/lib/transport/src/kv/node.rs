//! One kv-store over gRPC.
use crate::channel::{MAX_MESSAGE, bulk_channel};
use crate::grpc::{explain, traced};
use bytes::Bytes;
use futures::stream;
use moesaic_proto::kv::v1 as wire;
use moesaic_proto::kv::v1::kv_store_service_client::KvStoreServiceClient;
use moesaic_proto::{hashes_to_wire, offer_to_wire};
use moesaic_types::cluster::Member;
use moesaic_types::{BlockHash, Error, ErrorCode, Link, Result};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, timeout};
use tonic::Streaming;
use tonic::transport::Channel;

/// A node that did not answer is left alone for so long: others should not wait for it as well.
const REST: Duration = Duration::from_secs(3);

/// A kv-store; cheap to clone.
#[derive(Clone, Debug)]
pub struct KvNode {
    name: Arc<str>,
    client: KvStoreServiceClient<Channel>,
    /// Longest wait for an answer, or for the next piece of one.
    patience: Duration,
    resting: Arc<Mutex<Option<Instant>>>,
}

impl KvNode {
    /// A member. It connects when it is first asked.
    ///
    /// # Errors
    /// `InvalidArgument` when the member's address is none.
    pub fn new(member: &Member, patience: Duration) -> Result<Self> {
        let client = KvStoreServiceClient::new(bulk_channel(member)?);
        let client = client.max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE);
        let name = format!("{} {}", member.service, member.id).into();
        Ok(Self { name, client, patience, resting: Arc::default() })
    }

    /// Whether it answered when it was last asked, or that was long ago.
    pub fn is_usable(&self) -> bool {
        let resting = self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        resting.is_none_or(|until| until <= Instant::now())
    }

    /// Waits for an answer; where none comes, the node rests.
    async fn within<T>(&self, answer: impl Future<Output = Result<T, tonic::Status>>) -> Result<T> {
        let answer = match timeout(self.patience, answer).await {
            Ok(answer) => answer.map_err(|status| explain(&self.name, &status)),
            Err(_) => Err(Error::unavailable(format!("{} did not answer within {:?}", self.name, self.patience))),
        };
        let is_away = answer.as_ref().is_err_and(|error| error.code == ErrorCode::Unavailable);
        let mut resting = self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        *resting = is_away.then(|| Instant::now() + REST);
        answer
    }

    /// How many blocks of a chain it has, from the chain's start.
    ///
    /// # Errors
    /// `Unavailable` when it does not answer.
    pub async fn longest(&self, chain: &[BlockHash]) -> Result<usize> {
        let mut client = self.client.clone();
        let call = client.longest(traced(wire::LongestRequest { chain: hashes_to_wire(chain) }));
        let answer = self.within(call).await?.into_inner();
        Ok(chain.len().min(answer.blocks as usize))
    }

    /// A chain's blocks.
    ///
    /// # Errors
    /// `Unavailable` when it does not answer.
    pub async fn fetch(&self, chain: &[BlockHash]) -> Result<Blocks> {
        let mut client = self.client.clone();
        let call = client.fetch(traced(wire::FetchRequest { chain: hashes_to_wire(chain) }));
        let blocks = self.within(call).await?.into_inner();
        Ok(Blocks { node: self.clone(), blocks })
    }

    /// Offers a block; whether it was taken. The node copies it to others where `replicate` says so.
    ///
    /// # Errors
    /// `Unavailable` when it does not answer, `ResourceExhausted` when it has too much to do.
    pub async fn offer(&self, link: &Link, block: Bytes, replicate: bool) -> Result<bool> {
        let mut client = self.client.clone();
        let offer = offer_to_wire(link, block, replicate);
        let answer = async {
            let mut answers = client.offer(traced(stream::iter([offer]))).await?.into_inner();
            answers.message().await
        };
        Ok(self.within(answer).await?.is_some_and(|answer| answer.stored))
    }

    /// Keeps a chain's blocks from eviction for a while; 0 ends that. How many, from the chain's start.
    ///
    /// # Errors
    /// `Unavailable` when it does not answer.
    pub async fn pin(&self, chain: &[BlockHash], for_: Duration) -> Result<usize> {
        let mut client = self.client.clone();
        let for_ms = for_.as_millis().try_into().unwrap_or(u32::MAX);
        let call = client.pin(traced(wire::PinRequest { chain: hashes_to_wire(chain), for_ms }));
        Ok(self.within(call).await?.into_inner().pinned as usize)
    }
}

/// Blocks on their way.
#[derive(Debug)]
pub struct Blocks {
    node: KvNode,
    blocks: Streaming<wire::FetchResponse>,
}

impl Blocks {
    /// The next one; `None` at the end.
    ///
    /// # Errors
    /// `Unavailable` when the node is lost, or sends nothing for too long.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        Ok(self.node.within(self.blocks.message()).await?.map(|answer| answer.block))
    }
}
