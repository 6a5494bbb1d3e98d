//! The HTTP door.
mod body;
mod chat;
mod chat_answer;
mod completions;
mod completions_answer;
mod cors;
pub mod error;
pub mod fields;
mod known;
mod logprobs;
mod openapi;
mod params;
mod sse;
mod status;
mod tokens;
mod usage;

use crate::core::{Core, request_span};
use crate::request_id;
use axum::Router;
use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use body::Body;
use error::HttpError;
use fields::Fields;
use futures::FutureExt;
use moesaic_telemetry::metrics::{HTTP_REQUEST_SECONDS, HTTP_REQUESTS_TOTAL};
use moesaic_telemetry::propagation;
use moesaic_types::{Error, ErrorCode};
use serde_json::Value;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;
use tower_http::timeout::RequestBodyTimeoutLayer;
use tracing::Instrument;

static X_REQUEST_ID: HeaderName = HeaderName::from_static(request_id::NAME);

/// All routes.
pub fn router(core: Arc<Core>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/models", get(status::models))
        .route("/v1/models/{*id}", get(status::model))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/health", get(status::ready))
        .route("/ready", get(status::ready))
        .route("/live", get(status::live))
        .route("/metrics", get(status::metrics))
        .route("/openapi.json", get(openapi::document))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(RequestBodyTimeoutLayer::new(core.config.read_timeout.get()))
        .layer(middleware::from_fn(around))
        .layer(middleware::from_fn_with_state(core.clone(), cors::cors))
        .with_state(core)
}

async fn no_route(uri: Uri) -> HttpError {
    Error::new(ErrorCode::NotFound, format!("no route {}; /openapi.json lists them", uri.path())).into()
}

async fn no_method(uri: Uri) -> HttpError {
    HttpError::method_not_allowed(uri.path())
}

/// Request id in and out, a span, and the metrics of every request.
async fn around(request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = request_id::choose(request.headers().get(&X_REQUEST_ID).map(HeaderValue::as_bytes));
    let route = request.extensions().get::<MatchedPath>().map_or("none", |path| path.as_str()).to_owned();
    let span = request_span!(
        "http_request",
        http.route = route,
        http.request.method = %request.method(),
        request_id = id,
    );
    propagation::set_parent(&span, propagation::extract_headers(request.headers()));
    let answer = AssertUnwindSafe(next.run(request).instrument(span)).catch_unwind().await;
    let mut response = answer.unwrap_or_else(|_| {
        // the panic itself is in the log
        HttpError::from(Error::internal("the request failed by a fault of the server")).into_response()
    });
    let status = response.status().as_u16().to_string();
    ::metrics::counter!(HTTP_REQUESTS_TOTAL, "route" => route.clone(), "status" => status).increment(1);
    ::metrics::histogram!(HTTP_REQUEST_SECONDS, "route" => route).record(started.elapsed().as_secs_f64());
    let id = HeaderValue::try_from(id).expect("only characters of a header are chosen");
    response.headers_mut().insert(X_REQUEST_ID.clone(), id);
    response
}

/// The API key of a request.
fn key(headers: &HeaderMap) -> Option<&str> {
    headers.get("authorization")?.to_str().ok()?.strip_prefix("Bearer ").map(str::trim)
}

/// The same, to go elsewhere with.
fn user_key(headers: &HeaderMap) -> Option<String> {
    key(headers).map(str::to_owned)
}

/// Reads a body once there is a model; a long one on a worker.
async fn read<T: Send + 'static>(
    core: &Arc<Core>,
    Body(body): Body,
    read: impl FnOnce(&Core, Fields<'_>) -> Result<T, HttpError> + Send + 'static,
) -> Result<T, HttpError> {
    let body = body?;
    core.loaded().await?;
    let for_work = core.clone();
    core.workers
        .run(body.bytes.len(), move || {
            let object = fields::parse(&body.bytes)?;
            read(&for_work, Fields::new(&object))
        })
        .await
}

/// A JSON response of about so many bytes; a long one is written on a worker.
async fn write(
    core: &Core,
    bytes: usize,
    value: impl FnOnce() -> Value + Send + 'static,
) -> Result<Response, HttpError> {
    let text = core.workers.run(bytes, move || Ok::<_, HttpError>(value().to_string())).await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}

/// Seconds since 1970.
fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
