//! The gRPC door.
mod call;
mod convert;
mod service;
mod status;

pub use service::Inference;
pub use status::status;
