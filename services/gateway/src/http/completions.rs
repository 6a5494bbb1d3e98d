//! `/v1/completions`: from a body to a job for each prompt.
use super::body::Body;
use super::completions_answer::{self, Answer, Pieces, Shown};
use super::error::HttpError;
use super::fields::{self, Fields};
use super::params::{self, Streaming};
use super::{known, now, read, user_key};
use crate::core::{Core, Job, Names, Operation, Refusal, encode, listed};
use crate::served::ServedModel;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use futures::{StreamExt, stream};
use moesaic_types::{Error, RequestId, Result, TokenId};
use serde_json::Value;
use std::sync::Arc;

/// Prompts of one request at most.
const MAX_PROMPTS: usize = 64;
/// Answers of one request at most: prompts times `n`.
const MAX_ANSWERS: u64 = 128;
/// OpenAI's default of this route.
const DEFAULT_MAX_TOKENS: u64 = 16;

pub(super) async fn completions(
    State(core): State<Arc<Core>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, HttpError> {
    let permit = Arc::new(core.admission.enter().await?);
    let key = user_key(&headers);
    let Request { jobs, answer, streaming } =
        read(&core, body, move |core, fields| request(core, fields, key.as_deref())).await?;
    let mut all = Vec::with_capacity(jobs.len());
    for (index, job) in jobs.into_iter().enumerate() {
        let pieces = core.start(job, permit.clone()).await?;
        all.push(pieces.map(move |piece| piece.map(|piece| (index, piece))).boxed());
    }
    let pieces: Pieces = stream::select_all(all).boxed();
    match streaming.on {
        true => Ok(completions_answer::stream(answer, pieces, streaming, &core)),
        false => completions_answer::whole(answer, pieces, &core).await,
    }
}

struct Request {
    jobs: Vec<Job>,
    answer: Answer,
    streaming: Streaming,
}

fn request(core: &Core, fields: Fields<'_>, key: Option<&str>) -> Result<Request, HttpError> {
    fields.only(&[known::GENERATE, known::COMPLETIONS, known::WITHOUT_EFFECT])?;
    let streaming = params::streaming(&fields)?;
    let model = core.model(fields.text("model")?.unwrap_or_default())?;
    let mut input = params::sampling(&fields)?;
    input.names.top_logprobs = "logprobs";
    input.top_logprobs = fields.count("logprobs", 0)?;
    let echo = fields.flag("echo")?;
    // with the prompt alone asked for, one token is generated and not shown
    let only_prompt = echo && input.max_tokens == Some(0);
    input.max_tokens = Some(if only_prompt { 1 } else { input.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS) });
    let n = input.n.unwrap_or(1);
    if fields.count("best_of", 0)?.is_some_and(|best| best != n) {
        let message = format!("best_of must equal n ({n}); sampling for the best is not offered");
        return Err(Error::invalid("best_of", message).into());
    }
    let skip_special = fields.flag_or_true("skip_special_tokens")?;
    let id = format!("cmpl-{}", uuid::Uuid::new_v4().simple());
    let prompts = prompts(&fields, &model)?;
    if prompts.len() > 1 && n.saturating_mul(prompts.len() as u64) > MAX_ANSWERS {
        let message = format!("n is {n} for each of {} prompts; the limit is {MAX_ANSWERS} answers", prompts.len());
        return Err(Error::invalid("n", message).into());
    }
    let mut jobs = Vec::new();
    let mut shown = Vec::new();
    for (index, Prompt { text, tokens }) in prompts.into_iter().enumerate() {
        let mut input = input.clone();
        if fields.get("max_tokens").is_none() && fields.get("max_completion_tokens").is_none() {
            // a default is no mistake of the client where less room is left
            let room = model.max_context.saturating_sub(tokens.len());
            input.max_tokens = input.max_tokens.map(|max| max.min(room as u64));
        }
        let id = RequestId::new(format!("{id}-{index}"));
        let mut job = input.into_job(id, model.clone(), tokens, &core.limits(), core.tenant(key))?;
        job.continues = true;
        job.skip_special = skip_special;
        job.prompt_logprobs = echo && job.top_logprobs.is_some();
        let decoded = || model.tokenizer.decode(&job.prompt, skip_special).unwrap_or_default();
        let echo = echo.then(|| text.unwrap_or_else(decoded));
        shown.push(Shown::new(&job, echo, only_prompt));
        jobs.push(job);
    }
    let prompt_tokens: usize = jobs.iter().map(|job| job.prompt.len()).sum();
    if let Some(told) = jobs.first().map(|job| job.told.clone()) {
        told.asked(Operation::TextCompletion, &model.id, prompt_tokens);
        jobs.iter_mut().for_each(|job| job.told = told.clone());
    }
    let ids_as_tokens = fields.flag("return_tokens_as_token_ids")?;
    let answer = Answer { id, model, created: now(), shown, n: n as usize, ids_as_tokens };
    Ok(Request { jobs, answer, streaming })
}

/// One prompt; its text where the client gave it as text.
struct Prompt {
    text: Option<String>,
    tokens: Vec<TokenId>,
}

fn prompts(fields: &Fields<'_>, model: &ServedModel) -> Result<Vec<Prompt>, HttpError> {
    let names = Names::default();
    let special = fields.flag_or_true("add_special_tokens")?;
    let text = |text: &str| -> Result<Prompt, Refusal> {
        Ok(Prompt { text: Some(text.to_owned()), tokens: encode(model, &names, text, special)? })
    };
    let list = |field: &str, value: &Value| -> Result<Prompt, HttpError> {
        Ok(Prompt { text: None, tokens: listed(model, &names, field, &fields::counts(field, value)?)? })
    };
    let value = fields.get("prompt").ok_or_else(|| Error::invalid("prompt", "prompt is missing"))?;
    let Value::Array(entries) = value else {
        let wrong = || Error::invalid("prompt", "prompt must be a text, tokens, or a list of those");
        return Ok(vec![text(value.as_str().ok_or_else(wrong)?)?]);
    };
    let Some(first) = entries.first() else {
        return Err(Error::invalid("prompt", "prompt is empty; it must have at least one token").into());
    };
    if first.is_number() {
        return Ok(vec![list("prompt", value)?]);
    }
    if entries.len() > MAX_PROMPTS {
        let message = format!("prompt has {} entries; the limit is {MAX_PROMPTS}", entries.len());
        return Err(Error::invalid("prompt", message).into());
    }
    if first.is_array() {
        let one = |(i, entry): (usize, &Value)| list(&format!("prompt[{i}]"), entry);
        return entries.iter().enumerate().map(one).collect();
    }
    let texts = fields.texts("prompt")?;
    Ok(texts.iter().map(|entry| text(entry)).collect::<Result<_, _>>()?)
}
