//! Why telemetry cannot be set up.

/// An error of the setup.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The log filter has an error.
    #[error("telemetry.log '{filter}': {source}")]
    Filter {
        /// The filter.
        filter: String,
        /// Why.
        source: tracing_subscriber::filter::ParseError,
    },
    /// The sample ratio is out of range.
    #[error("telemetry.sample_ratio {0} is not in 0..=1")]
    SampleRatio(f64),
    /// The endpoint cannot be used.
    #[error("telemetry.otlp_endpoint '{endpoint}': {reason}")]
    Endpoint {
        /// The endpoint.
        endpoint: String,
        /// Why.
        reason: String,
    },
    /// The exporter's thread cannot start.
    #[error("start the trace exporter: {0}")]
    Thread(std::io::Error),
    /// This process has a subscriber or recorder already.
    #[error("{0} is set up already by other code of this process")]
    AlreadySet(&'static str),
    /// Histogram buckets are wrong.
    #[error("metrics: {0}")]
    Buckets(metrics_exporter_prometheus::BuildError),
}
