//! One kv-store over gRPC.
use super::patience::{Patience, Traffic};
use crate::channel::{MAX_MESSAGE, bulk_channel};
use crate::grpc::{explain, traced};
use bytes::Bytes;
use futures::stream;
use moesaic_proto::kv::v1 as wire;
use moesaic_proto::kv::v1::kv_store_service_client::KvStoreServiceClient;
use moesaic_proto::{hashes_to_wire, offer_to_wire};
use moesaic_types::cluster::Member;
use moesaic_types::{BlockHash, Error, ErrorCode, Link, Result};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};
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
    patience: Patience,
    traffic: Arc<Traffic>,
    resting: Arc<Mutex<Option<Instant>>>,
}

impl KvNode {
    /// A member. It connects when it is first asked.
    ///
    /// # Errors
    /// `InvalidArgument` when the member's address is none.
    pub fn new(member: &Member, patience: Patience) -> Result<Self> {
        let client = KvStoreServiceClient::new(bulk_channel(member)?);
        let client = client.max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE);
        let name = format!("{} {}", member.service, member.id).into();
        Ok(Self { name, client, patience, traffic: Arc::default(), resting: Arc::default() })
    }

    /// Whether it answered when it was last asked, or that was long ago.
    pub fn is_usable(&self) -> bool {
        let resting = self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        resting.is_none_or(|until| until <= Instant::now())
    }

    /// Waits for an answer; where none comes, the node rests.
    async fn within<T>(&self, answer: impl Future<Output = Result<T, tonic::Status>>) -> Result<T> {
        let answer = match timeout(self.patience.answer, answer).await {
            Ok(answer) => answer.map_err(|status| explain(&self.name, &status)),
            Err(_) => Err(self.late(ErrorCode::Unavailable, self.patience.answer)),
        };
        self.settle(&answer);
        answer
    }

    /// Waits for an answer that a block must move for, as long as all blocks that share the link meanwhile may take.
    async fn while_moving<T>(
        &self,
        bytes: u64,
        late: ErrorCode,
        answer: impl Future<Output = Result<T, tonic::Status>>,
    ) -> Result<T> {
        let moving = self.traffic.begin(bytes);
        let (begun, mut answer) = (Instant::now(), pin!(answer));
        let mut limit = self.patience.with(bytes);
        let answer = loop {
            if let Ok(answer) = timeout_at(begun + limit, &mut answer).await {
                break answer.map_err(|status| explain(&self.name, &status));
            }
            // others may have begun meanwhile
            let longer = self.patience.with(moving.beside());
            if longer <= limit {
                break Err(self.late(late, limit));
            }
            limit = longer;
        };
        self.settle(&answer);
        answer
    }

    fn late(&self, code: ErrorCode, limit: Duration) -> Error {
        Error::new(code, format!("{} did not answer within {limit:.1?}", self.name))
    }

    /// A node that is away rests. One that took too long for a block may answer questions well.
    fn settle<T>(&self, answer: &Result<T>) {
        let code = answer.as_ref().err().map(|error| error.code);
        if code != Some(ErrorCode::DeadlineExceeded) {
            let mut resting = self.resting.lock().unwrap_or_else(PoisonError::into_inner);
            *resting = (code == Some(ErrorCode::Unavailable)).then(|| Instant::now() + REST);
        }
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
        // its head may stand behind others' blocks
        let blocks = self.while_moving(0, ErrorCode::Unavailable, call).await?.into_inner();
        Ok(Blocks { node: self.clone(), blocks })
    }

    /// Offers a block; whether it was taken. The node copies it to others where `replicate` says so.
    ///
    /// # Errors
    /// `Unavailable` when it is away, `DeadlineExceeded` when the block takes too long, `ResourceExhausted` when it has
    /// too much to do.
    pub async fn offer(&self, link: &Link, block: Bytes, replicate: bool) -> Result<bool> {
        let mut client = self.client.clone();
        let bytes = block.len() as u64;
        self.traffic.saw(bytes);
        let offer = offer_to_wire(link, block, replicate);
        let answer = async {
            let mut answers = client.offer(traced(stream::iter([offer]))).await?.into_inner();
            answers.message().await
        };
        let answer = self.while_moving(bytes, ErrorCode::DeadlineExceeded, answer).await?;
        Ok(answer.is_some_and(|answer| answer.stored))
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

    /// Drops blocks whose bytes are wrong; how many of them it had.
    ///
    /// # Errors
    /// `Unavailable` when it does not answer.
    pub async fn forget(&self, blocks: &[BlockHash]) -> Result<usize> {
        let mut client = self.client.clone();
        let call = client.forget(traced(wire::ForgetRequest { chain: hashes_to_wire(blocks) }));
        Ok(self.within(call).await?.into_inner().forgotten as usize)
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
        let Self { node, blocks } = self;
        // how large it is is not known before it came
        let answer = node.while_moving(node.traffic.largest(), ErrorCode::Unavailable, blocks.message()).await?;
        Ok(answer.map(|answer| answer.block).inspect(|block| node.traffic.saw(block.len() as u64)))
    }
}
