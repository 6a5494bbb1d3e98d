//! OpenAI's error object with the right status.
use crate::core::Refusal;
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use moesaic_types::{Error, ErrorCode};
use serde_json::{Value, json};
use std::time::Duration;

/// An error on its way to an HTTP client.
#[derive(Debug)]
pub struct HttpError {
    error: Error,
    /// A narrower code than the error's own, where OpenAI has one that clients look for.
    code: &'static str,
    status: StatusCode,
}

impl From<Error> for HttpError {
    fn from(error: Error) -> Self {
        let status = StatusCode::from_u16(error.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let code = match (error.code, error.field.as_deref()) {
            (ErrorCode::NotFound, Some("model")) => "model_not_found",
            _ => error.code.name(),
        };
        Self { error, code, status }
    }
}

impl From<Refusal> for HttpError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::TooLong(error) => Self { code: "context_length_exceeded", ..error.into() },
            Refusal::Wrong(error) => error.into(),
        }
    }
}

impl HttpError {
    /// A route that does not take the request's method.
    pub fn method_not_allowed(path: &str) -> Self {
        let message = format!("{path} does not take this method; /openapi.json lists what it takes");
        let error = Error::new(ErrorCode::InvalidArgument, message);
        Self { code: "method_not_supported", status: StatusCode::METHOD_NOT_ALLOWED, ..error.into() }
    }

    /// A request of which nothing more came.
    pub fn too_slow(patience: Duration) -> Self {
        let seconds = patience.as_secs_f32();
        let message = format!("nothing of the body came for {seconds} s (gateway.read_timeout); send it again");
        let error = Error::invalid("body", message);
        Self { code: "request_timeout", status: StatusCode::REQUEST_TIMEOUT, ..error.into() }
    }

    /// The body: `{"error": {message, type, param, code}}`.
    pub fn body(&self) -> Value {
        json!({"error": {
            "message": self.error.message,
            "type": self.error.code.openai_type(),
            "param": self.error.field,
            "code": self.code,
        }})
    }
}

impl IntoResponse for HttpError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(wait) = self.error.retry_after {
            let seconds = wait.as_secs_f64().ceil().max(1.0) as u64;
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
