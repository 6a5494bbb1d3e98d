//! `/v1/completions`: from pieces to an answer, whole or as a stream of chunks.
use super::error::HttpError;
use super::logprobs::Logprobs;
use super::params::Streaming;
use super::sse::{self, Chunks};
use super::usage::Totals;
use super::write;
use crate::core::{Core, Job, Piece};
use crate::served::ServedModel;
use axum::response::Response;
use futures::{StreamExt, stream};
use moesaic_types::{FinishReason, Result, TokenId, Usage};
use serde_json::{Value, json};
use std::sync::Arc;

/// Pieces with the index of their prompt.
pub(super) type Pieces = stream::BoxStream<'static, Result<(usize, Piece)>>;

/// What every object of an answer repeats, and how it is written.
pub(super) struct Answer {
    pub(super) id: String,
    pub(super) model: Arc<ServedModel>,
    pub(super) created: u64,
    /// What is shown of each prompt.
    pub(super) shown: Vec<Shown>,
    /// Choices for each prompt.
    pub(super) n: usize,
    /// Log-probabilities show tokens by their numbers.
    pub(super) ids_as_tokens: bool,
}

/// What is shown of one prompt and its choices.
pub(super) struct Shown {
    prompt: Arc<[TokenId]>,
    /// The prompt's text, where it is part of the answer.
    echo: Option<String>,
    /// Nothing is shown but the prompt.
    only_prompt: bool,
    logprobs: bool,
    skip_special: bool,
}

impl Shown {
    pub(super) fn new(job: &Job, echo: Option<String>, only_prompt: bool) -> Self {
        let (logprobs, skip_special) = (job.top_logprobs.is_some(), job.skip_special);
        Self { prompt: job.prompt.clone(), echo, only_prompt, logprobs, skip_special }
    }
}

impl Answer {
    fn object(&self, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model.id,
            "system_fingerprint": self.model.fingerprint(),
            "choices": choices,
        })
    }

    /// What is told of a choice's usage: a token that is generated for the prompt's sake and not shown is none.
    fn used(&self, prompt: usize, usage: Usage) -> Usage {
        match self.shown[prompt].only_prompt {
            true => Usage { completion_tokens: 0, ..usage },
            false => usage,
        }
    }

    fn progress(&self) -> Vec<Progress> {
        let one = |shown: &Shown| Progress {
            logprobs: Logprobs::new(shown.skip_special, self.ids_as_tokens),
            started: false,
        };
        self.shown.iter().flat_map(|shown| (0..self.n).map(move |_| one(shown))).collect()
    }

    /// The log-probabilities that were not shown yet.
    fn logprobs(&self, prompt: usize, progress: &mut Progress) -> Value {
        match self.shown[prompt].logprobs {
            true => progress.logprobs.take(),
            false => Value::Null,
        }
    }

    /// The text and log-probabilities that a piece adds to its choice.
    fn add(&self, prompt: usize, piece: &Piece, progress: &mut Progress) -> String {
        let (shown, model) = (&self.shown[prompt], &*self.model);
        let mut text = String::new();
        if let Some(echo) = shown.echo.as_ref().filter(|_| !progress.started) {
            text.clone_from(echo);
            if shown.logprobs {
                let known = piece.prompt_logprobs.as_deref().unwrap_or_default();
                for (i, token) in shown.prompt.iter().enumerate() {
                    let sampled = i.checked_sub(1).and_then(|i| known.get(i));
                    progress.logprobs.push(model, *token, sampled);
                }
            }
        }
        progress.started = true;
        if shown.only_prompt {
            return text;
        }
        if shown.logprobs {
            for piece in &piece.tokens {
                progress.logprobs.push(model, piece.token.id, Some(&piece.token));
            }
        }
        text + &piece.text
    }
}

fn choice(index: usize, text: &str, logprobs: Value, reason: Option<FinishReason>) -> Value {
    json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason.map(FinishReason::name)})
}

/// One choice under way.
struct Progress {
    started: bool,
    logprobs: Logprobs,
}

pub(super) fn stream(answer: Answer, pieces: Pieces, streaming: Streaming, core: &Arc<Core>) -> Response {
    let chunks = Stream {
        progress: answer.progress(),
        totals: vec![Totals::default(); answer.shown.len()],
        left: answer.shown.len() * answer.n,
        include_usage: streaming.include_usage,
        answer,
    };
    sse::response(core, Vec::new(), pieces, chunks)
}

/// A stream under way.
struct Stream {
    answer: Answer,
    progress: Vec<Progress>,
    totals: Vec<Totals>,
    left: usize,
    include_usage: bool,
}

impl Chunks for Stream {
    type Piece = (usize, Piece);

    fn bytes((_, piece): &Self::Piece) -> usize {
        piece.bytes_shown()
    }

    fn of(&mut self, (prompt, piece): Self::Piece) -> Vec<Value> {
        let index = prompt * self.answer.n + piece.choice;
        let progress = &mut self.progress[index];
        let text = self.answer.add(prompt, &piece, progress);
        let logprobs = self.answer.logprobs(prompt, progress);
        let reason = piece.finish.map(|(reason, _)| reason);
        let mut chunks = Vec::new();
        if !text.is_empty() || reason.is_some() || !logprobs.is_null() {
            let mut chunk = self.answer.object(vec![choice(index, &text, logprobs, reason)]);
            if self.include_usage {
                chunk["usage"] = Value::Null;
            }
            chunks.push(chunk);
        }
        if let Some((_, usage)) = piece.finish {
            self.totals[prompt].add(self.answer.used(prompt, usage));
            self.left -= 1;
            if self.left == 0 && self.include_usage {
                let mut last = self.answer.object(Vec::new());
                last["usage"] = Totals::sum(&self.totals).object();
                chunks.push(last);
            }
        }
        chunks
    }
}

pub(super) async fn whole(answer: Answer, mut pieces: Pieces, core: &Core) -> Result<Response, HttpError> {
    let mut all = Vec::new();
    while let Some(piece) = pieces.next().await {
        all.push(piece?);
    }
    let bytes = all.iter().map(|(_, piece)| piece.bytes_shown()).sum();
    write(core, bytes, move || collect(&answer, &all)).await
}

fn collect(answer: &Answer, pieces: &[(usize, Piece)]) -> Value {
    let count = answer.shown.len() * answer.n;
    let mut progress = answer.progress();
    let mut texts = vec![String::new(); count];
    let mut reasons = vec![None; count];
    let mut totals = vec![Totals::default(); answer.shown.len()];
    for (prompt, piece) in pieces {
        let index = prompt * answer.n + piece.choice;
        texts[index] += &answer.add(*prompt, piece, &mut progress[index]);
        if let Some((reason, usage)) = piece.finish {
            reasons[index] = Some(reason);
            totals[*prompt].add(answer.used(*prompt, usage));
        }
    }
    let choices = (0..count).map(|index| {
        let logprobs = answer.logprobs(index / answer.n, &mut progress[index]);
        choice(index, &texts[index], logprobs, reasons[index])
    });
    let mut object = answer.object(choices.collect());
    object["usage"] = Totals::sum(&totals).object();
    object
}
