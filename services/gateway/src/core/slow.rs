//! Cuts off a client that stops reading.
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};
use moesaic_types::{Error, ErrorCode, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tracing::Instrument;

/// Pieces that wait for a slow client at most.
const BUFFER: usize = 32;

/// The same stream, run by a task of its own: when the reader takes nothing for `patience`, or goes away, what makes
/// the pieces is dropped and so cancelled. Ends at the first error; a stream that was cut off ends with one, so that
/// nobody takes a part of an answer for all of it.
pub fn cut_off<S, T>(stream: S, patience: Duration) -> BoxStream<'static, Result<T>>
where
    S: Stream<Item = Result<T>> + Send + Unpin + 'static,
    T: Send + 'static,
{
    let (sender, receiver) = mpsc::channel(BUFFER);
    let slow = Arc::new(AtomicBool::new(false));
    tokio::spawn(run(stream, sender, patience, slow.clone()).in_current_span());
    let missing_end = move || match slow.load(Ordering::Acquire) {
        true => {
            let seconds = patience.as_secs_f32();
            let message =
                format!("the answer was cut off: nothing of it was read for {seconds} s (gateway.write_timeout)");
            Error::new(ErrorCode::Cancelled, message)
        }
        false => Error::internal("the answer broke off by a fault of the server"),
    };
    stream::unfold(Some((receiver, missing_end)), |state| async {
        let (mut receiver, missing_end) = state?;
        match receiver.recv().await {
            Some(Event::Item(Ok(item))) => Some((Ok(item), Some((receiver, missing_end)))),
            Some(Event::Item(Err(error))) => Some((Err(error), None)),
            Some(Event::End) => None,
            None => Some((Err(missing_end()), None)),
        }
    })
    .boxed()
}

enum Event<T> {
    Item(Result<T>),
    End,
}

/// Ends with the stream, at its first error, or when the reader is gone or too slow.
async fn run<S, T>(mut stream: S, sender: mpsc::Sender<Event<T>>, patience: Duration, slow: Arc<AtomicBool>)
where
    S: Stream<Item = Result<T>> + Unpin,
{
    loop {
        // both are cancel-safe: a stream's `next` loses nothing when it is dropped before it is ready
        let item = tokio::select! {
            item = stream.next() => item,
            () = sender.closed() => return,
        };
        let last = !matches!(item, Some(Ok(_)));
        let event = item.map_or(Event::End, Event::Item);
        if let Err(mpsc::error::SendTimeoutError::Timeout(_)) = sender.send_timeout(event, patience).await {
            slow.store(true, Ordering::Release);
            tracing::info!(patience_s = patience.as_secs_f32(), "cut off a client that stopped reading");
            return;
        }
        if last {
            return;
        }
    }
}
