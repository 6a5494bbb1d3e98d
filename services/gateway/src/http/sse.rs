//! Server-sent events: one JSON object each, then `[DONE]`.
use super::error::HttpError;
use crate::core::{Core, cut_off};
use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, stream};
use moesaic_types::Result;
use serde_json::Value;
use std::convert::Infallible;
use std::sync::Arc;

/// Turns the pieces of an answer into the objects that a client sees.
pub(super) trait Chunks: Send + 'static {
    /// A piece.
    type Piece: Send + 'static;
    /// The objects that a piece makes.
    fn of(&mut self, piece: Self::Piece) -> Vec<Value>;
    /// About how many bytes they have.
    fn bytes(piece: &Self::Piece) -> usize;
}

/// A response of events: `first`, then what the pieces make. An error is an event of its own, after which nothing but
/// `[DONE]` comes.
pub(super) fn response<C: Chunks>(
    core: &Arc<Core>,
    first: Vec<Value>,
    pieces: BoxStream<'static, Result<C::Piece>>,
    chunks: C,
) -> Response {
    let first = stream::iter(first.into_iter().map(|value| Ok(frame(&value))));
    let events = first.chain(converted(core.clone(), pieces, chunks)).boxed();
    let events = cut_off(events, core.config.write_timeout.get());
    let frames = events.map(|event| event.unwrap_or_else(|error| frame(&HttpError::from(error).body())));
    let done = stream::once(async { Bytes::from_static(b"data: [DONE]\n\n") });
    let mut response = Response::new(Body::from_stream(frames.chain(done).map(Ok::<_, Infallible>)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

/// The frames that the pieces make; what is large is made on a worker.
fn converted<C: Chunks>(
    core: Arc<Core>,
    pieces: BoxStream<'static, Result<C::Piece>>,
    chunks: C,
) -> BoxStream<'static, Result<Bytes>> {
    stream::unfold(Some((core, pieces, chunks)), |state| async {
        let (core, mut pieces, mut chunks) = state?;
        let made = match pieces.next().await? {
            Err(error) => Err(error),
            Ok(piece) => {
                let bytes = C::bytes(&piece);
                let work = move || {
                    let frames: Vec<u8> = chunks.of(piece).iter().flat_map(frame).collect();
                    Ok((Bytes::from(frames), chunks))
                };
                core.workers.finish(bytes, work).await
            }
        };
        match made {
            Ok((frames, chunks)) => Some((Ok(frames), Some((core, pieces, chunks)))),
            Err(error) => Some((Err(error), None)),
        }
    })
    .filter(|frames| std::future::ready(!frames.as_ref().is_ok_and(Bytes::is_empty)))
    .boxed()
}

fn frame(data: &Value) -> Bytes {
    Bytes::from(format!("data: {data}\n\n"))
}
