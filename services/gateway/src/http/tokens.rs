//! `/tokenize` and `/detokenize`, in vLLM's shapes.
use super::body::Body;
use super::error::HttpError;
use super::fields::Fields;
use super::{known, read, write};
use crate::core::tools::Tools;
use crate::core::{Core, conversation, tokens};
use axum::extract::State;
use axum::response::Response;
use moesaic_types::{Error, Result};
use serde_json::{Value, json};
use std::sync::Arc;

/// Bytes of a token's number as it is shown.
const NUMBER_BYTES: usize = 6;

pub(super) async fn tokenize(State(core): State<Arc<Core>>, body: Body) -> Result<Response, HttpError> {
    let (ids, texts, context) = read(&core, body, |core, fields| {
        fields.only(&[known::TOKENIZE])?;
        let model = core.model(fields.text("model")?.unwrap_or_default())?;
        let (text, field, special) = match (fields.text("prompt")?, fields.list("messages")?) {
            (Some(text), None) => (text.to_owned(), "prompt", fields.flag_or_true("add_special_tokens")?),
            (None, Some(messages)) => {
                let tools = Tools::parse(fields.get("tools"), None)?;
                let generate = fields.flag_or_true("add_generation_prompt")?;
                let variables = fields.object("chat_template_kwargs")?.cloned().unwrap_or_default();
                let text = conversation::render(&model, messages, tools.shown(), generate, &variables)?;
                (text, "messages", fields.flag("add_special_tokens")?)
            }
            _ => return Err(Error::invalid("prompt", "give either prompt or messages").into()),
        };
        let encoded = model.tokenizer.encode(&text, special);
        let ids = encoded.map_err(|error| Error::invalid(field, error.to_string()))?;
        let shown = |id: &u32| String::from_utf8_lossy(model.tokenizer.token_bytes(*id)).into_owned();
        let texts: Option<Vec<_>> = fields.flag("return_token_strs")?.then(|| ids.iter().map(shown).collect());
        Ok((ids, texts, model.max_context))
    })
    .await?;
    write(
        &core,
        ids.len() * NUMBER_BYTES,
        move || json!({"count": ids.len(), "max_model_len": context, "tokens": ids, "token_strs": texts}),
    )
    .await
}

pub(super) async fn detokenize(State(core): State<Arc<Core>>, body: Body) -> Result<Response, HttpError> {
    let text = read(&core, body, |core, fields: Fields<'_>| {
        fields.only(&[known::DETOKENIZE])?;
        let model = core.model(fields.text("model")?.unwrap_or_default())?;
        let list = fields.get("tokens").ok_or_else(|| Error::invalid("tokens", "tokens is missing"))?;
        let ids = tokens("tokens", &super::fields::counts("tokens", list)?, &model)?;
        Ok(model.tokenizer.decode(&ids, false).map_err(|error| Error::invalid("tokens", error.to_string()))?)
    })
    .await?;
    write(&core, text.len(), move || json!({"prompt": Value::String(text)})).await
}
