//! `/v1/chat/completions`: from a body to a job.
use super::body::Body;
use super::chat_answer::{self, Head};
use super::error::HttpError;
use super::fields::Fields;
use super::params::{self, Streaming};
use super::{known, now, read, user_key};
use crate::core::tools::{Style, Tools};
use crate::core::{Core, Job, Operation, conversation, encode};
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use moesaic_types::{Error, RequestId, Result};
use serde_json::{Map, Value};
use std::sync::Arc;

pub(super) async fn chat(State(core): State<Arc<Core>>, headers: HeaderMap, body: Body) -> Result<Response, HttpError> {
    let permit = Arc::new(core.admission.enter().await?);
    let key = user_key(&headers);
    let Request { job, head, streaming } =
        read(&core, body, move |core, fields| request(core, fields, key.as_deref())).await?;
    let pieces = core.start(job, permit).await?;
    match streaming.on {
        true => Ok(chat_answer::stream(head, pieces, streaming, &core)),
        false => chat_answer::whole(head, pieces, &core).await,
    }
}

struct Request {
    job: Job,
    head: Head,
    streaming: Streaming,
}

fn request(core: &Core, fields: Fields<'_>, key: Option<&str>) -> Result<Request, HttpError> {
    fields.only(&[known::GENERATE, known::CHAT, known::WITHOUT_EFFECT])?;
    let streaming = params::streaming(&fields)?;
    only_text(&fields)?;
    let model = core.model(fields.text("model")?.unwrap_or_default())?;
    let tools = Tools::parse(fields.get("tools"), fields.get("tool_choice"))?;
    let tools = Tools { single: !fields.flag_or_true("parallel_tool_calls")?, ..tools };
    let mut input = params::sampling(&fields)?;
    input.names.prompt = "messages";
    match (fields.flag("logprobs")?, fields.count("top_logprobs", 0)?) {
        (true, top) => input.top_logprobs = Some(top.unwrap_or(0)),
        (false, Some(1..)) => {
            return Err(Error::invalid("top_logprobs", "top_logprobs needs logprobs to be true").into());
        }
        (false, _) => {}
    }
    input.hold_to(&tools)?;
    let skip_special = fields.flag_or_true("skip_special_tokens")?;
    let messages = fields.list("messages")?.ok_or_else(|| Error::invalid("messages", "messages is missing"))?;
    let (unfinished, variables) = (fields.flag("continue_final_message")?, template_variables(&fields)?);
    if unfinished && fields.flag("add_generation_prompt")? {
        let message = "continue_final_message and add_generation_prompt exclude one another; leave one out";
        return Err(Error::invalid("continue_final_message", message).into());
    }
    let prompt = match unfinished {
        true => conversation::render_unfinished(&model, messages, tools.shown(), &variables)?,
        false => {
            let generate = fields.flag_or_true("add_generation_prompt")?;
            conversation::render(&model, messages, tools.shown(), generate, &variables)?
        }
    };
    let tokens = encode(&model, &input.names, &prompt, false)?;
    let id = RequestId::new(format!("chatcmpl-{}", uuid::Uuid::new_v4().simple()));
    let mut job = input.into_job(id, model, tokens, &core.limits(), core.tenant(key))?;
    job.told.asked(Operation::Chat, &job.model.id, job.prompt.len());
    let style = Style::new(&job.model, tools);
    job.continues = unfinished;
    job.skip_special = skip_special && !style.has_marks();
    let mut head = Head::new(&job, now(), style);
    head.ids_as_tokens = fields.flag("return_tokens_as_token_ids")?;
    Ok(Request { job, head, streaming })
}

/// Refuses to answer in anything but text.
fn only_text(fields: &Fields<'_>) -> Result<()> {
    match fields.texts("modalities")?.iter().find(|modality| *modality != "text") {
        Some(other) => {
            let other: String = other.chars().take(60).collect();
            Err(Error::invalid("modalities", format!("modalities has '{other}'; only text is offered")))
        }
        None => Ok(()),
    }
}

/// What the template may ask for besides the conversation.
fn template_variables(fields: &Fields<'_>) -> Result<Map<String, Value>> {
    let mut variables = fields.object("chat_template_kwargs")?.cloned().unwrap_or_default();
    if let Some(effort) = fields.text("reasoning_effort")? {
        variables.entry("reasoning_effort").or_insert_with(|| effort.into());
    }
    Ok(variables)
}
