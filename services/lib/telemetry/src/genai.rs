//! What OpenTelemetry's conventions for GenAI want and `tracing`'s fields cannot say.
use opentelemetry::{Array, StringValue, Value};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// Why each of a request's answers ended. A field would make one text of it; the convention has an array. Call it once a
/// span: a second one is written beside the first.
pub fn finish_reasons(span: &Span, reasons: &[&'static str]) {
    let reasons = reasons.iter().map(|reason| StringValue::from(*reason)).collect();
    span.set_attribute("gen_ai.response.finish_reasons", Value::Array(Array::String(reasons)));
}
