//! Work that would hold up an async thread: reading long bodies, templates, tokenization, writing long answers.
use moesaic_types::{Error, Result};
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Work on fewer bytes is done where it is asked for: in the slowest case, tokenization, about half a millisecond.
const SMALL_BYTES: usize = 1024;

/// Blocking threads, a bounded number of them. Who comes in is bounded by the door: work waits and is not refused.
pub(crate) struct Workers {
    running: Arc<Semaphore>,
}

impl Workers {
    /// So many pieces of work run at a time.
    pub(crate) fn new(threads: usize) -> Self {
        Self { running: Arc::new(Semaphore::new(threads)) }
    }

    /// Does work that reads or writes about so many bytes, in the order in which it was asked for. Work that began goes
    /// on when the caller is gone; work that waits does not.
    ///
    /// # Errors
    /// `Internal` when the work panics, else what the work returns.
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
    async fn long_work_leaves_the_thread_free_and_waits_in_any_number() {
        const WAITING: usize = 2000;
        let workers = Arc::new(Workers::new(1));
        let (go, wait) = mpsc::channel::<()>();
        let (begun, mut begins) = tokio::sync::oneshot::channel::<()>();
        // this runtime has one thread: the test itself would stand still if the work ran on it
        let running = tokio::spawn({
            let workers = workers.clone();
            async move {
                let work = move || {
                    let _test_waits = begun.send(());
                    wait.recv().map_err(|error| Error::internal(error.to_string()))
                };
                workers.run(LONG, work).await
            }
        });
        let waiting: Vec<_> = (0..WAITING).map(|i| workers.run(LONG, move || Ok::<_, Error>(i))).collect();
        (&mut begins).await.unwrap();
        let mut waiting = std::pin::pin!(futures::future::join_all(waiting));
        assert!(futures::poll!(&mut waiting).is_pending(), "one thread, and it is taken");
        assert_eq!(workers.run(1, || Ok::<_, Error>(4)).await, Ok(4), "small work never waits");
        go.send(()).unwrap();
        assert_eq!(running.await.unwrap(), Ok(()));
        let done: Result<Vec<_>> = waiting.await.into_iter().collect();
        assert_eq!(done.unwrap(), (0..WAITING).collect::<Vec<_>>());
        let error = workers.run(LONG, || -> Result<()> { panic!("a fault that a test asked for") }).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Internal);
        assert_eq!(workers.run(LONG, || Ok::<_, Error>(5)).await, Ok(5), "a panic gives its place back");
    }
}
