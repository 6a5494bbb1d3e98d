//! How long to wait before an actor is built again.
use std::time::Duration;

/// Pauses between restarts: `first`, then twice as long each time up to `max`; back to `first` once the actor has
/// lived for `healthy_after`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// The first pause.
    pub first: Duration,
    /// The longest pause.
    pub max: Duration,
    /// A life this long forgets the failures before it.
    pub healthy_after: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { first: Duration::from_millis(10), max: Duration::from_secs(5), healthy_after: Duration::from_secs(30) }
    }
}

impl Backoff {
    /// The pause after a life of `lived` whose own pause was `previous` (`None`: it was the first life).
    pub(crate) fn next(&self, previous: Option<Duration>, lived: Duration) -> Duration {
        match previous {
            Some(previous) if lived < self.healthy_after => previous.saturating_mul(2).clamp(self.first, self.max),
            _ => self.first.min(self.max),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_maximum_and_forgets_after_a_healthy_life() {
        let backoff = Backoff::default();
        let mut pause = None;
        let mut seen = Vec::new();
        for _ in 0..12 {
            pause = Some(backoff.next(pause, Duration::ZERO));
            seen.extend(pause.map(|p| p.as_millis()));
        }
        assert_eq!(seen, [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5000, 5000, 5000]);
        assert_eq!(backoff.next(pause, backoff.healthy_after), backoff.first);
    }
}
