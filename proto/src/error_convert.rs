//! Errors between services: a gRPC status whose details are a `moesaic.error.v1.Error`.
use crate::error::v1 as wire;
use moesaic_types::{Error, ErrorCode};
use prost::Message;
use std::time::Duration;
use tonic::{Code, Status};

const CODES: [(ErrorCode, wire::Code); 11] = [
    (ErrorCode::InvalidArgument, wire::Code::InvalidArgument),
    (ErrorCode::Unauthenticated, wire::Code::Unauthenticated),
    (ErrorCode::PermissionDenied, wire::Code::PermissionDenied),
    (ErrorCode::NotFound, wire::Code::NotFound),
    (ErrorCode::PayloadTooLarge, wire::Code::PayloadTooLarge),
    (ErrorCode::ResourceExhausted, wire::Code::ResourceExhausted),
    (ErrorCode::Cancelled, wire::Code::Cancelled),
    (ErrorCode::DeadlineExceeded, wire::Code::DeadlineExceeded),
    (ErrorCode::Unavailable, wire::Code::Unavailable),
    (ErrorCode::Unimplemented, wire::Code::Unimplemented),
    (ErrorCode::Internal, wire::Code::Internal),
];

impl From<Error> for wire::Error {
    fn from(error: Error) -> Self {
        let code = CODES.iter().find(|(domain, _)| *domain == error.code);
        Self {
            code: code.map_or(wire::Code::Unspecified, |(_, code)| *code).into(),
            message: error.message,
            field: error.field,
            retry_after_ms: error.retry_after.map(|wait| wait.as_millis().try_into().unwrap_or(u64::MAX)),
        }
    }
}

impl From<wire::Error> for Error {
    fn from(error: wire::Error) -> Self {
        let code = CODES.iter().find(|(_, code)| i32::from(*code) == error.code);
        Self {
            code: code.map_or(ErrorCode::Internal, |(domain, _)| *domain),
            message: error.message,
            field: error.field,
            retry_after: error.retry_after_ms.map(Duration::from_millis),
        }
    }
}

/// An error as the status of a call between services.
pub fn into_status(error: Error) -> Status {
    let code = Code::from(error.code.grpc_code());
    let message = error.message.clone();
    Status::with_details(code, message, wire::Error::from(error).encode_to_vec().into())
}

/// The error behind a status. A status that no service of ours made (a broken connection, a deadline of the transport)
/// becomes the error of its code: what the transport says of a lost peer is `Unavailable`.
pub fn from_status(status: &Status) -> Error {
    if let Ok(error) = wire::Error::decode(status.details())
        && !status.details().is_empty()
    {
        return error.into();
    }
    let code = match status.code() {
        Code::InvalidArgument | Code::OutOfRange | Code::FailedPrecondition => ErrorCode::InvalidArgument,
        Code::NotFound => ErrorCode::NotFound,
        Code::PermissionDenied => ErrorCode::PermissionDenied,
        Code::Unauthenticated => ErrorCode::Unauthenticated,
        Code::DeadlineExceeded => ErrorCode::DeadlineExceeded,
        Code::Unimplemented => ErrorCode::Unimplemented,
        // tonic reports a connection that breaks under a call as one of these; exhausted is HTTP/2's ENHANCE_YOUR_CALM,
        // since what our services refuse has details
        Code::Unavailable
        | Code::Cancelled
        | Code::Unknown
        | Code::Aborted
        | Code::Internal
        | Code::ResourceExhausted => ErrorCode::Unavailable,
        _ => ErrorCode::Internal,
    };
    Error::new(code, status.message())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_survives_the_wire() {
        for (code, _) in CODES {
            let error = Error {
                field: Some("temperature".into()),
                retry_after: Some(Duration::from_millis(1500)),
                ..Error::new(code, "temperature is 3; it must be at most 2")
            };
            let status = into_status(error.clone());
            assert_eq!(i32::from(status.code()), code.grpc_code());
            assert_eq!(from_status(&status), error);
        }
        let bare = Error::internal("a bug");
        assert_eq!(from_status(&into_status(bare.clone())), bare);
    }

    #[test]
    fn what_the_transport_says_of_a_lost_peer_may_be_tried_elsewhere() {
        for status in [
            Status::unavailable("connect"),
            Status::unknown("h2 protocol error"),
            Status::cancelled("reset"),
            Status::resource_exhausted("h2 protocol error: ENHANCE_YOUR_CALM"),
        ] {
            assert_eq!(from_status(&status).code, ErrorCode::Unavailable);
        }
        let broken = Status::with_details(Code::InvalidArgument, "x", bytes::Bytes::from_static(b"\xff\xff\xff"));
        assert_eq!(from_status(&broken).code, ErrorCode::InvalidArgument);
    }
}
