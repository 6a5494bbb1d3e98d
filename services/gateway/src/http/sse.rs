//! Server-sent events: one JSON object each, then `[DONE]`.
use super::error;
use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use moesaic_types::Result;
use serde_json::Value;
use std::convert::Infallible;

/// A response of events; an error on the way is an event of its own, after which nothing but `[DONE]` comes.
pub fn response(events: impl Stream<Item = Result<Value>> + Send + 'static) -> Response {
    let frames = events.map(|event| match event {
        Ok(value) => frame(&value.to_string()),
        Err(error) => frame(&error::body(&error).to_string()),
    });
    let frames = frames.chain(stream::once(async { frame("[DONE]") })).map(Ok::<_, Infallible>);
    let mut response = Response::new(Body::from_stream(frames));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

fn frame(data: &str) -> Bytes {
    Bytes::from(format!("data: {data}\n\n"))
}
