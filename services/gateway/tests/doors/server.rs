//! A gateway with both doors open on ports of their own.
use crate::client::{self, Answer};
use crate::reach;
use crate::scripted::{Act, InOrder, Scripted};
use moesaic_gateway::core::Core;
use moesaic_gateway::{Config, Gateway, ServedModel};
use moesaic_model::chat::ChatTemplate;
use moesaic_model::generation_config::GenerationConfig;
use moesaic_model::tokenizer::Tokenizer;
use moesaic_proto::inference::v1::inference_service_client::InferenceServiceClient;
use moesaic_types::{BlockHasher, Digest, KvFormat, Result, WeightFormat};
use serde_json::Value;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::transport::Channel;

/// The context of the served model, in tokens.
pub const CONTEXT: usize = 256;
/// The name of the served model.
pub const MODEL: &str = "acme/scripted";

pub fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/models/demo-moe")
}

pub fn tokenizer() -> Tokenizer {
    Tokenizer::open(&demo()).unwrap()
}

/// The demo model's text side, with a shorter context.
pub fn model() -> ServedModel {
    let tokenizer = tokenizer();
    ServedModel {
        id: MODEL.into(),
        created: 1_700_000_000,
        max_context: CONTEXT,
        vocab: tokenizer.vocab_size(),
        eos: vec![2],
        tokenizer,
        template: Some(Arc::new(ChatTemplate::open(&demo()).unwrap())),
        defaults: GenerationConfig::open(&demo()).unwrap(),
        hasher: BlockHasher::new(&Digest::of(b"m"), WeightFormat::F32, KvFormat::F32, None),
    }
}

/// Ports that the system chooses.
pub fn config() -> Config {
    Config { http: "127.0.0.1:0".into(), grpc: "127.0.0.1:0".into(), ..Config::default() }
}

/// A running gateway; ends with the test.
pub struct Doors {
    pub http: SocketAddr,
    pub grpc: SocketAddr,
    pub core: Arc<Core>,
    pub replicas: Vec<Arc<Scripted>>,
    stop: watch::Sender<bool>,
    running: JoinHandle<Result<()>>,
}

impl Doors {
    /// Doors before a model is loaded.
    pub async fn bare(config: Config) -> Self {
        let gateway = Gateway::bind(config).await.unwrap();
        let (http, grpc) = (gateway.http_address().unwrap(), gateway.grpc_address().unwrap());
        let core = gateway.core();
        let (stop, stopped) = watch::channel(false);
        let running = tokio::spawn(gateway.run(stopped));
        Self { http, grpc, core, replicas: Vec::new(), stop, running }
    }

    /// A replica for each list of acts.
    pub async fn open<const N: usize>(replicas: [Vec<Act>; N]) -> Self {
        Self::with(config(), model(), replicas).await
    }

    pub async fn with<const N: usize>(config: Config, model: ServedModel, replicas: [Vec<Act>; N]) -> Self {
        let mut doors = Self::bare(config).await;
        doors.serve(model, replicas);
        doors
    }

    pub fn serve<const N: usize>(&mut self, model: ServedModel, replicas: [Vec<Act>; N]) {
        let named = replicas.into_iter().enumerate();
        let replicas: Vec<_> =
            named.map(|(i, acts)| Scripted::new(&format!("replica-{i}"), &model.tokenizer, acts)).collect();
        self.replicas = replicas.clone();
        let placer = reach::placer(Arc::new(InOrder(replicas.iter().map(|replica| replica.id.clone()).collect())));
        let reached: HashMap<_, _> =
            replicas.into_iter().map(|replica| (replica.id.clone(), reach::replica(replica))).collect();
        let lookup = move |id: &_| reached.get(id).cloned();
        self.core.serve(vec![Arc::new(model)], placer, Arc::new(lookup));
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        client::send(self.http, "POST", path, &[], body.to_string().as_bytes()).await
    }

    pub async fn get(&self, path: &str) -> Answer {
        client::send(self.http, "GET", path, &[], b"").await
    }

    pub async fn client(&self) -> InferenceServiceClient<Channel> {
        InferenceServiceClient::connect(format!("http://{}", self.grpc)).await.unwrap()
    }

    /// Ends both doors; they must end by themselves.
    pub async fn close(self) {
        self.stop.send_replace(true);
        moesaic_testkit::soon("the doors closed", self.running).await.unwrap().unwrap();
    }
}
