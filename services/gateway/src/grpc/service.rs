//! `moesaic.inference.v1.InferenceService`.
use super::{call, convert, status};
use crate::core::tools::Style;
use crate::core::{
    Core, Job, Names, Operation, Piece, PieceStream, SamplingInput, conversation, cut_off, encode, listed, tokens,
};
use futures::StreamExt;
use futures::stream::BoxStream;
use moesaic_proto::inference::v1 as wire;
use moesaic_proto::inference::v1::inference_service_server::InferenceService;
use moesaic_types::{Error, RequestId, Result, TokenId};
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
    async fn start<T: Send + 'static, C: FnMut(Piece) -> T + Send + 'static>(
        &self,
        bytes: usize,
        job: impl FnOnce(&Core) -> Result<(Job, C)> + Send + 'static,
    ) -> Result<BoxStream<'static, Result<T, Status>>> {
        let permit = Arc::new(self.core.admission.enter().await?);
        let core = self.core.clone();
        let (job, convert) = self.work(bytes, move || job(&core)).await?;
        Ok(self.stream(self.core.start(job, permit).await?, convert))
    }

    /// Does work that needs a model, and reads or writes about so many bytes.
    async fn work<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.core.loaded().await?;
        self.core.workers.run(bytes, work).await
    }

    fn stream<T: Send + 'static>(
        &self,
        pieces: PieceStream,
        mut convert: impl FnMut(Piece) -> T + Send + 'static,
    ) -> BoxStream<'static, Result<T, Status>> {
        let pieces = cut_off(pieces, self.core.config.write_timeout.get());
        pieces.map(move |piece| piece.map(&mut convert).map_err(status)).boxed()
    }
}

fn id(prefix: &str) -> RequestId {
    RequestId::new(format!("{prefix}-{}", uuid::Uuid::new_v4().simple()))
}

/// Special tokens are no text, unless the client wants them.
fn skips_special(sampling: Option<&wire::SamplingParams>) -> bool {
    sampling.and_then(|sampling| sampling.skip_special_tokens).unwrap_or(true)
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
        let (tenant, timeout) = (self.core.tenant(call::key(&metadata)), call::timeout_ms(&metadata));
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
            let skip_special = skips_special(request.sampling.as_ref());
            let input =
                convert::sampling(request.sampling, request.response_format, request.priority, request.deadline_ms)?;
            let input = SamplingInput { names, ..call::within(input, timeout) };
            let mut job =
                input.into_job(id("gen"), model, prompt, &core.limits(), tenant).map_err(convert::in_sampling)?;
            job.told.asked(Operation::TextCompletion, &job.model.id, job.prompt.len());
            job.continues = true;
            job.skip_special = skip_special;
            Ok((job, convert::piece))
        };
        call::around("Generate", metadata, self.start(bytes, job)).await
    }

    async fn chat(&self, request: Request<wire::ChatRequest>) -> Answer<Self::ChatStream> {
        let (metadata, _, request) = request.into_parts();
        let (tenant, timeout) = (self.core.tenant(call::key(&metadata)), call::timeout_ms(&metadata));
        let said = request.messages.iter().map(|message| message.content.len() + message.reasoning.len());
        let tools = request.tools.iter().map(|tool| tool.description.len() + tool.parameters.len());
        let bytes = said.chain(tools).sum::<usize>() + request.template_kwargs.len();
        let job = move |core: &Core| {
            let model = core.model(&request.model)?;
            let tools = convert::tools(request.tools, request.tool_choice, request.single_tool_call)?;
            let (messages, variables): (Vec<_>, _) = (
                request.messages.into_iter().map(convert::message).collect(),
                convert::variables(&request.template_kwargs)?,
            );
            let prompt = match request.continue_final_message {
                true => conversation::render_unfinished(&model, &messages, tools.shown(), &variables)?,
                false => conversation::render(&model, &messages, tools.shown(), true, &variables)?,
            };
            let names = Names { prompt: "messages", ..Names::default() };
            let prompt = encode(&model, &names, &prompt, false)?;
            let skip_special = skips_special(request.sampling.as_ref());
            let input =
                convert::sampling(request.sampling, request.response_format, request.priority, request.deadline_ms)?;
            let mut input = SamplingInput { names, ..call::within(input, timeout) };
            input.hold_to(&tools)?;
            let style = Style::new(&model, tools);
            let mut job =
                input.into_job(id("chat"), model, prompt, &core.limits(), tenant).map_err(convert::in_sampling)?;
            job.told.asked(Operation::Chat, &job.model.id, job.prompt.len());
            job.continues = request.continue_final_message;
            job.skip_special = skip_special && !style.has_marks();
            let convert = convert::chat(&style, job.n);
            Ok((job, convert))
        };
        call::around("Chat", metadata, self.start(bytes, job)).await
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
        call::around("Tokenize", metadata, self.work(bytes, work)).await
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
        call::around("Detokenize", metadata, self.work(bytes, work)).await
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
