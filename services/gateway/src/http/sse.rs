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
use std::time::Duration;

/// Proxies cut connections on which nothing is sent, commonly after 60 s: a long prefill must not look so.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

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
    let frames = kept_alive(frames.boxed(), KEEP_ALIVE);
    let done = stream::once(async { Bytes::from_static(b"data: [DONE]\n\n") });
    let mut response = Response::new(Body::from_stream(frames.chain(done).map(Ok::<_, Infallible>)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

/// The same frames, and a comment wherever none comes for a while. Between two frames nothing is lost: a stream's
/// `next` is cancel-safe.
fn kept_alive(frames: BoxStream<'static, Bytes>, every: Duration) -> BoxStream<'static, Bytes> {
    stream::unfold(frames, move |mut frames| async move {
        match tokio::time::timeout(every, frames.next()).await {
            Ok(frame) => frame.map(|frame| (frame, frames)),
            Err(_) => Some((Bytes::from_static(b": waiting\n\n"), frames)),
        }
    })
    .boxed()
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
                core.workers.run(bytes, work).await
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_stream_on_which_nothing_comes_is_kept_alive() {
        let (sender, receiver) = tokio::sync::mpsc::channel::<Bytes>(1);
        let frames = stream::unfold(receiver, |mut receiver| async { receiver.recv().await.map(|f| (f, receiver)) });
        let mut kept = kept_alive(frames.boxed(), KEEP_ALIVE);
        let begun = tokio::time::Instant::now();
        assert!(kept.next().await.is_some_and(|frame| frame.starts_with(b":")));
        assert_eq!(begun.elapsed(), KEEP_ALIVE);
        sender.send(Bytes::from_static(b"data: 1\n\n")).await.unwrap();
        assert_eq!(kept.next().await.as_deref(), Some(&b"data: 1\n\n"[..]));
        drop(sender);
        assert_eq!(kept.next().await, None);
    }
}
