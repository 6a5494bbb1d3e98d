//! Carries a trace between services as W3C `traceparent`, in HTTP headers, gRPC metadata or a plain field.
use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::Context;
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry::trace::TraceContextExt;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use std::collections::HashMap;
use tonic::metadata::{Ascii, MetadataKey, MetadataMap, MetadataValue};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// Name of the header and metadata key.
pub const TRACEPARENT: &str = "traceparent";

/// Writes the current span's context; nothing where traces are off.
pub fn inject_headers(headers: &mut HeaderMap) {
    TraceContextPropagator::new().inject_context(&Span::current().context(), &mut Headers(headers));
}

/// The caller's context; empty where it sent none or a broken one.
pub fn extract_headers(headers: &HeaderMap) -> Context {
    TraceContextPropagator::new().extract_with_context(&Context::new(), &HeadersRef(headers))
}

/// Writes the current span's context; nothing where traces are off.
pub fn inject_metadata(metadata: &mut MetadataMap) {
    TraceContextPropagator::new().inject_context(&Span::current().context(), &mut Metadata(metadata));
}

/// The caller's context; empty where it sent none or a broken one.
pub fn extract_metadata(metadata: &MetadataMap) -> Context {
    TraceContextPropagator::new().extract_with_context(&Context::new(), &MetadataRef(metadata))
}

/// The current span's `traceparent`; `None` where traces are off.
pub fn current_traceparent() -> Option<String> {
    let mut fields = HashMap::new();
    TraceContextPropagator::new().inject_context(&Span::current().context(), &mut fields);
    fields.remove(TRACEPARENT)
}

/// The context that a `traceparent` names; empty where it is broken.
pub fn from_traceparent(traceparent: &str) -> Context {
    let fields = HashMap::from([(TRACEPARENT.to_owned(), traceparent.to_owned())]);
    TraceContextPropagator::new().extract_with_context(&Context::new(), &fields)
}

/// Makes a new span part of the caller's trace. Call it before the span is entered; an empty context changes nothing.
pub fn set_parent(span: &Span, parent: Context) {
    if parent.span().span_context().is_valid() {
        // Refused where traces are off, or if the span was entered before: then it stays in its own trace.
        let _ = span.set_parent(parent);
    }
}

/// A span in the trace that a `traceparent` names; none at all where it is empty: the caller's work is not traced.
pub fn traced(traceparent: &str, span: impl FnOnce() -> Span) -> Span {
    if traceparent.is_empty() {
        return Span::none();
    }
    let span = span();
    set_parent(&span, from_traceparent(traceparent));
    span
}

/// Links a span to an earlier attempt at the same work: a retry or a migration.
pub fn link(span: &Span, earlier: &Span) {
    let earlier = earlier.context().span().span_context().clone();
    if earlier.is_valid() {
        span.add_link(earlier);
    }
}

struct Headers<'a>(&'a mut HeaderMap);

impl Injector for Headers<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(key), HeaderValue::try_from(value)) {
            self.0.insert(name, value);
        }
    }
}

struct HeadersRef<'a>(&'a HeaderMap);

impl Extractor for HeadersRef<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }
    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

struct Metadata<'a>(&'a mut MetadataMap);

impl Injector for Metadata<'_> {
    fn set(&mut self, key: &str, value: String) {
        let name = MetadataKey::<Ascii>::from_bytes(key.as_bytes());
        if let (Ok(name), Ok(value)) = (name, MetadataValue::try_from(value)) {
            self.0.insert(name, value);
        }
    }
}

struct MetadataRef<'a>(&'a MetadataMap);

impl Extractor for MetadataRef<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }
    fn keys(&self) -> Vec<&str> {
        self.0
            .keys()
            .filter_map(|key| match key {
                tonic::metadata::KeyRef::Ascii(key) => Some(key.as_str()),
                tonic::metadata::KeyRef::Binary(_) => None,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::trace::TracerProvider;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tracing_subscriber::layer::SubscriberExt;

    const CALLER: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_trace_goes_through_headers_metadata_and_fields() {
        let provider = SdkTracerProvider::builder().build();
        let otel = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(otel), || {
            let span = tracing::info_span!("request");
            set_parent(&span, from_traceparent(CALLER));
            span.in_scope(|| {
                let own = current_traceparent().unwrap();
                assert_eq!(own[..36], CALLER[..36], "the trace stays");
                assert_ne!(own, CALLER, "the span is another");
                let mut headers = HeaderMap::new();
                inject_headers(&mut headers);
                assert_eq!(headers[TRACEPARENT], own);
                let mut metadata = MetadataMap::new();
                inject_metadata(&mut metadata);
                assert_eq!(metadata.get(TRACEPARENT).unwrap(), own.as_str());
                let expected = from_traceparent(&own).span().span_context().clone();
                assert_eq!(extract_headers(&headers).span().span_context(), &expected);
                assert_eq!(extract_metadata(&metadata).span().span_context(), &expected);
            });
        });
    }

    #[test]
    fn nothing_is_written_without_a_trace_and_broken_input_is_ignored() {
        let mut headers = HeaderMap::new();
        inject_headers(&mut headers);
        assert!(headers.is_empty());
        assert_eq!(current_traceparent(), None);
        for broken in ["", "00", "00-00000000000000000000000000000000-b7ad6b7169203331-01", "zz\u{e9}"] {
            assert!(!from_traceparent(broken).span().span_context().is_valid(), "{broken}");
        }
    }
}
