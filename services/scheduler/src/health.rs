//! Whether the engine gets on: how long its present step has taken, and what follows from it.
use crate::config::Config;
use moesaic_model::runner::Advanced;
use moesaic_types::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What a step that takes long means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It gets on, or has nothing to do.
    Working,
    /// The present step has taken this long: no new requests; those accepted wait.
    Stalled(Duration),
    /// The present step has not got on for this long: as above, and those accepted end, to go on elsewhere.
    Hanging(Duration),
    /// The experts have not answered for this long: as above.
    WithoutExperts(Duration),
    /// The present step will not end: the process must be restarted.
    Dead(Duration),
}

/// From which duration on a step counts as stalled or dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Stalled from here on.
    pub stalled_after: Duration,
    /// Hanging when nothing has moved for so long.
    pub silence: Duration,
    /// Dead from here on; at least `stalled_after`.
    pub dead_after: Duration,
    /// How long experts may fail to answer.
    pub experts_patience: Duration,
}

impl Bounds {
    /// From the configuration.
    pub fn new(config: &Config) -> Self {
        let after = Duration::from_millis;
        Self {
            stalled_after: after(config.step_stalled_after_ms),
            silence: after(config.step_silence_ms),
            dead_after: after(config.step_dead_after_ms),
            experts_patience: after(config.experts_patience_ms),
        }
    }

    /// What it means that the present step has run for `busy_for` (`None`: no step runs) and has not got on for
    /// `silent_for`, and that all steps have failed for `failing_for` because experts did not answer (`None`: the last
    /// one did not fail).
    pub fn judge(
        &self,
        busy_for: Option<Duration>,
        silent_for: Option<Duration>,
        failing_for: Option<Duration>,
    ) -> Health {
        match (busy_for, silent_for, failing_for) {
            (Some(time), _, _) if time >= self.dead_after => Health::Dead(time),
            (_, Some(time), _) if time >= self.silence => Health::Hanging(time),
            (Some(time), _, _) if time >= self.stalled_after => Health::Stalled(time),
            (_, _, Some(time)) if time >= self.experts_patience => Health::WithoutExperts(time),
            _ => Health::Working,
        }
    }

    /// What a pulse means now.
    pub fn judge_now(&self, pulse: &Pulse) -> Health {
        self.judge(pulse.busy_for(), pulse.silent_for(), pulse.failing_for())
    }

    /// How often to look, so that no bound is seen late by more than a quarter of it, nor by more than a second.
    pub fn look_every(&self) -> Duration {
        (self.stalled_after.min(self.silence).min(self.dead_after).min(self.experts_patience) / 4)
            .clamp(Duration::from_millis(1), Duration::from_secs(1))
    }
}

impl Health {
    /// Whether this is another kind than before.
    pub fn differs(&self, before: &Self) -> bool {
        std::mem::discriminant(self) != std::mem::discriminant(before)
    }

    /// Why requests are not served, where they are not.
    pub fn check(&self) -> Result<(), Error> {
        match self {
            Self::Working => Ok(()),
            Self::Stalled(time) => Err(stuck(*time, "send the request to another replica")),
            Self::Hanging(time) => {
                let seconds = time.as_secs_f64();
                let message = format!("the engine hangs: its step has not got on for {seconds:.1} s");
                Err(Error::unavailable(format!("{message}; send the request to another replica")))
            }
            Self::WithoutExperts(time) => {
                let seconds = time.as_secs_f64();
                Err(Error::unavailable(format!("the experts have not answered for {seconds:.1} s; try again later")))
            }
            Self::Dead(time) => Err(stuck(*time, "the replica must be restarted")),
        }
    }
}

fn stuck(time: Duration, then: &str) -> Error {
    Error::unavailable(format!("the engine is stuck: its step has taken {:.1} s so far; {then}", time.as_secs_f64()))
}

/// When the engine's present step began; the engine writes it, everyone else reads it.
pub struct Pulse {
    epoch: Instant,
    busy_since: AtomicU64,
    failing_since: AtomicU64,
    progress: Mutex<Progress>,
}

/// How far the model's computation was when it was last looked at, and since when.
#[derive(Default)]
struct Progress {
    advanced: Option<Advanced>,
    seen: Option<(u64, Instant)>,
}

impl Default for Pulse {
    fn default() -> Self {
        let (busy_since, failing_since) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { epoch: Instant::now(), busy_since, failing_since, progress: Mutex::default() }
    }
}

impl Pulse {
    /// Microseconds since the epoch, plus one: 0 stands for never.
    fn now(&self) -> u64 {
        self.epoch.elapsed().as_micros() as u64 + 1
    }

    fn since(&self, start: &AtomicU64) -> Option<Duration> {
        let start = start.load(Ordering::Acquire).checked_sub(1)?;
        Some(self.epoch.elapsed().saturating_sub(Duration::from_micros(start)))
    }

    /// A step begins, and the one before is over.
    pub fn begin(&self) {
        self.busy_since.store(self.now(), Ordering::Release);
    }

    /// No step runs.
    pub fn rest(&self) {
        self.busy_since.store(0, Ordering::Release);
    }

    /// A step failed because experts did not answer.
    pub fn experts_fail(&self) {
        // Only the first failure counts; one thread writes.
        if self.failing_since.load(Ordering::Acquire) == 0 {
            self.failing_since.store(self.now(), Ordering::Release);
        }
    }

    /// The experts answer, or nothing is asked of them.
    pub fn experts_answer(&self) {
        self.failing_since.store(0, Ordering::Release);
    }

    /// The engine is gone.
    pub fn stop(&self) {
        self.rest();
        self.experts_answer();
    }

    /// How long the present step has run.
    pub fn busy_for(&self) -> Option<Duration> {
        self.since(&self.busy_since)
    }

    /// From now on the step is as far as this tells; without it, it may take any time.
    pub fn follow(&self, advanced: Option<Advanced>) {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner) = Progress { advanced, seen: None };
    }

    /// How long the present step has not got on, by what it was like at earlier looks: look often.
    pub fn silent_for(&self) -> Option<Duration> {
        let busy_for = self.busy_for()?;
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, now) = (progress.advanced.as_ref()?(), Instant::now());
        let since = progress.seen.filter(|(seen, _)| *seen == count).map_or(now, |(_, since)| since);
        progress.seen = Some((count, since));
        Some(busy_for.min(now.saturating_duration_since(since)))
    }

    /// How long steps have failed because experts did not answer.
    pub fn failing_for(&self) -> Option<Duration> {
        self.since(&self.failing_since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moesaic_types::ErrorCode;

    #[test]
    fn a_step_is_judged_by_its_duration() {
        let seconds = Duration::from_secs;
        let (stalled_after, silence, dead_after) = (seconds(2), seconds(8), seconds(10));
        let bounds = Bounds { stalled_after, silence, dead_after, experts_patience: seconds(5) };
        let cases = [
            (None, Health::Working),
            (Some(Duration::from_millis(1999)), Health::Working),
            (Some(seconds(2)), Health::Stalled(seconds(2))),
            (Some(Duration::from_millis(9999)), Health::Stalled(Duration::from_millis(9999))),
            (Some(seconds(10)), Health::Dead(seconds(10))),
        ];
        for (busy_for, expected) in cases {
            assert_eq!(bounds.judge(busy_for, None, None), expected);
        }
        let failing = |seconds| bounds.judge(None, None, Some(Duration::from_secs(seconds)));
        assert_eq!((failing(4), failing(5)), (Health::Working, Health::WithoutExperts(seconds(5))));
        assert_eq!(bounds.judge(Some(seconds(3)), None, Some(seconds(9))), Health::Stalled(seconds(3)));
        let silent = |busy, silent| bounds.judge(Some(seconds(busy)), Some(seconds(silent)), None);
        assert_eq!((silent(9, 7), silent(9, 8)), (Health::Stalled(seconds(9)), Health::Hanging(seconds(8))));
        assert_eq!(silent(10, 8), Health::Dead(seconds(10)));
        assert!(Health::Stalled(seconds(3)).differs(&Health::Working));
        assert!(!Health::Stalled(seconds(3)).differs(&Health::Stalled(seconds(2))));
        assert_eq!(Health::Working.check(), Ok(()));
        let error = Health::Stalled(seconds(3)).check().unwrap_err();
        assert!(error.code == ErrorCode::Unavailable && error.message.contains("3.0 s"), "{error}");
        assert_eq!(bounds.look_every(), Duration::from_millis(500));
        assert_eq!(Bounds { stalled_after: seconds(60), silence: seconds(60), ..bounds }.look_every(), seconds(1));
    }

    #[test]
    fn a_pulse_tells_how_long_the_present_step_runs() {
        let pulse = Pulse::default();
        assert_eq!(pulse.busy_for(), None);
        pulse.begin();
        let first = pulse.busy_for().unwrap();
        std::thread::sleep(Duration::from_millis(2));
        assert!(pulse.busy_for().unwrap() >= first + Duration::from_millis(2));
        pulse.experts_fail();
        let first = pulse.failing_for().unwrap();
        std::thread::sleep(Duration::from_millis(2));
        pulse.experts_fail();
        assert!(pulse.failing_for().unwrap() >= first + Duration::from_millis(2), "counted from the first failure");
        pulse.stop();
        assert_eq!((pulse.busy_for(), pulse.failing_for()), (None, None));
    }
}
