//! Experts that do not answer: the step is run again, with growing pauses, while its requests wait.
//!
//! A shard can be lost and come back. A failed step leaves nothing behind but unspecified keys and values at positions
//! that the next attempt writes again, so that the answer is the same as if nothing had happened.
use super::Engine;
use super::step::Work;
use moesaic_types::Error;
use std::time::{Duration, Instant};

/// The first pause before a step is run again; it doubles up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// Since when the experts do not answer, if they do not.
#[derive(Debug, Default)]
pub struct Outage {
    since: Option<Instant>,
    pause: Duration,
    until: Option<Instant>,
}

impl Outage {
    /// When the step may be run again; `None`: now.
    pub fn paused_until(&self) -> Option<Instant> {
        self.until.filter(|until| *until > Instant::now())
    }

    /// Whether the step must not be run yet.
    pub fn pauses(&self) -> bool {
        self.paused_until().is_some()
    }

    /// Another failure; how long they have gone on.
    fn fail(&mut self, now: Instant) -> Duration {
        let since = *self.since.get_or_insert(now);
        self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LAST_PAUSE);
        self.until = Some(now + self.pause);
        now - since
    }
}

impl Engine {
    /// The experts did not answer: the step is run again after a pause. Requests with a deadline wait until then,
    /// others as long as the configuration says.
    pub(super) fn wait_for_experts(&mut self, work: &[Work], error: &moesaic_model::Error) {
        let now = Instant::now();
        let lasts = self.outage.fail(now);
        self.parts.pulse.experts_fail();
        self.metrics.step_retries.increment(1);
        let pause_ms = self.outage.pause.as_millis();
        tracing::warn!(%error, sequences = work.len(), lasts_ms = lasts.as_millis(), pause_ms, "run a step again");
        let patience = Duration::from_millis(self.parts.config.experts_patience_ms);
        for work in work {
            let Some(sequence) = self.sequences.get_mut(&work.key) else { continue };
            let waits = now - *sequence.without_experts_since.get_or_insert(now);
            if sequence.request.deadline.is_none() && waits >= patience {
                let message = format!("{error}; waited {} ms for them to come back", patience.as_millis());
                self.fail(work.key, Error::unavailable(message));
            }
        }
    }

    /// A step succeeded, or there is none to run.
    pub(super) fn end_outage(&mut self) {
        if let Some(since) = self.outage.since {
            tracing::info!(
                lasted_ms = since.elapsed().as_millis(),
                "the experts answer again, or nobody waits for them"
            );
            self.outage = Outage::default();
            self.parts.pulse.experts_answer();
            self.sequences.values_mut().for_each(|sequence| sequence.without_experts_since = None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_last_and_begin_anew() {
        let start = Instant::now();
        let mut outage = Outage::default();
        assert!(!outage.pauses());
        let pauses: Vec<u128> = (0..9)
            .map(|n| {
                assert_eq!(outage.fail(start + Duration::from_secs(n)), Duration::from_secs(n));
                outage.pause.as_millis()
            })
            .collect();
        assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        assert!(outage.pauses() && outage.paused_until() == Some(start + Duration::from_secs(9)));
    }
}
