//! A replica that computes nothing: it takes part in the cluster as a scheduler does, and answers at once with tokens of
//! a script. What is measured with it is the way to a replica and back.
use anyhow::{Context, Result};
use clap::Args;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{self, StreamExt};
use moesaic_model::ModelConfig;
use moesaic_model::source::text_digest;
use moesaic_model::tokenizer::Tokenizer;
use moesaic_transport::grpc::replica_service;
use moesaic_transport::{Nats, NatsBus, RedisMetadata, Registration, serve};
use moesaic_types::boundary::{DeltaStream, Replica, ReplicaLoad};
use moesaic_types::cluster::{Member, MemberState, ReplicaInfo, Role, Service};
use moesaic_types::{Delta, FinishReason, GenerateRequest, SampledToken, Usage};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::service::Routes;

/// What its answers say, again and again.
const SCRIPT: &str = "The order has been checked and will leave the warehouse today. ";

/// A replica that was not heard of for so long is gone.
const LEASE: Duration = Duration::from_secs(3);

/// KV blocks that it says to have: enough for every request.
const BLOCKS: usize = 1 << 20;

/// `moesaic-loadtest mock-replica`.
#[derive(Clone, Debug, Args)]
pub struct MockReplica {
    /// The model that it says to serve: its tokenizer's tokens are sent.
    #[arg(long, value_name = "DIR|FILE.gguf")]
    pub model: PathBuf,
    /// Redis.
    #[arg(long, default_value = "redis://127.0.0.1:6379")]
    pub redis: String,
    /// NATS.
    #[arg(long, default_value = "nats://127.0.0.1:4222")]
    pub nats: String,
    /// Where it answers gRPC.
    #[arg(long, default_value = "127.0.0.1:9020")]
    pub grpc: SocketAddr,
    /// Its name in the cluster.
    #[arg(long, default_value = "mock")]
    pub id: String,
}

/// The replica.
pub struct Mock {
    script: Arc<[u32]>,
    max_context: usize,
}

impl Mock {
    /// Says these tokens, again and again; at least one.
    pub fn new(script: Vec<u32>, max_context: usize) -> Self {
        Self { script: script.into(), max_context }
    }
}

impl Replica for Mock {
    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, moesaic_types::Result<DeltaStream>> {
        let script = Arc::clone(&self.script);
        let (prompt_tokens, count) = (request.prompt.len(), request.stop.max_tokens);
        let deltas = (0..count).map(move |at| {
            let token = SampledToken { id: script[at % script.len()], logprob: None, top_logprobs: Vec::new() };
            let usage = Usage { prompt_tokens, cached_tokens: 0, completion_tokens: count };
            Ok(Delta {
                tokens: vec![token],
                prompt_logprobs: None,
                cached_tokens: (at == 0).then_some(0),
                finish: (at + 1 == count).then_some((FinishReason::Length, usage)),
            })
        });
        async move { Ok(stream::iter(deltas).boxed()) }.boxed()
    }

    fn load(&self) -> BoxFuture<'_, moesaic_types::Result<ReplicaLoad>> {
        let load = ReplicaLoad { kv_blocks_total: BLOCKS, max_context: self.max_context, ..ReplicaLoad::default() };
        async move { Ok(load) }.boxed()
    }
}

/// Serves until the process is ended.
///
/// # Errors
/// When the model cannot be read, or a server not be reached.
pub async fn run(args: &MockReplica) -> Result<()> {
    let config = ModelConfig { path: Some(args.model.clone()), ..ModelConfig::default() };
    let found = config.look().context("open the model")?;
    let script = Tokenizer::open(&args.model)?.encode(SCRIPT, false)?;
    let max_context = found.spec.max_context;
    let listener = TcpListener::bind(args.grpc).await.with_context(|| format!("listen on {}", args.grpc))?;
    let metadata = Arc::new(RedisMetadata::connect(&args.redis, "moesaic")?);
    let events = Arc::new(NatsBus::new(Nats::connect(&args.nats, &args.id).await?));
    let member = Member {
        service: Service::Scheduler,
        id: args.id.as_str().into(),
        generation: 0,
        address: format!("http://{}", listener.local_addr()?),
        socket: None,
        state: MemberState::Ready,
        role: Role::Replica(ReplicaInfo { model: found.served_as, text: text_digest(&args.model)?, max_context }),
    };
    let registration = Registration::start(metadata, events, member, LEASE);
    let (_stop, stopped) = watch::channel(false);
    let routes = Routes::new(replica_service(Arc::new(Mock::new(script, max_context))));
    let served = serve(routes, listener, None, stopped).await;
    registration.leave().await;
    Ok(served?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    #[tokio::test]
    async fn it_says_its_script_again_and_again_for_as_long_as_it_is_asked_to() {
        let request = crate::scenarios::gateway::request(0, &[7, 8].into(), 5);
        let deltas: Vec<_> = Mock::new(vec![1, 2], 100).generate(request).await.unwrap().collect().await;
        let deltas: Vec<Delta> = deltas.into_iter().map(Result::unwrap).collect();
        let tokens: Vec<u32> = deltas.iter().flat_map(|delta| &delta.tokens).map(|token| token.id).collect();
        assert_eq!(tokens, [1, 2, 1, 2, 1]);
        let usage = Usage { prompt_tokens: 2, cached_tokens: 0, completion_tokens: 5 };
        assert_eq!(deltas.last().unwrap().finish, Some((FinishReason::Length, usage)));
        assert!(deltas[..4].iter().all(|delta| delta.finish.is_none()));
    }
}
