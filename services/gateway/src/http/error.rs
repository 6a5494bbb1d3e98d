//! OpenAI's error object with the right status.
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use moesaic_types::Error;
use serde_json::{Value, json};

/// An error on its way to an HTTP client.
#[derive(Debug)]
pub struct HttpError(pub Error);

impl From<Error> for HttpError {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

/// The body: `{"error": {message, type, param, code}}`.
pub fn body(error: &Error) -> Value {
    json!({"error": {
        "message": error.message,
        "type": error.code.openai_type(),
        "param": error.field,
        "code": error.code.name(),
    }})
}

impl IntoResponse for HttpError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(body(&self.0))).into_response();
        if let Some(wait) = self.0.retry_after {
            let seconds = wait.as_secs_f64().ceil().max(1.0) as u64;
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
