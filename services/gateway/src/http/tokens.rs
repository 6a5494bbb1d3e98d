//! `/tokenize` and `/detokenize`, in vLLM's shapes.
use super::body;
use super::error::HttpError;
use super::fields::{self, Fields};
use crate::core::{Core, conversation, tokens};
use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use moesaic_types::Error;
use serde_json::{Value, json};
use std::sync::Arc;

pub(super) async fn tokenize(
    State(core): State<Arc<Core>>,
    bytes: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, HttpError> {
    let object = fields::parse(&body(bytes, core.config.body_limit.as_usize())?)?;
    let fields = Fields::new(&object);
    let model = core.model(fields.text("model")?.unwrap_or_default())?;
    let ids = match (fields.text("prompt")?, fields.list("messages")?) {
        (Some(text), None) => {
            let special = fields.get("add_special_tokens").is_none() || fields.flag("add_special_tokens")?;
            model.tokenizer.encode(text, special).map_err(|e| Error::invalid("prompt", e.to_string()))?
        }
        (None, Some(messages)) => {
            let prompt = conversation::render(&model, messages, None, true, &Default::default())?;
            model.tokenizer.encode(&prompt, false).map_err(|e| Error::invalid("messages", e.to_string()))?
        }
        _ => return Err(Error::invalid("prompt", "give either prompt or messages").into()),
    };
    Ok(Json(json!({"count": ids.len(), "max_model_len": model.max_context, "tokens": ids})))
}

pub(super) async fn detokenize(
    State(core): State<Arc<Core>>,
    bytes: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, HttpError> {
    let object = fields::parse(&body(bytes, core.config.body_limit.as_usize())?)?;
    let fields = Fields::new(&object);
    let model = core.model(fields.text("model")?.unwrap_or_default())?;
    let ids = tokens("tokens", &fields.counts("tokens")?, &model)?;
    let text = model.tokenizer.decode(&ids, false).map_err(|e| Error::invalid("tokens", e.to_string()))?;
    Ok(Json(json!({"prompt": text})))
}
