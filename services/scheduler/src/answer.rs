//! One answer as its reader sees it: what the engine hands over, and the ends that come while the engine is stuck.
use crate::engine::Parts;
use crate::health::Health;
use crate::outcome::Entered;
use futures::stream::StreamExt;
use moesaic_types::boundary::DeltaStream;
use moesaic_types::{Delta, Error, ErrorCode, Result};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{mpsc, watch};

/// The reader's end of a request.
pub struct Answer {
    /// What the engine hands over.
    pub deltas: mpsc::Receiver<Result<Delta>>,
    /// When the answer ends with an error at the latest.
    pub deadline: Option<Instant>,
    /// What the watchdog says of the engine.
    pub health: watch::Receiver<Health>,
    /// The engine.
    pub parts: Arc<Parts>,
    /// Told of ends that the engine does not tell of.
    pub entered: Entered,
}

impl Answer {
    /// The pieces up to the last one. The request's deadline holds even if the engine never comes back from a step.
    pub fn into_stream(self) -> DeltaStream {
        let start = Some((self, 0));
        futures::stream::unfold(start, |state| async {
            let (mut answer, mut tokens) = state?;
            let delta = answer.next(tokens).await;
            match &delta {
                Ok(delta) => tokens += delta.tokens.len(),
                Err(error) => answer.entered.outcome.failed(error.code),
            }
            let last = !matches!(&delta, Ok(delta) if delta.finish.is_none());
            Some((delta, (!last).then_some((answer, tokens))))
        })
        .boxed()
    }

    /// The next piece. Every branch is cancel-safe; what the engine has handed over goes before any other end.
    async fn next(&mut self, tokens: usize) -> Result<Delta> {
        tokio::select! {
            biased;
            // A channel that closes before the last piece means that the engine is gone.
            delta = self.deltas.recv() => delta.unwrap_or_else(|| Err(engine_restarted())),
            () = passed(self.deadline) => Err(overdue(tokens)),
            error = stuck(&mut self.health, &self.parts) => Err(error),
        }
    }
}

async fn passed(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

async fn stuck(health: &mut watch::Receiver<Health>, parts: &Parts) -> Error {
    let is_stuck = |health: &Health| matches!(health, Health::Hanging(_) | Health::Dead(_));
    while health.wait_for(is_stuck).await.is_ok() {
        // what the watchdog saw last may be over
        let now = parts.health();
        if let Some(error) = now.check().err().filter(|_| is_stuck(&now)) {
            return error;
        }
        if health.changed().await.is_err() {
            break;
        }
    }
    // The watchdog ended with the scheduler; the engine closes the channel.
    std::future::pending().await
}

/// The error of a request whose deadline passed.
pub fn overdue(tokens: usize) -> Error {
    let message = format!("the deadline passed after {tokens} generated tokens");
    Error::new(ErrorCode::DeadlineExceeded, message)
}

/// The error of a request whose engine ended under it.
pub fn engine_restarted() -> Error {
    Error::unavailable("the engine restarted; send the request again")
}
