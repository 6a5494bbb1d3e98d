//! Traces reach a real OTLP receiver. One test: the subscriber is the process's.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)] // A test fails by panicking, in its helpers too.
use moesaic_telemetry::{LogFormat, TelemetryConfig, init, propagation};
use moesaic_testkit::otlp::Receiver;
use opentelemetry_proto::tonic::common::v1::any_value::Value;

// One thread: the flush on drop must not need the caller's runtime to make progress, so the receiver has its own.
#[tokio::test]
async fn a_callers_trace_reaches_the_collector() {
    let (receiver, endpoint) = Receiver::start();

    let config = TelemetryConfig {
        log_format: LogFormat::Json,
        otlp_endpoint: Some(endpoint),
        service_name: Some("router".into()),
        ..TelemetryConfig::default()
    };
    let guard = init(&config).unwrap();
    assert!(init(&config).is_err(), "only once");

    let caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let span = tracing::info_span!("place", gen_ai.request.model = "demo");
    propagation::set_parent(&span, propagation::from_traceparent(caller));
    span.in_scope(|| {
        tracing::info_span!("score").in_scope(|| tracing::info!("chosen"));
        tracing::debug_span!("below the filter").in_scope(|| {});
    });
    drop(span);
    drop(guard);

    let received = receiver.received();
    let text = |value: &Option<opentelemetry_proto::tonic::common::v1::AnyValue>| match &value.as_ref()?.value {
        Some(Value::StringValue(text)) => Some(text.clone()),
        _ => None,
    };
    let resource = received[0].resource.as_ref().unwrap();
    let name = resource.attributes.iter().find(|attribute| attribute.key == "service.name").unwrap();
    assert_eq!(text(&name.value).as_deref(), Some("router"));
    let spans: Vec<_> = received.iter().flat_map(|r| &r.scope_spans).flat_map(|s| &s.spans).collect();
    let find = |name: &str| spans.iter().find(|span| span.name == name);
    let (place, score) = (find("place").unwrap(), find("score").unwrap());
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!(hex(&place.trace_id), caller[3..35]);
    assert_eq!(hex(&place.parent_span_id), caller[36..52]);
    assert_eq!((&score.trace_id, &score.parent_span_id), (&place.trace_id, &place.span_id));
    let model = place.attributes.iter().find(|attribute| attribute.key == "gen_ai.request.model").unwrap();
    assert_eq!(text(&model.value).as_deref(), Some("demo"));
    assert_eq!(score.events.len(), 1);
    assert!(find("below the filter").is_none());
}
