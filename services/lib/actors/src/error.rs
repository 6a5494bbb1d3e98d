//! Why an actor did not answer.
use moesaic_types::Error;
use std::time::Duration;

/// Why a message to an actor was not answered; each names the actor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// The mailbox is full; nothing was sent.
    #[error("{0} has too many requests waiting, try again later")]
    Full(&'static str),
    /// The actor failed before it answered and comes back with fresh state; the message may or may not have been
    /// handled.
    #[error("{0} failed and restarts, try again")]
    Restarting(&'static str),
    /// The actor was stopped for good; nothing was sent, or it was dropped unhandled.
    #[error("{0} is stopped")]
    Closed(&'static str),
    /// The deadline passed; the message may still be handled.
    #[error("{0} did not answer in time")]
    Timeout(&'static str),
}

impl AskError {
    /// The actor's name.
    pub fn actor(&self) -> &'static str {
        match self {
            Self::Full(name) | Self::Restarting(name) | Self::Closed(name) | Self::Timeout(name) => name,
        }
    }
}

impl From<AskError> for Error {
    fn from(error: AskError) -> Self {
        match error {
            AskError::Full(_) => Error::exhausted(error.to_string(), Duration::from_secs(1)),
            AskError::Restarting(_) | AskError::Closed(_) | AskError::Timeout(_) => {
                Error::unavailable(error.to_string())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moesaic_types::ErrorCode;

    #[test]
    fn only_a_full_mailbox_is_a_limit() {
        let full: Error = AskError::Full("a").into();
        assert_eq!(full.code, ErrorCode::ResourceExhausted);
        assert!(full.retry_after.is_some());
        for error in [AskError::Restarting("a"), AskError::Closed("a"), AskError::Timeout("a")] {
            assert_eq!(Error::from(error).code, ErrorCode::Unavailable);
            assert_eq!(error.actor(), "a");
        }
    }
}
