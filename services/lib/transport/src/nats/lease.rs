//! When a held job is reported as in progress, given back, or lost: decided here, without a clock or a server.
//!
//! JetStream gives a job to another worker when it has not heard of it for the queue's acknowledgement time. A lease is
//! as long as the caller wants; it is kept by reports, of which the answered ones count: what JetStream has confirmed
//! within its time is still ours, whatever became of our process meanwhile.
use std::time::Duration;
use tokio::time::Instant;

/// A job that was pulled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Held {
    /// The caller's lease ends then.
    pub until: Instant,
    /// When the last report that JetStream confirmed was sent.
    pub confirmed: Instant,
    /// When it was last reported, confirmed or not.
    pub reported: Instant,
}

/// What to do with a held job.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step {
    /// Nothing before then.
    Wait(Instant),
    /// Report it.
    Report,
    /// The caller's lease is over: give it back.
    GiveBack,
    /// JetStream may have given it to another.
    Lost,
}

/// Reports within an acknowledgement time.
const REPORTS: u32 = 3;

impl Held {
    /// Pulled now.
    pub fn new(now: Instant, lease: Duration) -> Self {
        Self { until: end(now, lease), confirmed: now, reported: now }
    }

    /// Whether it is surely ours. `ack_wait` is JetStream's time; an eighth of it is kept back for the way there.
    pub fn is_ours(&self, now: Instant, ack_wait: Duration) -> bool {
        now < self.until && now < self.confirmed + ack_wait * 7 / 8
    }

    /// What to do now.
    pub fn step(&self, now: Instant, ack_wait: Duration) -> Step {
        let next_report = self.reported + ack_wait / REPORTS;
        if now >= self.confirmed + ack_wait {
            Step::Lost
        } else if now >= self.until {
            Step::GiveBack
        } else if now >= next_report {
            Step::Report
        } else {
            Step::Wait(next_report.min(self.until))
        }
    }
}

/// The end of a lease; one too long to be told ends in a year.
pub fn end(now: Instant, lease: Duration) -> Instant {
    now + lease.min(Duration::from_secs(365 * 24 * 3600))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACK_WAIT: Duration = Duration::from_secs(30);

    #[test]
    fn a_long_lease_is_kept_by_reports_and_given_back_at_its_end() {
        let start = Instant::now();
        let mut held = Held::new(start, Duration::from_secs(25));
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(held.step(at(0), ACK_WAIT), Step::Wait(at(10)));
        assert_eq!(held.step(at(10), ACK_WAIT), Step::Report);
        (held.reported, held.confirmed) = (at(10), at(10));
        assert_eq!(held.step(at(10), ACK_WAIT), Step::Wait(at(20)));
        (held.reported, held.confirmed) = (at(20), at(20));
        assert_eq!(held.step(at(20), ACK_WAIT), Step::Wait(at(25)));
        assert!(held.is_ours(at(24), ACK_WAIT));
        assert!(!held.is_ours(at(25), ACK_WAIT));
        assert_eq!(held.step(at(25), ACK_WAIT), Step::GiveBack);
    }

    #[test]
    fn without_confirmed_reports_it_is_lost() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let held = Held { reported: at(20), ..Held::new(start, Duration::from_secs(3600)) };
        assert_eq!(held.step(at(21), ACK_WAIT), Step::Wait(at(30)));
        assert!(held.is_ours(at(26), ACK_WAIT));
        assert!(!held.is_ours(at(27), ACK_WAIT), "there may be no time left to say so");
        assert_eq!(held.step(at(30), ACK_WAIT), Step::Lost);
        assert_eq!(held.step(at(10_000), ACK_WAIT), Step::Lost, "a process that stood still finds out");
        let eternal = Held::new(start, Duration::MAX);
        assert!(eternal.until > at(1_000_000));
    }
}
