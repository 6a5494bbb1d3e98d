//! Sampling and output format as the two OpenAI routes have them, with vLLM's further fields.
use super::fields::Fields;
use crate::core::SamplingInput;
use moesaic_types::{Error, Grammar, Result};
use serde_json::Value;

/// The fields that chat and completions share.
///
/// # Errors
/// `InvalidArgument` naming the field.
pub fn sampling(fields: &Fields<'_>) -> Result<SamplingInput> {
    let mut logit_bias = Vec::new();
    for (id, bias) in fields.object("logit_bias")?.into_iter().flatten() {
        let wrong = || Error::invalid("logit_bias", format!("logit_bias has '{id}': use \"token\": number"));
        logit_bias.push((id.parse().map_err(|_| wrong())?, bias.as_f64().ok_or_else(wrong)?));
    }
    let max_tokens = match fields.count("max_completion_tokens")? {
        None => fields.count("max_tokens")?,
        some => some,
    };
    Ok(SamplingInput {
        temperature: fields.number("temperature")?,
        top_k: fields.whole("top_k")?,
        top_p: fields.number("top_p")?,
        min_p: fields.number("min_p")?,
        repetition_penalty: fields.number("repetition_penalty")?,
        presence_penalty: fields.number("presence_penalty")?,
        frequency_penalty: fields.number("frequency_penalty")?,
        logit_bias,
        // clients send any 64 bits
        seed: fields.whole("seed")?.map(i64::cast_unsigned),
        max_tokens,
        min_tokens: fields.count("min_tokens")?,
        stop: fields.texts("stop")?,
        stop_token_ids: fields.counts("stop_token_ids")?,
        ignore_eos: fields.flag("ignore_eos")?,
        n: fields.count("n")?,
        top_logprobs: None,
        grammar: grammar(fields)?,
        priority: fields.whole("priority")?.unwrap_or(0),
        deadline_ms: fields.count("deadline_ms")?,
    })
}

/// `response_format`, or one of `guided_json`, `guided_regex` and `guided_grammar`.
fn grammar(fields: &Fields<'_>) -> Result<Option<Grammar>> {
    let mut found = Vec::new();
    if let Some(format) = fields.object("response_format")? {
        let invalid = |message: &str| Error::invalid("response_format", format!("response_format{message}"));
        match format.get("type").and_then(Value::as_str) {
            Some("text") => {}
            Some("json_object") => found.push(Grammar::JsonObject),
            Some("json_schema") => {
                let schema = format.get("json_schema").and_then(|s| s.get("schema")).filter(|s| s.is_object());
                let schema = schema.ok_or_else(|| invalid(".json_schema.schema must be an object"))?;
                found.push(Grammar::JsonSchema(schema.to_string().into()));
            }
            _ => return Err(invalid(".type must be text, json_object or json_schema")),
        }
    }
    match fields.get("guided_json") {
        None => {}
        Some(Value::String(text)) => found.push(Grammar::JsonSchema(text.as_str().into())),
        Some(schema) => found.push(Grammar::JsonSchema(schema.to_string().into())),
    }
    found.extend(fields.text("guided_regex")?.map(|regex| Grammar::Regex(regex.into())));
    found.extend(fields.text("guided_grammar")?.map(|grammar| Grammar::Lark(grammar.into())));
    if found.len() > 1 {
        let message = "response_format, guided_json, guided_regex and guided_grammar exclude one another";
        return Err(Error::invalid("response_format", message));
    }
    Ok(found.pop())
}

/// How an answer is streamed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Streaming {
    /// Whether it is.
    pub on: bool,
    /// A last chunk with the usage.
    pub include_usage: bool,
}

/// `stream` and `stream_options`.
///
/// # Errors
/// `InvalidArgument` naming the field.
pub fn streaming(fields: &Fields<'_>) -> Result<Streaming> {
    let on = fields.flag("stream")?;
    let options = fields.object("stream_options")?;
    if options.is_some() && !on {
        return Err(Error::invalid("stream_options", "stream_options needs stream to be true"));
    }
    let include_usage = match options {
        Some(options) => Fields::new(options).flag("include_usage")?,
        None => false,
    };
    Ok(Streaming { on, include_usage })
}
