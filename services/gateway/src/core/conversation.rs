//! From messages to a prompt.
use crate::served::ServedModel;
use moesaic_types::{Error, Result};
use serde_json::{Map, Value};

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
            let text = |(i, part): (usize, &Value)| match (part["type"].as_str(), part["text"].as_str()) {
                (Some("text"), Some(text)) => Ok(text.to_owned()),
                _ => {
                    let part = field(&format!(".content[{i}]"));
                    Err(Error::invalid(part.clone(), format!("{part} must be {{\"type\": \"text\", \"text\": ...}}")))
                }
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
    if let Some(Value::Array(calls)) = message.get_mut("tool_calls") {
        for call in calls {
            if let Some(arguments) = call["function"]["arguments"].as_str()
                && let Ok(parsed) = serde_json::from_str::<Value>(arguments)
            {
                call["function"]["arguments"] = parsed;
            }
        }
    }
    Ok(Value::Object(message))
}
