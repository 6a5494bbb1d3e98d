//! From messages to a prompt.
use crate::served::ServedModel;
use moesaic_types::{Error, Result};
use serde_json::{Map, Value, json};

/// The prompt of a conversation.
///
/// # Errors
/// `InvalidArgument` naming the message and the field, or with what the template says.
pub fn render(
    model: &ServedModel,
    messages: &[Value],
    tools: Option<&[Value]>,
    add_generation_prompt: bool,
    extra: &Map<String, Value>,
) -> Result<String> {
    if messages.is_empty() {
        return Err(Error::invalid("messages", "messages is empty; it must have at least one message"));
    }
    let messages = messages.iter().enumerate().map(|(i, m)| normalize(i, m)).collect::<Result<Vec<_>>>()?;
    let template = model.template.as_ref().ok_or_else(|| {
        Error::invalid("messages", format!("model '{}' has no chat template; use /v1/completions", model.id))
    })?;
    let rendered = template.render(&messages, tools, add_generation_prompt, extra);
    rendered.map_err(|error| Error::invalid("messages", error.to_string()))
}

/// A message as templates expect it: content as text, arguments of calls as objects.
fn normalize(index: usize, message: &Value) -> Result<Value> {
    let field = |name: &str| format!("messages[{index}]{name}");
    let Value::Object(message) = message else {
        return Err(Error::invalid(field(""), format!("{} must be an object", field(""))));
    };
    let mut message = message.clone();
    let role = match message.get("role").and_then(Value::as_str) {
        Some("developer") => "system",
        Some(role @ ("system" | "user" | "assistant" | "tool" | "function")) => role,
        _ => {
            let message = format!("{} must be system, developer, user, assistant or tool", field(".role"));
            return Err(Error::invalid(field(".role"), message));
        }
    };
    let role = role.to_owned();
    let content = match message.get("content") {
        None | Some(Value::Null) if role == "assistant" => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            let text = |(i, part): (usize, &Value)| {
                let text = match part["type"].as_str() {
                    Some("text") => part["text"].as_str(),
                    Some("refusal") if role == "assistant" => part["refusal"].as_str(),
                    _ => None,
                };
                let part = field(&format!(".content[{i}]"));
                let wrong = || format!("{part} must be {{\"type\": \"text\", \"text\": ...}}");
                text.map(str::to_owned).ok_or_else(|| Error::invalid(part.clone(), wrong()))
            };
            parts.iter().enumerate().map(text).collect::<Result<String>>()?
        }
        _ => {
            return Err(Error::invalid(
                field(".content"),
                format!("{} must be a text or text parts", field(".content")),
            ));
        }
    };
    message.insert("role".into(), role.into());
    message.insert("content".into(), content.into());
    match message.get_mut("tool_calls") {
        None => {}
        Some(Value::Null) => {
            // templates ask whether there are any, and not all of them take `none` for that
            message.remove("tool_calls");
        }
        Some(Value::Array(calls)) => {
            for (i, call) in calls.iter_mut().enumerate() {
                arguments(&field(&format!(".tool_calls[{i}]")), call)?;
            }
        }
        Some(_) => {
            let calls = field(".tool_calls");
            return Err(Error::invalid(calls.clone(), format!("{calls} must be a list of calls")));
        }
    }
    // the name under which GPT-OSS's template looks for it
    if let Some(reasoning @ Value::String(_)) = message.get("reasoning_content").cloned() {
        message.entry("thinking").or_insert(reasoning);
    }
    Ok(Value::Object(message))
}

/// Makes the arguments of a call in the conversation an object, where they are the text of one.
fn arguments(field: &str, call: &mut Value) -> Result<()> {
    let named = call["function"]["name"].as_str().is_some_and(|name| !name.is_empty());
    let known = matches!(call.get("type"), None | Some(Value::Null)) || call["type"] == "function";
    if !named || !known {
        let form = "{\"type\": \"function\", \"function\": {\"name\": ..., \"arguments\": ...}}";
        return Err(Error::invalid(field, format!("{field} must be {form}")));
    }
    let arguments = &mut call["function"]["arguments"];
    let parsed = match &*arguments {
        Value::Object(_) => return Ok(()),
        Value::Null => json!({}),
        Value::String(text) if text.trim().is_empty() => json!({}),
        // a model may have written what is no JSON; its template shows it as it is
        Value::String(text) => match serde_json::from_str(text) {
            Ok(parsed) => parsed,
            Err(_) => return Ok(()),
        },
        _ => {
            let field = format!("{field}.function.arguments");
            return Err(Error::invalid(field.clone(), format!("{field} must be a text with a JSON object")));
        }
    };
    *arguments = parsed;
    Ok(())
}

/// The prompt of a conversation whose last message is to be gone on with: the rendered text up to that message's end.
///
/// # Errors
/// As [`render`], and where the template does not show the last message's text as it is.
pub fn render_unfinished(
    model: &ServedModel,
    messages: &[Value],
    tools: Option<&[Value]>,
    extra: &Map<String, Value>,
) -> Result<String> {
    let mut rendered = render(model, messages, tools, false, extra)?;
    let index = messages.len() - 1;
    let last = normalize(index, &messages[index])?;
    let text = last["content"].as_str().unwrap_or_default().trim();
    let end = rendered.rfind(text).filter(|_| !text.is_empty()).map(|at| at + text.len());
    let end = end.ok_or_else(|| {
        let field = format!("messages[{index}].content");
        let message = format!("{field} cannot be continued: it is empty, or the model's template changes it");
        Error::invalid(field, message)
    })?;
    rendered.truncate(end);
    Ok(rendered)
}
