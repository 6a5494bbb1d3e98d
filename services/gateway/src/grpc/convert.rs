//! Between the wire and the core.
use crate::core::{Names, Piece, SamplingInput};
use moesaic_proto::inference::v1 as wire;
use moesaic_types::{Error, FinishReason, Grammar};

/// Sampling, format, priority and deadline of a request.
pub(super) fn sampling(
    sampling: Option<wire::SamplingParams>,
    format: Option<wire::ResponseFormat>,
    priority: i32,
    deadline_ms: u32,
) -> SamplingInput {
    let s = sampling.unwrap_or_default();
    let mut logit_bias: Vec<_> = s.logit_bias.iter().map(|(id, bias)| (u64::from(*id), f64::from(*bias))).collect();
    logit_bias.sort_by_key(|(id, _)| *id);
    SamplingInput {
        temperature: s.temperature.map(f64::from),
        top_k: s.top_k.map(i64::from),
        top_p: s.top_p.map(f64::from),
        min_p: s.min_p.map(f64::from),
        repetition_penalty: s.repetition_penalty.map(f64::from),
        presence_penalty: s.presence_penalty.map(f64::from),
        frequency_penalty: s.frequency_penalty.map(f64::from),
        logit_bias,
        seed: s.seed,
        max_tokens: s.max_tokens.map(u64::from),
        min_tokens: s.min_tokens.map(u64::from),
        stop: s.stop,
        include_stop_text: false,
        stop_token_ids: s.stop_token_ids.into_iter().map(u64::from).collect(),
        ignore_eos: s.ignore_eos,
        n: s.n.map(u64::from),
        top_logprobs: s.top_logprobs.map(u64::from),
        grammar: format.and_then(|format| format.format).map(grammar),
        priority: i64::from(priority),
        deadline_ms: Some(u64::from(deadline_ms)),
        names: Names::default(),
    }
}

/// Fields of `SamplingParams`, where a path to one begins with `sampling.`.
const SAMPLING: [&str; 16] = [
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "max_tokens",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "n",
    "top_logprobs",
];

/// An error whose field is a path from the request.
pub(super) fn in_sampling(error: Error) -> Error {
    let inside = |field: &String| SAMPLING.contains(&field.split('[').next().unwrap_or_default());
    match error.field.as_ref().filter(|field| inside(field)) {
        Some(field) => Error { field: Some(format!("sampling.{field}")), ..error },
        None => error,
    }
}

fn grammar(format: wire::response_format::Format) -> Grammar {
    use wire::response_format::Format;
    match format {
        Format::JsonObject(_) => Grammar::JsonObject,
        Format::JsonSchema(schema) => Grammar::JsonSchema(schema.into()),
        Format::Regex(regex) => Grammar::Regex(regex.into()),
        Format::Lark(grammar) => Grammar::Lark(grammar.into()),
    }
}

fn narrow(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// A piece's tokens and end.
pub(super) fn piece(piece: Piece) -> wire::GenerateResponse {
    let token = |piece: crate::core::TokenPiece| wire::Token {
        id: piece.token.id,
        logprob: piece.token.logprob,
        alternatives: piece
            .token
            .top_logprobs
            .iter()
            .map(|(id, logprob)| wire::Alternative { id: *id, logprob: *logprob })
            .collect(),
    };
    let finish = piece.finish.map(|(reason, usage)| {
        let reason = match reason {
            FinishReason::Stop | FinishReason::ToolCalls => wire::FinishReason::Stop,
            FinishReason::Length => wire::FinishReason::Length,
        };
        wire::Finish {
            reason: reason.into(),
            usage: Some(wire::Usage {
                prompt_tokens: narrow(usage.prompt_tokens),
                cached_tokens: narrow(usage.cached_tokens),
                completion_tokens: narrow(usage.completion_tokens),
            }),
        }
    });
    wire::GenerateResponse {
        choice: narrow(piece.choice),
        text: piece.text,
        tokens: piece.tokens.into_iter().map(token).collect(),
        finish,
    }
}

/// The same for a conversation.
pub(super) fn chat(piece_: Piece) -> wire::ChatResponse {
    let wire::GenerateResponse { choice, text, tokens, finish } = piece(piece_);
    wire::ChatResponse { choice, text, tokens, finish }
}
