//! One error for everything that crosses a service boundary, with one code that maps to HTTP and to gRPC.
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What kind of failure it is; decides the HTTP status and the gRPC code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// A field of the request is wrong (HTTP 400, gRPC INVALID_ARGUMENT).
    InvalidArgument,
    /// The key is missing or unknown (401, UNAUTHENTICATED).
    Unauthenticated,
    /// The key may not do this (403, PERMISSION_DENIED).
    PermissionDenied,
    /// No such model, route or object (404, NOT_FOUND).
    NotFound,
    /// The body is over the limit (413, INVALID_ARGUMENT).
    PayloadTooLarge,
    /// A queue is full or a limit is reached; try again later (429, RESOURCE_EXHAUSTED).
    ResourceExhausted,
    /// The client went away or cancelled (499, CANCELLED).
    Cancelled,
    /// The deadline passed (504, DEADLINE_EXCEEDED).
    DeadlineExceeded,
    /// A service is not ready or went away; the request may be sent again (503, UNAVAILABLE).
    Unavailable,
    /// The feature does not exist for this model or build (501, UNIMPLEMENTED).
    Unimplemented,
    /// A bug of ours (500, INTERNAL).
    Internal,
}

impl ErrorCode {
    /// The HTTP status.
    pub fn http_status(self) -> u16 {
        match self {
            Self::InvalidArgument => 400,
            Self::Unauthenticated => 401,
            Self::PermissionDenied => 403,
            Self::NotFound => 404,
            Self::PayloadTooLarge => 413,
            Self::ResourceExhausted => 429,
            Self::Cancelled => 499,
            Self::DeadlineExceeded => 504,
            Self::Unavailable => 503,
            Self::Unimplemented => 501,
            Self::Internal => 500,
        }
    }

    /// The gRPC status code's number.
    pub fn grpc_code(self) -> i32 {
        match self {
            Self::Cancelled => 1,
            Self::InvalidArgument | Self::PayloadTooLarge => 3,
            Self::DeadlineExceeded => 4,
            Self::NotFound => 5,
            Self::PermissionDenied => 7,
            Self::ResourceExhausted => 8,
            Self::Unimplemented => 12,
            Self::Internal => 13,
            Self::Unavailable => 14,
            Self::Unauthenticated => 16,
        }
    }

    /// The `type` of OpenAI's error object.
    pub fn openai_type(self) -> &'static str {
        match self {
            Self::InvalidArgument | Self::PayloadTooLarge | Self::NotFound | Self::Unimplemented => {
                "invalid_request_error"
            }
            Self::Unauthenticated => "authentication_error",
            Self::PermissionDenied => "permission_error",
            Self::ResourceExhausted => "rate_limit_error",
            Self::Cancelled | Self::DeadlineExceeded | Self::Unavailable | Self::Internal => "server_error",
        }
    }

    /// The name in snake case, as in the `code` of OpenAI's error object.
    pub fn name(self) -> &'static str {
        match self {
            Self::InvalidArgument => "invalid_argument",
            Self::Unauthenticated => "unauthenticated",
            Self::PermissionDenied => "permission_denied",
            Self::NotFound => "not_found",
            Self::PayloadTooLarge => "payload_too_large",
            Self::ResourceExhausted => "resource_exhausted",
            Self::Cancelled => "cancelled",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::Unavailable => "unavailable",
            Self::Unimplemented => "unimplemented",
            Self::Internal => "internal",
        }
    }
}

/// An error that a client may see.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Serialize, Deserialize)]
#[error("{message}")]
pub struct Error {
    /// The kind.
    pub code: ErrorCode,
    /// One sentence, lowercase, naming the field and the limit, and what to do next where that helps.
    pub message: String,
    /// The request's field that is wrong (`param` of OpenAI's error object).
    pub field: Option<String>,
    /// When it makes sense to try again.
    pub retry_after: Option<Duration>,
}

/// Shorthand for results that cross a service boundary.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of the given kind.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), field: None, retry_after: None }
    }

    /// A wrong field of a request.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: Some(field.into()), ..Self::new(ErrorCode::InvalidArgument, message) }
    }

    /// A bug of ours.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Internal, message)
    }

    /// A service that is not there now.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self { retry_after: Some(Duration::from_secs(1)), ..Self::new(ErrorCode::Unavailable, message) }
    }

    /// A full queue or a reached limit.
    pub fn exhausted(message: impl Into<String>, retry_after: Duration) -> Self {
        Self { retry_after: Some(retry_after), ..Self::new(ErrorCode::ResourceExhausted, message) }
    }
}
