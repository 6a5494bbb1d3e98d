//! Cuts off a client that stops reading.
use futures::{Stream, StreamExt};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Pieces that wait for a slow client at most.
const BUFFER: usize = 32;

/// The same stream, run by a task of its own: it ends (and so cancels what makes it) when the reader takes nothing for
/// `patience`, or goes away.
pub fn cut_off<S>(stream: S, patience: Duration) -> ReceiverStream<S::Item>
where
    S: Stream + Send + Unpin + 'static,
    S::Item: Send,
{
    let (sender, receiver) = mpsc::channel(BUFFER);
    tokio::spawn(run(stream, sender, patience));
    ReceiverStream::new(receiver)
}

async fn run<S: Stream + Unpin>(mut stream: S, sender: mpsc::Sender<S::Item>, patience: Duration) {
    loop {
        // both are cancel-safe: a stream's `next` loses nothing when it is dropped before it is ready
        let item = tokio::select! {
            item = stream.next() => item,
            () = sender.closed() => return,
        };
        let Some(item) = item else { return };
        if sender.send_timeout(item, patience).await.is_err() {
            tracing::info!(patience_s = patience.as_secs_f32(), "cut off a client that stopped reading");
            return;
        }
    }
}
