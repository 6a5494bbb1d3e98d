//! The gRPC door.
mod call;
mod convert;
mod refusals;
mod service;
mod status;

pub use refusals::Refusals;
pub use service::Inference;
pub use status::status;
