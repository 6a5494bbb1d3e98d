//! Sampling and output format as the two OpenAI routes have them, with vLLM's further fields.
use super::fields::Fields;
use crate::core::{Names, SamplingInput, closed, compact, one_of};
use moesaic_types::{Error, Grammar, Result};
use serde_json::{Map, Value};

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
    let mut names = Names::default();
    if fields.get("max_completion_tokens").is_some() {
        names.max_tokens = "max_completion_tokens";
    }
    let grammar = grammar(fields)?;
    if let Some((field, _)) = &grammar {
        names.grammar = field;
    }
    Ok(SamplingInput {
        temperature: fields.number("temperature")?,
        top_k: fields.whole("top_k")?,
        top_p: fields.number("top_p")?,
        min_p: fields.number("min_p")?,
        repetition_penalty: fields.number("repetition_penalty")?,
        presence_penalty: fields.number("presence_penalty")?,
        frequency_penalty: fields.number("frequency_penalty")?,
        logit_bias,
        seed: fields.bits("seed")?,
        max_tokens: fields.count(names.max_tokens, 0)?,
        min_tokens: fields.count("min_tokens", 0)?,
        stop: fields.texts("stop")?,
        include_stop_text: fields.flag("include_stop_str_in_output")?,
        stop_token_ids: fields.counts("stop_token_ids")?,
        ignore_eos: fields.flag("ignore_eos")?,
        n: fields.count("n", 0)?,
        top_logprobs: None,
        grammar: grammar.map(|(_, grammar)| grammar),
        priority: fields.whole("priority")?.unwrap_or(0),
        deadline_ms: fields.count("deadline_ms", 0)?,
        names,
    })
}

/// A grammar with the field that it came from.
type Found = (&'static str, Grammar);

/// From `response_format`, `structured_outputs`, or one of the `guided_` fields that it replaces in newer clients.
fn grammar(fields: &Fields<'_>) -> Result<Option<Found>> {
    let mut found = Vec::new();
    if let Some(format) = fields.object("response_format")? {
        found.extend(response_format(format)?.map(|grammar| ("response_format", grammar)));
    }
    let guided = ["guided_json", "guided_regex", "guided_choice", "guided_grammar"];
    found.extend(constraints(fields, guided)?);
    if let Some(outputs) = fields.object("structured_outputs")? {
        let names = ["json", "regex", "choice", "grammar"];
        if let Some(other) = outputs.iter().find(|(name, v)| !v.is_null() && !names.contains(&name.as_str())) {
            let message = format!("structured_outputs has '{}'; use one of: {}", other.0, names.join(", "));
            return Err(Error::invalid("structured_outputs", message));
        }
        let inside = constraints(&Fields::new(outputs), names)?;
        found.extend(inside.into_iter().map(|(_, grammar)| ("structured_outputs", grammar)));
    }
    if let [(first, _), (second, _), ..] = found.as_slice() {
        let message = format!("{first} and {second} exclude one another; leave one out");
        return Err(Error::invalid(*second, message));
    }
    Ok(found.pop())
}

fn response_format(format: &Map<String, Value>) -> Result<Option<Grammar>> {
    let invalid = |field: &str, must: &str| {
        let field = format!("response_format.{field}");
        Error::invalid(field.clone(), format!("{field} must be {must}"))
    };
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Grammar::JsonObject)),
        Some("json_schema") => {
            let schema = format.get("json_schema").and_then(|s| s.get("schema")).filter(|s| s.is_object());
            let schema = schema.ok_or_else(|| invalid("json_schema.schema", "an object"))?;
            let strict = match format["json_schema"].get("strict") {
                None | Some(Value::Null) => false,
                Some(Value::Bool(strict)) => *strict,
                Some(_) => return Err(invalid("json_schema.strict", "true or false")),
            };
            let schema = if strict { compact(closed(schema.clone())) } else { schema.clone() };
            Ok(Some(Grammar::JsonSchema(schema.to_string().into())))
        }
        _ => Err(invalid("type", "text, json_object or json_schema")),
    }
}

/// A JSON schema, a regular expression, a list of texts or a grammar, under these four names.
fn constraints(fields: &Fields<'_>, [json, regex, choice, grammar]: [&'static str; 4]) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    match fields.get(json) {
        None => {}
        Some(Value::String(text)) => found.push((json, Grammar::JsonSchema(text.as_str().into()))),
        Some(schema) => found.push((json, Grammar::JsonSchema(schema.to_string().into()))),
    }
    found.extend(fields.text(regex)?.map(|text| (regex, Grammar::Regex(text.into()))));
    if fields.list(choice)?.is_some() {
        found.push((choice, one_of(choice, &fields.texts(choice)?)?));
    }
    found.extend(fields.text(grammar)?.map(|text| (grammar, Grammar::Lark(text.into()))));
    Ok(found)
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
