//! `/v1/completions`.
use super::chat::{Totals, reason_name};
use super::error::HttpError;
use super::fields::{self, Fields};
use super::params;
use super::{body, key, now, sse};
use crate::core::{Core, Piece, cut_off, tokens};
use crate::served::ServedModel;
use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use futures::{StreamExt, stream};
use moesaic_types::{Error, FinishReason, RequestId, Result, SampledToken, TokenId};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Prompts of one request at most.
const MAX_PROMPTS: usize = 64;

pub(super) async fn completions(
    State(core): State<Arc<Core>>,
    headers: HeaderMap,
    bytes: Result<Bytes, BytesRejection>,
) -> Result<Response, HttpError> {
    let object = fields::parse(&body(bytes, core.config.body_limit.as_usize())?)?;
    let fields = Fields::new(&object);
    let streaming = params::streaming(&fields)?;
    let model = core.model(fields.text("model")?.unwrap_or_default())?;
    let mut input = params::sampling(&fields)?;
    input.max_tokens.get_or_insert(16); // OpenAI's default of this route
    input.top_logprobs = fields.count("logprobs")?;
    let echo = fields.flag("echo")?;
    let n = input.n.unwrap_or(1);
    if fields.count("best_of")?.is_some_and(|best| best != n) {
        return Err(Error::invalid(
            "best_of",
            format!("best_of must equal n ({n}); sampling for the best is not offered"),
        )
        .into());
    }
    let prompts = prompts(&fields, &model)?;
    let id = format!("cmpl-{}", uuid::Uuid::new_v4().simple());
    let head = Head { id: id.clone(), model: model.clone(), created: now() };
    let choices_each = n.max(1) as usize;
    let mut all = Vec::with_capacity(prompts.len());
    let mut shown = Vec::new();
    for (index, prompt) in prompts.into_iter().enumerate() {
        let id = RequestId::new(format!("{id}-{index}"));
        let mut job = input.clone().into_job(id, model.clone(), prompt, &core.limits(), core.salt(key(&headers)))?;
        job.continues = true;
        job.prompt_logprobs = echo && job.top_logprobs.is_some();
        shown.push(Echo { on: echo, logprobs: job.top_logprobs.is_some(), prompt: job.prompt.clone() });
        let pieces = core.answer(job).await?;
        let shift = move |piece: Result<Piece>| piece.map(|piece| (index, piece));
        all.push(pieces.map(shift).boxed());
    }
    let pieces: Pieces = stream::select_all(all).boxed();
    let answer = Answer { head, echo: shown, choices_each, include_usage: streaming.include_usage };
    if streaming.on {
        let events = answer.events(pieces);
        return Ok(sse::response(cut_off(events, core.config.write_timeout.get())));
    }
    Ok(Json(answer.whole(pieces).await?).into_response())
}

type Pieces = stream::BoxStream<'static, Result<(usize, Piece)>>;

fn prompts(fields: &Fields<'_>, model: &ServedModel) -> Result<Vec<Vec<TokenId>>> {
    let encode =
        |text: &str| model.tokenizer.encode(text, true).map_err(|error| Error::invalid("prompt", error.to_string()));
    let prompts = match fields.get("prompt") {
        None => return Err(Error::invalid("prompt", "prompt is missing")),
        Some(Value::String(text)) => vec![encode(text)?],
        Some(Value::Array(list)) => match list.first() {
            None => return Err(Error::invalid("prompt", "prompt is empty; it must have at least one token")),
            Some(Value::String(_)) => fields.texts("prompt")?.iter().map(|text| encode(text)).collect::<Result<_>>()?,
            Some(Value::Array(_)) => {
                let one = |(i, list): (usize, &Value)| {
                    tokens("prompt", &fields::counts(&format!("prompt[{i}]"), list)?, model)
                };
                list.iter().enumerate().map(one).collect::<Result<_>>()?
            }
            Some(_) => vec![tokens("prompt", &fields.counts("prompt")?, model)?],
        },
        Some(_) => return Err(Error::invalid("prompt", "prompt must be a text, tokens, or a list of those")),
    };
    if prompts.len() > MAX_PROMPTS {
        let message = format!("prompt has {} entries; the limit is {MAX_PROMPTS}", prompts.len());
        return Err(Error::invalid("prompt", message));
    }
    Ok(prompts)
}

struct Head {
    id: String,
    model: Arc<ServedModel>,
    created: u64,
}

/// What is shown of one prompt.
struct Echo {
    on: bool,
    logprobs: bool,
    prompt: Arc<[TokenId]>,
}

struct Answer {
    head: Head,
    echo: Vec<Echo>,
    choices_each: usize,
    include_usage: bool,
}

/// Log-probabilities in the lists of this route; `offset` is where the next token's text begins.
#[derive(Default)]
struct Logprobs {
    tokens: Vec<Value>,
    token_logprobs: Vec<Value>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<Value>,
    offset: usize,
}

impl Logprobs {
    fn push(&mut self, model: &ServedModel, token: TokenId, sampled: Option<&SampledToken>) {
        let text = |id: TokenId| String::from_utf8_lossy(model.tokenizer.token_bytes(id)).into_owned();
        self.text_offset.push(self.offset.into());
        let shown = text(token);
        self.offset += shown.chars().count();
        self.tokens.push(shown.into());
        self.token_logprobs.push(sampled.and_then(|s| s.logprob).into());
        self.top_logprobs.push(match sampled {
            None => Value::Null,
            Some(sampled) => {
                let mut top: Map<String, Value> = Map::new();
                for (id, logprob) in &sampled.top_logprobs {
                    // of tokens that look the same, the likeliest counts
                    top.entry(text(*id)).or_insert_with(|| (*logprob).into());
                }
                Value::Object(top)
            }
        });
    }

    /// Takes what was collected; the offset goes on.
    fn take(&mut self) -> Value {
        let taken = std::mem::replace(self, Self { offset: self.offset, ..Self::default() });
        json!({
            "tokens": taken.tokens,
            "token_logprobs": taken.token_logprobs,
            "top_logprobs": taken.top_logprobs,
            "text_offset": taken.text_offset,
        })
    }
}

/// One choice under way.
#[derive(Default)]
struct Progress {
    started: bool,
    logprobs: Logprobs,
}

impl Answer {
    fn object(&self, choices: Vec<Value>) -> Value {
        let Head { id, model, created } = &self.head;
        json!({"id": id, "object": "text_completion", "created": created, "model": model.id, "choices": choices})
    }

    /// The text and log-probabilities that a piece adds to its choice.
    fn add(&self, prompt: usize, piece: &Piece, progress: &mut Progress) -> String {
        let (echo, model) = (&self.echo[prompt], &*self.head.model);
        let mut text = String::new();
        if !progress.started && echo.on {
            text = model.tokenizer.decode(&echo.prompt, true).unwrap_or_default();
            if echo.logprobs {
                let known = piece.prompt_logprobs.as_deref().unwrap_or_default();
                for (i, token) in echo.prompt.iter().enumerate() {
                    let sampled = i.checked_sub(1).and_then(|i| known.get(i));
                    progress.logprobs.push(model, *token, sampled);
                }
            }
        }
        progress.started = true;
        if echo.logprobs {
            for piece in &piece.tokens {
                progress.logprobs.push(model, piece.token.id, Some(&piece.token));
            }
        }
        text + &piece.text
    }

    fn choice(&self, index: usize, text: &str, logprobs: Option<Value>, reason: Option<FinishReason>) -> Value {
        let reason = reason.map(|reason| reason_name(reason, false));
        json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})
    }

    fn events(self, pieces: Pieces) -> stream::BoxStream<'static, Result<Value>> {
        let count = self.echo.len() * self.choices_each;
        let mut progress: Vec<Progress> = (0..count).map(|_| Progress::default()).collect();
        let mut totals = vec![Totals::default(); self.echo.len()];
        let mut left = count;
        let events = pieces.flat_map(move |piece| {
            let mut events = Vec::new();
            match piece {
                Err(error) => events.push(Err(error)),
                Ok((prompt, piece)) => {
                    let index = prompt * self.choices_each + piece.choice;
                    let text = self.add(prompt, &piece, &mut progress[index]);
                    let logprobs = self.echo[prompt].logprobs.then(|| progress[index].logprobs.take());
                    let reason = piece.finish.map(|(reason, _)| reason);
                    if !text.is_empty() || reason.is_some() || logprobs.is_some() {
                        events.push(Ok(self.object(vec![self.choice(index, &text, logprobs, reason)])));
                    }
                    if let Some((_, usage)) = piece.finish {
                        totals[prompt].add(usage);
                        left -= 1;
                        if left == 0 && self.include_usage {
                            let mut last = self.object(Vec::new());
                            last["usage"] = sum(&totals).object();
                            events.push(Ok(last));
                        }
                    }
                }
            }
            stream::iter(events)
        });
        events.boxed()
    }

    async fn whole(self, mut pieces: Pieces) -> Result<Value> {
        let count = self.echo.len() * self.choices_each;
        let mut progress: Vec<Progress> = (0..count).map(|_| Progress::default()).collect();
        let mut texts = vec![String::new(); count];
        let mut reasons = vec![None; count];
        let mut totals = vec![Totals::default(); self.echo.len()];
        while let Some(piece) = pieces.next().await {
            let (prompt, piece) = piece?;
            let index = prompt * self.choices_each + piece.choice;
            texts[index] += &self.add(prompt, &piece, &mut progress[index]);
            if let Some((reason, usage)) = piece.finish {
                reasons[index] = Some(reason);
                totals[prompt].add(usage);
            }
        }
        let choices = (0..count).map(|index| {
            let logprobs = self.echo[index / self.choices_each].logprobs.then(|| progress[index].logprobs.take());
            self.choice(index, &texts[index], logprobs, reasons[index])
        });
        let mut answer = self.object(choices.collect());
        answer["usage"] = sum(&totals).object();
        Ok(answer)
    }
}

fn sum(totals: &[Totals]) -> Totals {
    let mut all = Totals::default();
    totals.iter().for_each(|one| all.merge(*one));
    all
}
