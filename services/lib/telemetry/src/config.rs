//! The `[telemetry]` section.
use serde::{Deserialize, Serialize};

/// How logs are written (to standard error).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One line for people.
    #[default]
    Human,
    /// One JSON object a line, with `trace_id` and `span_id` where the event is part of a trace.
    Json,
}

/// Logs and traces.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// `human` or `json`.
    pub log_format: LogFormat,
    /// What is logged and traced: `info`, or directives as `RUST_LOG` has them, such as `warn,moesaic_router=debug`.
    pub log: String,
    /// OTLP gRPC endpoint that traces go to, such as `http://127.0.0.1:4317`; no traces without. Also set by
    /// `OTEL_EXPORTER_OTLP_ENDPOINT`.
    pub otlp_endpoint: Option<String>,
    /// The service's name in traces, `moesaic` where there is none. Also set by `OTEL_SERVICE_NAME`.
    pub service_name: Option<String>,
    /// Share of new traces that are recorded, 0 to 1; a caller's decision is followed.
    pub sample_ratio: f64,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self {
            log_format: LogFormat::Human,
            log: "info".into(),
            otlp_endpoint: None,
            service_name: None,
            sample_ratio: 1.0,
        }
    }
}

impl TelemetryConfig {
    /// The endpoint that is in force; empty means none.
    pub(crate) fn endpoint(&self) -> Option<&str> {
        self.otlp_endpoint.as_deref().filter(|text| !text.is_empty())
    }

    /// The name that is in force.
    pub(crate) fn name(&self) -> &str {
        self.service_name.as_deref().filter(|text| !text.is_empty()).unwrap_or("moesaic")
    }
}
