//! Work that would hold up an async thread: reading long bodies, templates, tokenization, writing long answers.
use moesaic_types::{Error, Result};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;

/// Work on fewer bytes is done where it is asked for: in the slowest case, tokenization, about half a millisecond.
const SMALL_BYTES: usize = 1024;
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Blocking threads, a bounded number of them, with a bounded queue.
pub(crate) struct Workers {
    places: Arc<Semaphore>,
    running: Arc<Semaphore>,
    queue: usize,
}

impl Workers {
    /// So many pieces of work run at a time, and so many more wait.
    pub(crate) fn new(threads: usize, queue: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(threads + queue)), running: Arc::new(Semaphore::new(threads)), queue }
    }

    /// Does work that reads about so many bytes. Work that began goes on when the caller is gone.
    ///
    /// # Errors
    /// `ResourceExhausted` when too much waits already, `Internal` when the work panics, else what the work returns.
    pub(crate) async fn run<T, E>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<Error> + Send + 'static,
    {
        if bytes <= SMALL_BYTES {
            return work();
        }
        let place = self.places.clone().try_acquire_owned().map_err(|_| {
            let limit = self.queue;
            let message = format!("{limit} long requests wait to be read, which is the limit (gateway.text_queue)");
            Error::exhausted(message, RETRY_AFTER)
        })?;
        self.finish(bytes, move || {
            let _until_done = place;
            work()
        })
        .await
    }

    /// The same for an answer, which is not refused any more: those in flight are bounded already.
    ///
    /// # Errors
    /// `Internal` when the work panics, else what the work returns.
    pub(crate) async fn finish<T, E>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<Error> + Send + 'static,
    {
        if bytes <= SMALL_BYTES {
            return work();
        }
        let running = self.running.clone().acquire_owned().await.expect("the semaphore is never closed");
        let span = tracing::Span::current();
        let done = tokio::task::spawn_blocking(move || {
            let _until_done = running;
            span.in_scope(work)
        });
        done.await.map_err(|error| Error::internal(format!("work on a long request failed: {error}")))?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moesaic_types::ErrorCode;
    use std::sync::mpsc;

    const LONG: usize = SMALL_BYTES + 1;

    #[tokio::test]
    async fn long_work_leaves_the_thread_free_and_is_bounded() {
        let workers = Arc::new(Workers::new(1, 1));
        let (go, wait) = mpsc::channel::<()>();
        let start = |work: Box<dyn FnOnce() -> Result<u32> + Send>| {
            let workers = workers.clone();
            tokio::spawn(async move { workers.run(LONG, work).await })
        };
        // this runtime has one thread: the test itself would stand still if the work ran on it
        let running = start(Box::new(move || {
            wait.recv().map_err(|error| Error::internal(error.to_string()))?;
            Ok(1)
        }));
        let waiting = start(Box::new(|| Ok(2)));
        while workers.places.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let error = workers.run(LONG, || Ok::<_, Error>(3)).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::ResourceExhausted);
        assert!(error.message.contains("gateway.text_queue") && error.retry_after.is_some(), "{error:?}");
        assert_eq!(workers.run(1, || Ok::<_, Error>(4)).await, Ok(4), "small work never waits");
        go.send(()).unwrap();
        assert_eq!((running.await.unwrap(), waiting.await.unwrap()), (Ok(1), Ok(2)));
        let error = workers.run(LONG, || -> Result<()> { panic!("a fault that a test asked for") }).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Internal);
        assert_eq!(workers.run(LONG, || Ok::<_, Error>(5)).await, Ok(5), "a panic gives its place back");
    }
}
