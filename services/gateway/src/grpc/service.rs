//! `moesaic.inference.v1.InferenceService`.
use super::{call, convert, status};
use crate::core::{Core, Job, Names, Piece, PieceStream, SamplingInput, conversation, cut_off, encode, listed, tokens};
use futures::StreamExt;
use futures::stream::BoxStream;
use moesaic_proto::inference::v1 as wire;
use moesaic_proto::inference::v1::inference_service_server::InferenceService;
use moesaic_types::{Error, RequestId, Result, TokenId};
use serde_json::json;
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// Bytes of a token on the wire, at most.
const TOKEN_BYTES: usize = 5;

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

    /// Lets a request in, makes its job (a long one on a worker) and starts it.
    async fn start<T: Send + 'static>(
        &self,
        bytes: usize,
        convert: fn(Piece) -> T,
        job: impl FnOnce(&Core) -> Result<Job> + Send + 'static,
    ) -> Result<BoxStream<'static, Result<T, Status>>> {
        let permit = Arc::new(self.core.admission.enter().await?);
        let core = self.core.clone();
        let job = self.core.workers.run(bytes, move || job(&core)).await?;
        Ok(self.stream(self.core.start(job, permit).await?, convert))
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

fn id(prefix: &str) -> RequestId {
    RequestId::new(format!("{prefix}-{}", uuid::Uuid::new_v4().simple()))
}

fn wide(tokens: &[TokenId]) -> Vec<u64> {
    tokens.iter().map(|id| u64::from(*id)).collect()
}

fn narrow(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

#[tonic::async_trait]
impl InferenceService for Inference {
    type GenerateStream = BoxStream<'static, Result<wire::GenerateResponse, Status>>;
    type ChatStream = BoxStream<'static, Result<wire::ChatResponse, Status>>;

    async fn generate(&self, request: Request<wire::GenerateRequest>) -> Answer<Self::GenerateStream> {
        let (metadata, _, request) = request.into_parts();
        let (salt, timeout) = (self.core.salt(call::key(&metadata)), call::timeout_ms(&metadata));
        let bytes = request.text.len() + request.tokens.len() * TOKEN_BYTES;
        let job = move |core: &Core| {
            let model = core.model(&request.model)?;
            let names = |prompt| Names { prompt, ..Names::default() };
            let (names, prompt) = match (request.text.is_empty(), request.tokens.is_empty()) {
                (false, false) => return Err(Error::invalid("text", "give either text or tokens, not both")),
                (true, true) => return Err(Error::invalid("text", "text and tokens are empty; give one of them")),
                (true, false) => {
                    let names = names("tokens");
                    (names, listed(&model, &names, "tokens", &wide(&request.tokens))?)
                }
                (false, true) => (names("text"), encode(&model, &names("text"), &request.text, true)?),
            };
            let input =
                convert::sampling(request.sampling, request.response_format, request.priority, request.deadline_ms);
            let input = SamplingInput { names, ..call::within(input, timeout) };
            let mut job =
                input.into_job(id("gen"), model, prompt, &core.limits(), salt).map_err(convert::in_sampling)?;
            job.continues = true;
            Ok(job)
        };
        call::around("Generate", metadata, self.start(bytes, convert::piece, job)).await
    }

    async fn chat(&self, request: Request<wire::ChatRequest>) -> Answer<Self::ChatStream> {
        let (metadata, _, request) = request.into_parts();
        let (salt, timeout) = (self.core.salt(call::key(&metadata)), call::timeout_ms(&metadata));
        let bytes = request.messages.iter().map(|message| message.role.len() + message.content.len()).sum();
        let job = move |core: &Core| {
            let model = core.model(&request.model)?;
            let message = |m: &wire::ChatMessage| json!({"role": m.role, "content": m.content});
            let messages: Vec<_> = request.messages.iter().map(message).collect();
            let prompt = conversation::render(&model, &messages, None, true, &Default::default())?;
            let names = Names { prompt: "messages", ..Names::default() };
            let prompt = encode(&model, &names, &prompt, false)?;
            let input =
                convert::sampling(request.sampling, request.response_format, request.priority, request.deadline_ms);
            let input = SamplingInput { names, ..call::within(input, timeout) };
            input.into_job(id("chat"), model, prompt, &core.limits(), salt).map_err(convert::in_sampling)
        };
        call::around("Chat", metadata, self.start(bytes, convert::chat, job)).await
    }

    async fn tokenize(&self, request: Request<wire::TokenizeRequest>) -> Answer<wire::TokenizeResponse> {
        let (metadata, _, request) = request.into_parts();
        let core = self.core.clone();
        let bytes = request.text.len();
        let work = move || {
            let model = core.model(&request.model)?;
            let encoded = model.tokenizer.encode(&request.text, request.add_special_tokens);
            let tokens = encoded.map_err(|error| Error::invalid("text", error.to_string()))?;
            Ok(wire::TokenizeResponse { tokens, max_model_len: narrow(model.max_context) })
        };
        call::around("Tokenize", metadata, self.core.workers.run(bytes, work)).await
    }

    async fn detokenize(&self, request: Request<wire::DetokenizeRequest>) -> Answer<wire::DetokenizeResponse> {
        let (metadata, _, request) = request.into_parts();
        let core = self.core.clone();
        let bytes = request.tokens.len() * TOKEN_BYTES;
        let work = move || {
            let model = core.model(&request.model)?;
            let text = model.tokenizer.decode(&tokens("tokens", &wide(&request.tokens), &model)?, false);
            Ok(wire::DetokenizeResponse { text: text.map_err(|error| Error::invalid("tokens", error.to_string()))? })
        };
        call::around("Detokenize", metadata, self.core.workers.run(bytes, work)).await
    }

    async fn list_models(&self, request: Request<wire::ListModelsRequest>) -> Answer<wire::ListModelsResponse> {
        let (metadata, _, _) = request.into_parts();
        let model = |model: &Arc<crate::ServedModel>| wire::Model {
            id: model.id.clone(),
            created: i64::try_from(model.created).unwrap_or(i64::MAX),
            max_model_len: narrow(model.max_context),
        };
        let models = self.core.models().iter().map(model).collect();
        call::around("ListModels", metadata, async { Ok(wire::ListModelsResponse { models }) }).await
    }
}
