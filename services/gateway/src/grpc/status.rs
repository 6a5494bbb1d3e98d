//! Errors as gRPC status with details.
use moesaic_types::Error;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// The status of an error: its code, its message, the field that is wrong, when to try again.
pub fn status(error: Error) -> Status {
    let mut details = ErrorDetails::new();
    if let Some(field) = &error.field {
        details.add_bad_request_violation(field, &error.message);
    }
    if let Some(wait) = error.retry_after {
        details.set_retry_info(Some(wait));
    }
    details.set_error_info(error.code.name(), "moesaic", std::collections::HashMap::<String, String>::new());
    Status::with_error_details(Code::from(error.code.grpc_code()), error.message, details)
}
