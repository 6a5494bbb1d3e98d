//! Where a step's time goes: one look at the clock after each part.
use crate::runner::{Profile, StepPart};
use std::time::Instant;

/// Adds up the time of the parts of all steps.
pub(super) struct Laps {
    since: Instant,
    profile: Profile,
}

impl Laps {
    pub(super) fn new() -> Self {
        Self { since: Instant::now(), profile: Profile::default() }
    }

    /// What follows is the next part.
    pub(super) fn begin(&mut self) {
        self.since = Instant::now();
    }

    /// What ran since the last lap was `part`.
    pub(super) fn end(&mut self, part: StepPart) {
        let now = Instant::now();
        self.profile.add(part, now - self.since);
        self.since = now;
    }

    pub(super) fn profile(&self) -> Profile {
        self.profile
    }
}
