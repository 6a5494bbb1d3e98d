//! Waiting for conditions, never for time.
use std::future::Future;
use std::time::Duration;

/// How long a test waits for what must happen. Only a broken test waits that long.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// The future's output; panics if it does not come.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(output) => output,
        Err(_) => panic!("{what} did not happen within {DEADLINE:?}"),
    }
}

/// Asks again and again until the condition holds; panics if it does not come to hold.
pub async fn until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    soon(what, async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}
