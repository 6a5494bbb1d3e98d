//! The boundaries between services over gRPC: clients that implement a trait, and services that serve one.
mod answers;
mod placer;
mod replica;
mod routers;

pub use placer::{GrpcPlacer, PlacerService, placer_service};
pub use replica::{GrpcReplica, ReplicaService, replica_service};
pub use routers::Routers;

use moesaic_telemetry::propagation;
use moesaic_types::{Error, ErrorCode};
use std::time::Duration;
use tonic::{Request, Status};

/// A call's message with the current trace.
pub(crate) fn traced<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    propagation::inject_metadata(request.metadata_mut());
    request
}

/// What went wrong in a call to a peer: its own error as it was, or what the transport says, with the peer's name.
pub(crate) fn explain(peer: &str, status: &Status) -> Error {
    let error = moesaic_proto::from_status(status);
    if !status.details().is_empty() {
        return error;
    }
    let mut message = format!("{peer}: {}", error.message);
    let mut source = std::error::Error::source(status);
    while let Some(reason) = source {
        let reason_text = reason.to_string();
        if !message.ends_with(&reason_text) {
            message = format!("{message}: {reason_text}");
        }
        source = reason.source();
    }
    let retry_after = (error.code == ErrorCode::Unavailable).then_some(Duration::from_secs(1));
    Error { message, retry_after, ..error }
}
