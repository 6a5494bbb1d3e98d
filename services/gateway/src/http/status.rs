//! What is served, and how the gateway is.
use super::error::HttpError;
use crate::core::Core;
use crate::served::ServedModel;
use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use moesaic_types::Error;
use serde_json::{Value, json};
use std::sync::Arc;

fn describe(model: &ServedModel) -> Value {
    json!({
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "moesaic",
        "max_model_len": model.max_context,
    })
}

pub(super) async fn models(State(core): State<Arc<Core>>) -> Json<Value> {
    let data: Vec<Value> = core.models().iter().map(|model| describe(model)).collect();
    Json(json!({"object": "list", "data": data}))
}

pub(super) async fn model(
    State(core): State<Arc<Core>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, HttpError> {
    let Path(id) = id.map_err(|error| {
        Error::invalid("model", format!("model cannot be read from the path: {}", error.body_text()))
    })?;
    Ok(Json(describe(&*core.model(&id)?)))
}

/// 200 when a request would be answered, else 503 with the reason.
pub(super) async fn ready(State(core): State<Arc<Core>>) -> Result<Json<Value>, HttpError> {
    core.ready().await?;
    Ok(Json(json!({"status": "ready", "in_flight": core.admission.in_flight()})))
}

/// 200 while the process can recover by itself, else 503 with the reason to restart it.
pub(super) async fn live(State(core): State<Arc<Core>>) -> Result<Json<Value>, HttpError> {
    core.live()?;
    Ok(Json(json!({"status": "live"})))
}

pub(super) async fn metrics() -> Response {
    let text = moesaic_telemetry::metrics::render();
    (StatusCode::OK, [(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}
