//! Logs, traces and metrics: set up once by each process, named once for all.
//!
//! - [`init`] installs the subscriber: human or JSON logs, and OTLP traces where an endpoint is set.
//! - [`metrics`] has every metric's name, and renders them for Prometheus.
//! - [`propagation`] carries the trace through HTTP headers and gRPC metadata.
//! - [`genai`] has what the conventions for GenAI want and a span's fields cannot say.
#![forbid(unsafe_code)]

mod config;
mod error;
pub mod genai;
mod json;
pub mod metrics;
pub mod propagation;
mod setup;

pub use config::{LogFormat, TelemetryConfig};
pub use error::Error;
pub use setup::{Guard, init, init_as};

/// A count as a span's field that OpenTelemetry has as a number: of unsigned ones the bridge makes text.
pub fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
