//! `/v1/chat/completions`: from pieces to an answer, whole or as a stream of chunks.
use super::error::HttpError;
use super::params::Streaming;
use super::sse::{self, Chunks};
use super::usage::Totals;
use super::{logprobs, write};
use crate::core::tools::{Call, Said, Splitter, Style};
use crate::core::{Core, Job, Piece, PieceStream, TokenPiece};
use crate::served::ServedModel;
use axum::response::Response;
use futures::StreamExt;
use moesaic_types::{FinishReason, Result};
use serde_json::{Value, json};
use std::sync::Arc;

/// What every object of an answer repeats, and how it is written.
pub(super) struct Head {
    id: String,
    model: Arc<ServedModel>,
    fingerprint: String,
    created: u64,
    style: Style,
    n: usize,
    logprobs: bool,
    /// Log-probabilities show tokens by their numbers.
    pub(super) ids_as_tokens: bool,
}

impl Head {
    pub(super) fn new(job: &Job, created: u64, style: Style) -> Self {
        Self {
            id: job.id.to_string(),
            model: job.model.clone(),
            fingerprint: job.model.fingerprint(),
            created,
            style,
            n: job.n,
            logprobs: job.top_logprobs.is_some(),
            ids_as_tokens: false,
        }
    }

    fn object(&self, kind: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.id,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        })
    }

    fn logprobs(&self, tokens: &[TokenPiece]) -> Value {
        match self.logprobs {
            true => json!({"content": logprobs::content(&self.model, tokens, self.ids_as_tokens), "refusal": null}),
            false => Value::Null,
        }
    }
}

pub(super) fn stream(head: Head, pieces: PieceStream, streaming: Streaming, core: &Arc<Core>) -> Response {
    let chunks = Stream {
        splitters: (0..head.n).map(|_| head.style.splitter()).collect(),
        called: vec![0; head.n],
        usage: Totals::default(),
        left: head.n,
        include_usage: streaming.include_usage,
        head,
    };
    let first = (0..chunks.head.n).map(|index| chunks.first(index)).collect();
    sse::response(core, first, pieces, chunks)
}

/// A stream under way.
struct Stream {
    head: Head,
    splitters: Vec<Splitter>,
    /// Calls of each choice so far.
    called: Vec<usize>,
    usage: Totals,
    left: usize,
    include_usage: bool,
}

impl Stream {
    fn first(&self, index: usize) -> Value {
        self.chunk(index, json!({"role": "assistant", "content": "", "refusal": null}), Value::Null, None)
    }

    fn chunk(&self, index: usize, delta: Value, logprobs: Value, reason: Option<&str>) -> Value {
        let choice = json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason});
        let mut chunk = self.head.object("chat.completion.chunk", vec![choice]);
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }
}

impl Chunks for Stream {
    type Piece = Piece;

    fn bytes(piece: &Piece) -> usize {
        piece.bytes_shown()
    }

    fn of(&mut self, piece: Piece) -> Vec<Value> {
        let Piece { choice: index, text, tokens, finish, .. } = piece;
        let mut said = self.splitters[index].push(&text);
        if finish.is_some() {
            said.add(self.splitters[index].finish());
        }
        let Said { text, reasoning, calls } = said;
        let mut chunks = Vec::new();
        if !text.is_empty() || !reasoning.is_empty() || (self.head.logprobs && !tokens.is_empty()) {
            let mut delta = json!({});
            if !reasoning.is_empty() {
                delta["reasoning_content"] = reasoning.into();
            }
            if !text.is_empty() || delta.get("reasoning_content").is_none() {
                delta["content"] = text.into();
            }
            chunks.push(self.chunk(index, delta, self.head.logprobs(&tokens), None));
        }
        for call in &calls {
            let mut call = call_object(call);
            call["index"] = self.called[index].into();
            self.called[index] += 1;
            chunks.push(self.chunk(index, json!({"tool_calls": [call]}), Value::Null, None));
        }
        if let Some((reason, usage)) = finish {
            let reason = self.head.style.tools.reason(reason, self.called[index] > 0);
            chunks.push(self.chunk(index, json!({}), Value::Null, Some(reason.name())));
            self.usage.add(usage);
            self.left -= 1;
            if self.left == 0 && self.include_usage {
                let mut last = self.head.object("chat.completion.chunk", Vec::new());
                last["usage"] = self.usage.object();
                chunks.push(last);
            }
        }
        chunks
    }
}

pub(super) async fn whole(head: Head, mut pieces: PieceStream, core: &Core) -> Result<Response, HttpError> {
    let mut all = Vec::new();
    while let Some(piece) = pieces.next().await {
        all.push(piece?);
    }
    let bytes = all.iter().map(Piece::bytes_shown).sum();
    write(core, bytes, move || collect(&head, all)).await
}

/// One choice, collected.
struct Collected {
    said: Said,
    tokens: Vec<TokenPiece>,
    reason: FinishReason,
    splitter: Splitter,
}

fn collect(head: &Head, pieces: Vec<Piece>) -> Value {
    let empty = || Collected {
        said: Said::default(),
        tokens: Vec::new(),
        reason: FinishReason::Stop,
        splitter: head.style.splitter(),
    };
    let mut choices: Vec<Collected> = (0..head.n).map(|_| empty()).collect();
    let mut usage = Totals::default();
    for Piece { choice, text, tokens, finish, .. } in pieces {
        let choice = &mut choices[choice];
        choice.said.add(choice.splitter.push(&text));
        choice.tokens.extend(tokens);
        if let Some((reason, used)) = finish {
            choice.said.add(choice.splitter.finish());
            choice.reason = head.style.tools.reason(reason, !choice.said.calls.is_empty());
            usage.add(used);
        }
    }
    let choices = choices.iter().enumerate().map(|(index, choice)| whole_choice(head, index, choice));
    let mut answer = head.object("chat.completion", choices.collect());
    answer["usage"] = usage.object();
    answer
}

fn whole_choice(head: &Head, index: usize, choice: &Collected) -> Value {
    let Said { text, reasoning, calls } = &choice.said;
    let mut message = json!({"role": "assistant", "content": text, "refusal": null});
    if !reasoning.is_empty() {
        message["reasoning_content"] = reasoning.as_str().into();
    }
    if !calls.is_empty() {
        message["tool_calls"] = calls.iter().map(call_object).collect();
        if text.is_empty() {
            message["content"] = Value::Null;
        }
    }
    let (logprobs, reason) = (head.logprobs(&choice.tokens), choice.reason.name());
    json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
}

fn call_object(call: &Call) -> Value {
    json!({
        "id": Call::new_id(),
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    })
}
