//! Between the wire and the core.
use crate::core::tools::{Call, Style, Tools};
use crate::core::{Names, Piece, SamplingInput, closed, compact, one_of};
use moesaic_proto::inference::v1 as wire;
use moesaic_types::{Error, FinishReason, Grammar, Result};
use serde_json::{Map, Value, json};

/// Sampling, format, priority and deadline of a request.
pub(super) fn sampling(
    sampling: Option<wire::SamplingParams>,
    format: Option<wire::ResponseFormat>,
    priority: i32,
    deadline_ms: u32,
) -> Result<SamplingInput> {
    let s = sampling.unwrap_or_default();
    let mut logit_bias: Vec<_> = s.logit_bias.iter().map(|(id, bias)| (u64::from(*id), f64::from(*bias))).collect();
    logit_bias.sort_by_key(|(id, _)| *id);
    let grammar = format.map(grammar).transpose()?.flatten();
    Ok(SamplingInput {
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
        include_stop_text: s.include_stop_str_in_output,
        stop_token_ids: s.stop_token_ids.into_iter().map(u64::from).collect(),
        ignore_eos: s.ignore_eos,
        n: s.n.map(u64::from),
        top_logprobs: s.top_logprobs.map(u64::from),
        grammar,
        priority: i64::from(priority),
        deadline_ms: Some(u64::from(deadline_ms)),
        names: Names::default(),
    })
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

fn grammar(format: wire::ResponseFormat) -> Result<Option<Grammar>> {
    use wire::response_format::Format;
    let Some(kind) = format.format else { return Ok(None) };
    Ok(Some(match kind {
        Format::JsonObject(_) => Grammar::JsonObject,
        Format::JsonSchema(schema) if format.strict => {
            let schema = compact(closed(json("response_format.json_schema", &schema)?));
            Grammar::JsonSchema(schema.to_string().into())
        }
        Format::JsonSchema(schema) => Grammar::JsonSchema(schema.into()),
        Format::Regex(regex) => Grammar::Regex(regex.into()),
        Format::Lark(grammar) => Grammar::Lark(grammar.into()),
        Format::Choice(choice) => one_of("response_format.choice.texts", &choice.texts)?,
    }))
}

fn json(field: &str, text: &str) -> Result<Value> {
    serde_json::from_str(text).map_err(|error| Error::invalid(field, format!("{field} is not JSON: {error}")))
}

/// A message of a conversation as the HTTP door has it.
pub(super) fn message(message: wire::ChatMessage) -> Value {
    let wire::ChatMessage { role, content, tool_calls, tool_call_id, name, reasoning } = message;
    let mut object = json!({"role": role, "content": content});
    for (key, text) in [("tool_call_id", tool_call_id), ("name", name), ("reasoning_content", reasoning)] {
        if !text.is_empty() {
            object[key] = text.into();
        }
    }
    if !tool_calls.is_empty() {
        let call = |call: wire::ToolCall| {
            let function = json!({"name": call.name, "arguments": call.arguments});
            json!({"id": call.id, "type": "function", "function": function})
        };
        object["tool_calls"] = tool_calls.into_iter().map(call).collect();
    }
    object
}

/// The tools of a conversation, and which of them may or must be called.
pub(super) fn tools(tools: Vec<wire::Tool>, choice: Option<wire::ToolChoice>, single: bool) -> Result<Tools> {
    use wire::tool_choice::Choice;
    let mut list = Vec::with_capacity(tools.len());
    for (i, tool) in tools.into_iter().enumerate() {
        let mut function = json!({"name": tool.name, "description": tool.description});
        if !tool.parameters.is_empty() {
            function["parameters"] = json(&format!("tools[{i}].parameters"), &tool.parameters)?;
        }
        list.push(json!({"type": "function", "function": function}));
    }
    let choice = match choice.and_then(|choice| choice.choice) {
        None => Value::Null,
        Some(Choice::Name(name)) => json!({"type": "function", "function": {"name": name}}),
        Some(Choice::Mode(mode)) => match wire::ToolMode::try_from(mode) {
            Ok(wire::ToolMode::Unspecified) => Value::Null,
            Ok(wire::ToolMode::None) => "none".into(),
            Ok(wire::ToolMode::Auto) => "auto".into(),
            Ok(wire::ToolMode::Required) => "required".into(),
            Err(_) => return Err(Error::invalid("tool_choice", format!("tool_choice.mode {mode} is unknown"))),
        },
    };
    Ok(Tools { single, ..Tools::parse(Some(&Value::Array(list)), Some(&choice))? })
}

/// Variables of a chat template.
pub(super) fn variables(text: &str) -> Result<Map<String, Value>> {
    if text.is_empty() {
        return Ok(Map::new());
    }
    match json("template_kwargs", text)? {
        Value::Object(variables) => Ok(variables),
        _ => Err(Error::invalid("template_kwargs", "template_kwargs must be a JSON object")),
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
            FinishReason::Stop => wire::FinishReason::Stop,
            FinishReason::ToolCalls => wire::FinishReason::ToolCalls,
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

/// The same for the answers of a conversation, one piece after the other.
pub(super) fn chat(style: &Style, n: usize) -> impl FnMut(Piece) -> wire::ChatResponse + Send + use<> {
    let mut choices: Vec<_> = (0..n).map(|_| (style.splitter(), false)).collect();
    let tools = style.tools.clone();
    move |mut next| {
        let (splitter, called) = &mut choices[next.choice];
        let mut said = splitter.push(&next.text);
        if next.finish.is_some() {
            said.add(splitter.finish());
        }
        *called |= !said.calls.is_empty();
        next.finish = next.finish.map(|(reason, usage)| (tools.reason(reason, *called), usage));
        let wire::GenerateResponse { choice, tokens, finish, .. } = piece(next);
        let call = |Call { name, arguments }| wire::ToolCall { id: Call::new_id(), name, arguments };
        let tool_calls = said.calls.into_iter().map(call).collect();
        wire::ChatResponse { choice, text: said.text, tokens, finish, reasoning: said.reasoning, tool_calls }
    }
}
