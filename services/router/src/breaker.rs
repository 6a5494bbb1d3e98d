//! Leaves a failing replica alone for a while. Plain data; the clock is the caller's.
use std::time::{Duration, Instant};

/// The longest pause.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Opens after some failures in a row, for a pause that doubles while they go on; then one failure more is enough.
#[derive(Clone, Debug)]
pub struct Breaker {
    threshold: u32,
    first_pause: Duration,
    failures: u32,
    pause: Duration,
    open_until: Option<Instant>,
    last_failure: Option<Instant>,
}

impl Breaker {
    /// A closed breaker that opens after `threshold` failures.
    pub fn new(threshold: u32, first_pause: Duration) -> Self {
        Self { threshold, first_pause, failures: 0, pause: first_pause, open_until: None, last_failure: None }
    }

    /// Whether the replica may be asked now.
    pub fn allows(&self, now: Instant) -> bool {
        self.open_until.is_none_or(|until| now >= until)
    }

    /// The replica failed.
    pub fn failed(&mut self, now: Instant) {
        if !self.allows(now) {
            return;
        }
        self.failures = self.failures.saturating_add(1);
        self.last_failure = Some(now);
        if self.failures >= self.threshold {
            self.open_until = Some(now + self.pause);
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// The replica failed at something that nothing excuses: it is left alone at once.
    pub fn trip(&mut self, now: Instant) {
        if self.allows(now) {
            self.failures = self.failures.max(self.threshold.saturating_sub(1));
            self.failed(now);
        }
    }

    /// The replica answered. Failures are forgotten once it was asked for the longest pause without one, so that a
    /// replica that answers polls and fails requests is still caught.
    pub fn succeeded(&mut self, now: Instant) {
        let since = self.last_failure.max(self.open_until);
        let quiet = since.is_none_or(|since| now.saturating_duration_since(since) >= LONGEST_PAUSE);
        if quiet && self.allows(now) {
            *self = Self::new(self.threshold, self.first_pause);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trip_opens_at_once() {
        let (second, now) = (Duration::from_secs(1), Instant::now());
        let mut breaker = Breaker::new(3, second);
        breaker.trip(now);
        assert!(!breaker.allows(now) && breaker.allows(now + second));
        breaker.trip(now);
        breaker.failed(now + second);
        assert!(!breaker.allows(now + second * 2) && breaker.allows(now + second * 3), "as after failures in a row");
    }

    #[test]
    fn opens_longer_each_time_and_forgets_after_a_quiet_time() {
        let second = Duration::from_secs(1);
        let mut now = Instant::now();
        let mut breaker = Breaker::new(3, second);
        breaker.failed(now);
        breaker.failed(now);
        assert!(breaker.allows(now), "two failures are none too many");
        for pause in [1, 2, 4, 8, 16, 30, 30] {
            breaker.failed(now);
            let pause = second * pause;
            assert!(!breaker.allows(now) && !breaker.allows(now + pause - Duration::from_millis(1)));
            breaker.failed(now);
            now += pause;
            assert!(breaker.allows(now));
            breaker.succeeded(now);
        }
        now += LONGEST_PAUSE;
        breaker.succeeded(now);
        breaker.failed(now);
        breaker.failed(now);
        assert!(breaker.allows(now), "the count began anew");
    }
}
