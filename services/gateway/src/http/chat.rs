//! `/v1/chat/completions`.
use super::error::HttpError;
use super::fields::{self, Fields};
use super::params::{self, Streaming};
use super::{body, key, now, sse};
use crate::core::tools::{Call, Splitter, Tools};
use crate::core::{Core, Job, Piece, PieceStream, TokenPiece, conversation, cut_off};
use crate::served::ServedModel;
use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use futures::{StreamExt, stream};
use moesaic_types::{Error, FinishReason, RequestId, Result, SampledToken, Usage};
use serde_json::{Value, json};
use std::sync::Arc;

pub(super) async fn chat(
    State(core): State<Arc<Core>>,
    headers: HeaderMap,
    bytes: Result<Bytes, BytesRejection>,
) -> Result<Response, HttpError> {
    let object = fields::parse(&body(bytes, core.config.body_limit.as_usize())?)?;
    let fields = Fields::new(&object);
    let streaming = params::streaming(&fields)?;
    let tools = Tools::parse(fields.get("tools"), fields.get("tool_choice"))?;
    let job = job(&core, &fields, &tools, &headers)?;
    let head = Head { id: job.id.to_string(), model: job.model.clone(), created: now(), tools };
    let (n, logprobs) = (job.n, job.top_logprobs.is_some());
    let pieces = core.answer(job).await?;
    if streaming.on {
        return Ok(stream_answer(head, n, logprobs, pieces, streaming, &core));
    }
    Ok(Json(whole_answer(head, n, logprobs, pieces).await?).into_response())
}

/// What every chunk of an answer repeats.
struct Head {
    id: String,
    model: Arc<ServedModel>,
    created: u64,
    tools: Tools,
}

impl Head {
    fn object(&self, kind: &str, choices: Vec<Value>) -> Value {
        json!({"id": self.id, "object": kind, "created": self.created, "model": self.model.id, "choices": choices})
    }
}

fn job(core: &Core, fields: &Fields<'_>, tools: &Tools, headers: &HeaderMap) -> Result<Job> {
    let name = fields.text("model")?.unwrap_or_default();
    let model = core.model(name)?;
    let mut input = params::sampling(fields)?;
    match (fields.flag("logprobs")?, fields.count("top_logprobs")?) {
        (true, top) => input.top_logprobs = Some(top.unwrap_or(0)),
        (false, Some(_)) => return Err(Error::invalid("top_logprobs", "top_logprobs needs logprobs to be true")),
        (false, None) => {}
    }
    if let Some(grammar) = tools.grammar() {
        if input.grammar.is_some() {
            let message = "response_format cannot be combined with a required tool; leave one out";
            return Err(Error::invalid("response_format", message));
        }
        input.grammar = Some(grammar);
    }
    let messages = fields.list("messages")?.ok_or_else(|| Error::invalid("messages", "messages is missing"))?;
    let extra = fields.object("chat_template_kwargs")?.cloned().unwrap_or_default();
    let generate = fields.get("add_generation_prompt").is_none() || fields.flag("add_generation_prompt")?;
    let prompt = conversation::render(&model, messages, tools.shown(), generate, &extra)?;
    let tokens = model.tokenizer.encode(&prompt, false).map_err(|e| Error::invalid("messages", e.to_string()))?;
    let id = RequestId::new(format!("chatcmpl-{}", uuid::Uuid::new_v4().simple()));
    let span = tracing::Span::current();
    span.record("gen_ai.request.model", model.id.as_str()).record("gen_ai.usage.input_tokens", tokens.len());
    let mut job = input.into_job(id, model, tokens, &core.limits(), core.salt(key(headers)))?;
    // a template's marks around a call may be special tokens
    job.skip_special = !tools.may_call();
    Ok(job)
}

fn stream_answer(
    head: Head,
    n: usize,
    logprobs: bool,
    pieces: PieceStream,
    streaming: Streaming,
    core: &Core,
) -> Response {
    let mut splitters: Vec<_> = (0..n).map(|_| Splitter::new(head.tools.clone())).collect();
    let mut usage = Totals::default();
    let chunk = move |head: &Head, choice: Value| head.object("chat.completion.chunk", vec![choice]);
    let first = (0..n).map(|index| {
        let delta = json!({"role": "assistant", "content": ""});
        Ok(chunk(&head, json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null})))
    });
    let first: Vec<Result<Value>> = first.collect();
    let mut left = n;
    let events = pieces.flat_map(move |piece| {
        let mut events = Vec::new();
        match piece {
            Err(error) => events.push(Err(error)),
            Ok(piece) => {
                let splitter = &mut splitters[piece.choice];
                let mut text = splitter.push(&piece.text);
                let mut calls = Vec::new();
                let mut reason = None;
                if let Some((finish, used)) = piece.finish {
                    let (rest, found) = splitter.finish();
                    text += &rest;
                    reason = Some(reason_name(finish, !found.is_empty()));
                    calls = found;
                    usage.add(used);
                    left -= 1;
                }
                let lp = logprobs.then(|| content_logprobs(&head.model, &piece.tokens));
                let of = |delta: Value, reason: Option<&str>, lp: Option<Value>| {
                    json!({"index": piece.choice, "delta": delta, "logprobs": lp, "finish_reason": reason})
                };
                if !text.is_empty() || (logprobs && !piece.tokens.is_empty()) {
                    events.push(Ok(chunk(&head, of(json!({"content": text}), None, lp))));
                }
                for (i, call) in calls.iter().enumerate() {
                    let mut call = call_object(call);
                    call["index"] = i.into();
                    events.push(Ok(chunk(&head, of(json!({"tool_calls": [call]}), None, None))));
                }
                if reason.is_some() {
                    events.push(Ok(chunk(&head, of(json!({}), reason, None))));
                }
                if left == 0 && reason.is_some() && streaming.include_usage {
                    let mut last = head.object("chat.completion.chunk", Vec::new());
                    last["usage"] = usage.object();
                    events.push(Ok(last));
                }
            }
        }
        stream::iter(events)
    });
    let events = stream::iter(first).chain(events).boxed();
    sse::response(cut_off(events, core.config.write_timeout.get()))
}

/// One choice, collected.
struct Collected {
    text: String,
    tokens: Vec<TokenPiece>,
    calls: Vec<Call>,
    reason: &'static str,
    splitter: Splitter,
}

async fn whole_answer(head: Head, n: usize, logprobs: bool, mut pieces: PieceStream) -> Result<Value> {
    let empty = || Collected {
        text: String::new(),
        tokens: Vec::new(),
        calls: Vec::new(),
        reason: "stop",
        splitter: Splitter::new(head.tools.clone()),
    };
    let mut choices: Vec<Collected> = (0..n).map(|_| empty()).collect();
    let mut usage = Totals::default();
    while let Some(piece) = pieces.next().await {
        let Piece { choice, text, tokens, finish, .. } = piece?;
        let choice = &mut choices[choice];
        choice.text += &choice.splitter.push(&text);
        choice.tokens.extend(tokens);
        if let Some((reason, used)) = finish {
            let (rest, calls) = choice.splitter.finish();
            choice.text += &rest;
            choice.reason = reason_name(reason, !calls.is_empty());
            choice.calls = calls;
            usage.add(used);
        }
    }
    let object = |(index, choice): (usize, &Collected)| {
        let mut message = json!({"role": "assistant", "content": choice.text});
        if !choice.calls.is_empty() {
            message["tool_calls"] = choice.calls.iter().map(call_object).collect();
            if choice.text.is_empty() {
                message["content"] = Value::Null;
            }
        }
        let lp = logprobs.then(|| content_logprobs(&head.model, &choice.tokens));
        json!({"index": index, "message": message, "logprobs": lp, "finish_reason": choice.reason})
    };
    let mut answer = head.object("chat.completion", choices.iter().enumerate().map(object).collect());
    answer["usage"] = usage.object();
    Ok(answer)
}

fn call_object(call: &Call) -> Value {
    json!({
        "id": format!("call_{}", uuid::Uuid::new_v4().simple()),
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    })
}

fn content_logprobs(model: &ServedModel, tokens: &[TokenPiece]) -> Value {
    let entry = |bytes: &[u8], logprob: f32| json!({"token": String::from_utf8_lossy(bytes), "logprob": logprob, "bytes": bytes});
    let one = |piece: &TokenPiece| {
        let SampledToken { logprob, top_logprobs, .. } = &piece.token;
        let mut object = entry(&piece.bytes, logprob.unwrap_or(0.0));
        let top = top_logprobs.iter().map(|(id, logprob)| entry(model.tokenizer.token_bytes(*id), *logprob));
        object["top_logprobs"] = top.collect();
        object
    };
    json!({"content": tokens.iter().map(one).collect::<Vec<_>>()})
}

/// The name of a reason.
pub(super) fn reason_name(reason: FinishReason, called: bool) -> &'static str {
    match reason {
        _ if called => "tool_calls",
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::ToolCalls => "tool_calls",
    }
}

/// Usage over all choices: the prompt counts once.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Totals {
    prompt: usize,
    cached: usize,
    completion: usize,
}

impl Totals {
    pub(super) fn add(&mut self, usage: Usage) {
        self.prompt = self.prompt.max(usage.prompt_tokens);
        self.cached = self.cached.max(usage.cached_tokens);
        self.completion += usage.completion_tokens;
    }

    /// Adds another prompt's totals.
    pub(super) fn merge(&mut self, other: Self) {
        self.prompt += other.prompt;
        self.cached += other.cached;
        self.completion += other.completion;
    }

    pub(super) fn object(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        })
    }
}
