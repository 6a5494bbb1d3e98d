//! `moesaic.inference.v1.InferenceService`.
use super::{convert, status};
use crate::core::{Core, Piece, PieceStream, conversation, cut_off, tokens};
use futures::StreamExt;
use futures::stream::BoxStream;
use moesaic_proto::inference::v1 as wire;
use moesaic_proto::inference::v1::inference_service_server::InferenceService;
use moesaic_telemetry::metrics::GRPC_REQUESTS_TOTAL;
use moesaic_telemetry::propagation;
use moesaic_types::{Error, RequestId, Result};
use serde_json::json;
use std::sync::Arc;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};
use tracing::Instrument;

/// The service over a core.
pub struct Inference {
    core: Arc<Core>,
}

type Answer<T> = Result<Response<T>, Status>;

impl Inference {
    /// The service.
    pub fn new(core: Arc<Core>) -> Self {
        Self { core }
    }

    /// Runs a method in a span under the caller's trace, and counts it.
    async fn around<T>(
        &self,
        method: &'static str,
        metadata: MetadataMap,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Answer<T> {
        let span =
            tracing::info_span!("grpc_request", rpc.method = method, gen_ai.request.model = tracing::field::Empty);
        propagation::set_parent(&span, propagation::extract_metadata(&metadata));
        let result = work.instrument(span).await.map_err(status);
        let code = result.as_ref().err().map_or(tonic::Code::Ok, Status::code);
        ::metrics::counter!(GRPC_REQUESTS_TOTAL, "method" => method, "code" => format!("{code:?}")).increment(1);
        let mut result = result.map(Response::new);
        if let (Ok(response), Some(id)) = (&mut result, metadata.get("x-request-id")) {
            response.metadata_mut().insert("x-request-id", id.clone());
        }
        result
    }

    fn stream<T: Send + 'static>(
        &self,
        pieces: PieceStream,
        convert: fn(Piece) -> T,
    ) -> BoxStream<'static, Result<T, Status>> {
        let pieces = cut_off(pieces, self.core.config.write_timeout.get());
        pieces.map(move |piece| piece.map(convert).map_err(status)).boxed()
    }
}

fn key(metadata: &MetadataMap) -> Option<&str> {
    metadata.get("authorization")?.to_str().ok()?.strip_prefix("Bearer ").map(str::trim)
}

fn id(prefix: &str) -> RequestId {
    RequestId::new(format!("{prefix}-{}", uuid::Uuid::new_v4().simple()))
}

#[tonic::async_trait]
impl InferenceService for Inference {
    type GenerateStream = BoxStream<'static, Result<wire::GenerateResponse, Status>>;
    type ChatStream = BoxStream<'static, Result<wire::ChatResponse, Status>>;

    async fn generate(&self, request: Request<wire::GenerateRequest>) -> Answer<Self::GenerateStream> {
        let (metadata, _, request) = request.into_parts();
        let salt = self.core.salt(key(&metadata));
        self.around("Generate", metadata, async {
            let model = self.core.model(&request.model)?;
            let prompt = match (request.text.is_empty(), request.tokens.is_empty()) {
                (false, false) => return Err(Error::invalid("text", "give either text or tokens, not both")),
                (true, _) => {
                    let ids: Vec<u64> = request.tokens.iter().map(|id| u64::from(*id)).collect();
                    tokens("tokens", &ids, &model)?
                }
                (false, true) => {
                    let encoded = model.tokenizer.encode(&request.text, true);
                    encoded.map_err(|error| Error::invalid("text", error.to_string()))?
                }
            };
            let input =
                convert::sampling(request.sampling, request.response_format, request.priority, request.deadline_ms);
            let mut job = input.into_job(id("gen"), model, prompt, &self.core.limits(), salt)?;
            job.continues = true;
            Ok(self.stream(self.core.answer(job).await?, convert::piece))
        })
        .await
    }

    async fn chat(&self, request: Request<wire::ChatRequest>) -> Answer<Self::ChatStream> {
        let (metadata, _, request) = request.into_parts();
        let salt = self.core.salt(key(&metadata));
        self.around("Chat", metadata, async {
            let model = self.core.model(&request.model)?;
            let message = |m: &wire::ChatMessage| json!({"role": m.role, "content": m.content});
            let messages: Vec<_> = request.messages.iter().map(message).collect();
            let prompt = conversation::render(&model, &messages, None, true, &Default::default())?;
            let prompt = model.tokenizer.encode(&prompt, false);
            let prompt = prompt.map_err(|error| Error::invalid("messages", error.to_string()))?;
            let input =
                convert::sampling(request.sampling, request.response_format, request.priority, request.deadline_ms);
            let job = input.into_job(id("chat"), model, prompt, &self.core.limits(), salt)?;
            Ok(self.stream(self.core.answer(job).await?, convert::chat))
        })
        .await
    }

    async fn tokenize(&self, request: Request<wire::TokenizeRequest>) -> Answer<wire::TokenizeResponse> {
        let (metadata, _, request) = request.into_parts();
        self.around("Tokenize", metadata, async {
            let model = self.core.model(&request.model)?;
            let encoded = model.tokenizer.encode(&request.text, request.add_special_tokens);
            let tokens = encoded.map_err(|error| Error::invalid("text", error.to_string()))?;
            Ok(wire::TokenizeResponse { tokens, max_model_len: u32::try_from(model.max_context).unwrap_or(u32::MAX) })
        })
        .await
    }

    async fn detokenize(&self, request: Request<wire::DetokenizeRequest>) -> Answer<wire::DetokenizeResponse> {
        let (metadata, _, request) = request.into_parts();
        self.around("Detokenize", metadata, async {
            let model = self.core.model(&request.model)?;
            let ids: Vec<u64> = request.tokens.iter().map(|id| u64::from(*id)).collect();
            let text = model.tokenizer.decode(&tokens("tokens", &ids, &model)?, false);
            Ok(wire::DetokenizeResponse { text: text.map_err(|error| Error::invalid("tokens", error.to_string()))? })
        })
        .await
    }

    async fn list_models(&self, request: Request<wire::ListModelsRequest>) -> Answer<wire::ListModelsResponse> {
        let (metadata, _, _) = request.into_parts();
        self.around("ListModels", metadata, async {
            let model = |model: &Arc<crate::ServedModel>| wire::Model {
                id: model.id.clone(),
                created: i64::try_from(model.created).unwrap_or(i64::MAX),
                max_model_len: u32::try_from(model.max_context).unwrap_or(u32::MAX),
            };
            Ok(wire::ListModelsResponse { models: self.core.models().iter().map(model).collect() })
        })
        .await
    }
}
