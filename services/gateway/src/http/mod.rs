//! The HTTP door.
mod chat;
mod completions;
pub mod error;
pub mod fields;
mod openapi;
mod params;
mod sse;
mod status;
mod tokens;

use crate::core::Core;
use axum::Router;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Uri};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use error::HttpError;
use moesaic_telemetry::metrics::{HTTP_REQUEST_SECONDS, HTTP_REQUESTS_TOTAL};
use moesaic_telemetry::propagation;
use moesaic_types::{Error, ErrorCode};
use std::sync::Arc;
use std::time::Instant;
use tracing::Instrument;

static X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id that a client may give.
const MAX_REQUEST_ID: usize = 128;

/// All routes.
pub fn router(core: Arc<Core>) -> Router {
    let limit = core.config.body_limit.as_usize();
    Router::new()
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/models", get(status::models))
        .route("/v1/models/{id}", get(status::model))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/health", get(status::ready))
        .route("/ready", get(status::ready))
        .route("/live", get(status::live))
        .route("/metrics", get(status::metrics))
        .route("/openapi.json", get(openapi::document))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(DefaultBodyLimit::max(limit))
        .layer(middleware::from_fn(around))
        .with_state(core)
}

async fn no_route(uri: Uri) -> HttpError {
    Error::new(ErrorCode::NotFound, format!("no route {}; /openapi.json lists them", uri.path())).into()
}

async fn no_method(uri: Uri) -> Response {
    let message = format!("{} does not take this method; /openapi.json lists what it takes", uri.path());
    let mut response = HttpError(Error::new(ErrorCode::InvalidArgument, message)).into_response();
    *response.status_mut() = axum::http::StatusCode::METHOD_NOT_ALLOWED;
    response
}

/// Request id in and out, a span, and the metrics of every request.
async fn around(request: Request, next: Next) -> Response {
    let started = Instant::now();
    let given = request.headers().get(&X_REQUEST_ID).filter(|id| is_request_id(id.as_bytes())).cloned();
    let id = given
        .unwrap_or_else(|| HeaderValue::from_str(&uuid::Uuid::new_v4().to_string()).expect("a UUID is a valid header"));
    let route = request.extensions().get::<MatchedPath>().map_or("none", |path| path.as_str()).to_owned();
    let span = tracing::info_span!(
        "http_request",
        http.route = route,
        http.request.method = %request.method(),
        request_id = id.to_str().unwrap_or_default(),
        gen_ai.request.model = tracing::field::Empty,
        gen_ai.usage.input_tokens = tracing::field::Empty,
    );
    propagation::set_parent(&span, propagation::extract_headers(request.headers()));
    let mut response = next.run(request).instrument(span).await;
    let status = response.status().as_u16().to_string();
    ::metrics::counter!(HTTP_REQUESTS_TOTAL, "route" => route.clone(), "status" => status).increment(1);
    ::metrics::histogram!(HTTP_REQUEST_SECONDS, "route" => route).record(started.elapsed().as_secs_f64());
    response.headers_mut().insert(X_REQUEST_ID.clone(), id);
    response
}

fn is_request_id(id: &[u8]) -> bool {
    (1..=MAX_REQUEST_ID).contains(&id.len()) && id.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(b))
}

/// The API key of a request.
fn key(headers: &HeaderMap) -> Option<&str> {
    headers.get("authorization")?.to_str().ok()?.strip_prefix("Bearer ").map(str::trim)
}

/// A body within the limit.
fn body(
    body: Result<axum::body::Bytes, axum::extract::rejection::BytesRejection>,
    limit: usize,
) -> Result<axum::body::Bytes, Error> {
    body.map_err(|rejection| {
        if rejection.status() == axum::http::StatusCode::PAYLOAD_TOO_LARGE {
            let message = format!("body is over the limit of {limit} bytes (gateway.body_limit)");
            Error { field: Some("body".into()), ..Error::new(ErrorCode::PayloadTooLarge, message) }
        } else {
            Error::invalid("body", format!("body cannot be read: {}", rejection.body_text()))
        }
    })
}

/// Seconds since 1970.
fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
