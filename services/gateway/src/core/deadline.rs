//! A request's deadline, also where what it waits for does not keep it.
use moesaic_types::{Error, ErrorCode, Result};
use std::time::Instant;

/// The future's output, or `DeadlineExceeded`. As cancel-safe as the future.
pub(super) async fn by<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> Result<T> {
    let Some(deadline) = deadline else { return Ok(work.await) };
    tokio::time::timeout_at(deadline.into(), work).await.map_err(|_| {
        Error::new(ErrorCode::DeadlineExceeded, "the deadline passed (deadline_ms or the server's default)")
    })
}
