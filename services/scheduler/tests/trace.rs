//! A request's spans reach an OTLP receiver, under the caller's trace and with OpenTelemetry's names for GenAI. One test:
//! the subscriber is the process's.
#![allow(clippy::unwrap_used)]

mod common;

use bytes::Bytes;
use common::*;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use moesaic_scheduler::{Config, Scheduler};
use moesaic_telemetry::{TelemetryConfig, init};
use moesaic_testkit::otlp::Receiver;
use moesaic_types::boundary::PrefixStore;
use moesaic_types::{BlockHash, Link, Result};
use opentelemetry_proto::tonic::common::v1::AnyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use std::sync::Arc;

/// Has nothing.
struct Empty;

impl PrefixStore for Empty {
    fn longest(&self, _chain: &[BlockHash], _from: usize) -> BoxFuture<'_, Result<usize>> {
        Box::pin(async { Ok(0) })
    }

    fn fetch(&self, _chain: &[BlockHash], _from: usize) -> BoxStream<'static, Result<Bytes>> {
        Box::pin(futures::stream::empty())
    }

    fn offer(&self, _link: Link, _bytes: Bytes) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async { Ok(false) })
    }

    fn forget(&self, _blocks: &[BlockHash]) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}

fn attribute(span: &Span, key: &str) -> String {
    let found = span.attributes.iter().find(|attribute| attribute.key == key);
    let value = found.unwrap_or_else(|| panic!("{} has no {key}", span.name)).value.clone().unwrap().value.unwrap();
    match value {
        Value::StringValue(text) => text,
        Value::IntValue(number) => number.to_string(),
        Value::DoubleValue(number) => number.to_string(),
        Value::ArrayValue(array) => {
            let text = |value: &AnyValue| match value.value.as_ref() {
                Some(Value::StringValue(text)) => text.clone(),
                other => panic!("{key} has {other:?}"),
            };
            format!("[{}]", array.values.iter().map(text).collect::<Vec<_>>().join(", "))
        }
        other => panic!("{key} is {other:?}"),
    }
}

// The receiver has a thread of its own: the flush at the end blocks this one.
#[tokio::test(flavor = "multi_thread")]
async fn a_requests_spans_are_exported_under_the_callers_trace() {
    let (receiver, endpoint) = Receiver::start();
    let guard = init(&TelemetryConfig { otlp_endpoint: Some(endpoint), ..TelemetryConfig::default() }).unwrap();

    let config = Config { model_name: "demo".into(), ..config() };
    let store = Some(Arc::new(Empty) as Arc<dyn PrefixStore>);
    let scheduler = Scheduler::start(config, factory(&Arc::default()), vocabulary(), hasher(), store, None);
    let scheduler = scheduler.await.unwrap();
    let caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let mut wanted = request(prompt(1, 150), 7);
    wanted.traceparent = Some(caller.into());
    let id = wanted.id.to_string();
    generate(&scheduler, wanted.clone()).await.unwrap();
    wanted.deadline = Some(std::time::Instant::now() + std::time::Duration::from_millis(10));
    wanted.stop.max_tokens = 1800;
    generate(&scheduler, wanted).await.unwrap_err();
    until_idle(&scheduler).await;
    drop(scheduler);
    drop(guard);

    let received = receiver.received();
    let spans: Vec<&Span> = received.iter().flat_map(|r| &r.scope_spans).flat_map(|s| &s.spans).collect();
    let answers: Vec<&&Span> = spans.iter().filter(|span| span.name == "generate").collect();
    assert_eq!(answers.len(), 2);
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    for span in &answers {
        assert_eq!((hex(&span.trace_id), hex(&span.parent_span_id)), (caller[3..35].into(), caller[36..52].into()));
    }
    let has = |span: &Span, key: &str| span.attributes.iter().any(|attribute| attribute.key == key);
    let answer = answers.iter().find(|span| !has(span, "error.type")).unwrap();
    for (key, value) in [
        ("gen_ai.provider.name", "moesaic"),
        ("gen_ai.request.model", "demo"),
        ("gen_ai.response.model", "demo"),
        ("gen_ai.request.max_tokens", "7"),
        ("gen_ai.request.temperature", "1"),
        ("gen_ai.usage.input_tokens", "150"),
        ("gen_ai.usage.output_tokens", "7"),
        ("gen_ai.response.finish_reasons", "[length]"),
        ("moesaic.cached_tokens", "0"),
        ("moesaic.request", id.as_str()),
    ] {
        assert_eq!(attribute(answer, key), value, "{key}");
    }
    let fetch = spans.iter().find(|span| span.name == "fetch blocks" && span.parent_span_id == answer.span_id).unwrap();
    assert_eq!((hex(&fetch.trace_id), attribute(fetch, "blocks")), (caller[3..35].into(), "2".into()));
    let failed = answers.iter().find(|span| has(span, "error.type")).unwrap();
    assert_eq!(attribute(failed, "error.type"), "deadline_exceeded");
}
