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
    /// OTLP gRPC endpoint that traces go to, such as `http://127.0.0.1:4317`; no traces without. Where it is not set,
    /// `OTEL_EXPORTER_OTLP_ENDPOINT` is read.
    pub otlp_endpoint: Option<String>,
    /// The service's name in traces. Where it is not set, `OTEL_SERVICE_NAME` is read; `moesaic` otherwise.
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
    pub(crate) fn endpoint(&self, variable: impl Fn(&str) -> Option<String>) -> Option<String> {
        let set = |text: &String| !text.is_empty();
        self.otlp_endpoint.clone().or_else(|| variable("OTEL_EXPORTER_OTLP_ENDPOINT")).filter(set)
    }

    /// The name that is in force.
    pub(crate) fn name(&self, variable: impl Fn(&str) -> Option<String>) -> String {
        let set = |text: &String| !text.is_empty();
        let name = self.service_name.clone().or_else(|| variable("OTEL_SERVICE_NAME")).filter(set);
        name.unwrap_or_else(|| "moesaic".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_variables_fill_what_is_not_set() {
        let variable = |name: &str| Some(format!("from {name}"));
        let config = TelemetryConfig::default();
        assert_eq!(config.endpoint(variable).as_deref(), Some("from OTEL_EXPORTER_OTLP_ENDPOINT"));
        assert_eq!(config.name(variable), "from OTEL_SERVICE_NAME");
        assert_eq!((config.endpoint(|_| None), config.name(|_| None).as_str()), (None, "moesaic"));
        let set = TelemetryConfig { otlp_endpoint: Some("e".into()), service_name: Some("s".into()), ..config };
        assert_eq!((set.endpoint(variable).as_deref(), set.name(variable).as_str()), (Some("e"), "s"));
    }
}
