//! The `[router]` section.
use crate::placement;
use crate::policy::{Policy, Weights};
use moesaic_config::HumanDuration;
use moesaic_types::{Error, Result};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Settings of a router.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address of the router's own process; its /metrics, /live and /ready are 1000 ports above.
    pub grpc: String,
    /// How long running calls may go on after the signal to stop; 0s..=24h.
    pub drain_timeout: HumanDuration,
    /// `prefix_aware`, `least_loaded` or `round_robin`.
    pub policy: Policy,
    /// Cost of a prompt block that must be computed, against 1 for a KV block in use at the replica; 0..=1000.
    pub prefill_weight: f64,
    /// Cost of a request that waits at the replica, in the same unit; 0..=1000.
    pub queue_weight: f64,
    /// How often each replica's load is asked for; 10ms..=1m.
    pub poll_interval: HumanDuration,
    /// A replica that does not say its load within this time counts as failed; 10ms..=1m.
    pub poll_timeout: HumanDuration,
    /// Failures in a row after which a replica is left alone; 1..=1000.
    pub breaker_failures: u32,
    /// How long it is first left alone; doubles with each further failure up to 30 seconds.
    pub breaker_pause: HumanDuration,
    /// Entries (a block at a replica) that the prefix index remembers, about 100 bytes each; 1024..=100000000.
    pub index_entries: usize,
    /// Longest wait for the router's own actors; then the prefix is ignored, or the request refused.
    pub decision_timeout: HumanDuration,
    /// Messages that each actor holds at most; 1..=65536.
    pub mailbox: usize,
    /// Placement of experts, in a cluster.
    pub placement: placement::Config,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            grpc: "127.0.0.1:9010".into(),
            drain_timeout: HumanDuration::from_secs(10),
            policy: Policy::PrefixAware,
            prefill_weight: 1.0,
            queue_weight: 4.0,
            poll_interval: HumanDuration::from_millis(250),
            poll_timeout: HumanDuration::from_secs(2),
            breaker_failures: 3,
            breaker_pause: HumanDuration::from_secs(1),
            index_entries: 1_000_000,
            decision_timeout: HumanDuration::from_secs(1),
            mailbox: 1024,
            placement: placement::Config::default(),
        }
    }
}

impl Config {
    /// Checks the bounds.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field and its limits.
    pub fn validate(&self) -> Result<()> {
        let refuse = |field: &str, value: &dyn std::fmt::Display, bounds: &str| {
            let name = format!("router.{field}");
            Err(Error::invalid(name.clone(), format!("{name} is {value}; use {bounds}")))
        };
        for (field, weight) in [("prefill_weight", self.prefill_weight), ("queue_weight", self.queue_weight)] {
            if !(0.0..=1000.0).contains(&weight) {
                return refuse(field, &weight, "0 to 1000");
            }
        }
        let times = [
            ("poll_interval", self.poll_interval),
            ("poll_timeout", self.poll_timeout),
            ("breaker_pause", self.breaker_pause),
            ("decision_timeout", self.decision_timeout),
        ];
        for (field, time) in times {
            if !(Duration::from_millis(10)..=Duration::from_secs(60)).contains(&time.get()) {
                return refuse(field, &time, "10ms to 1m");
            }
        }
        moesaic_service::check_drain("router", self.drain_timeout)?;
        if !(1..=1000).contains(&self.breaker_failures) {
            return refuse("breaker_failures", &self.breaker_failures, "1 to 1000");
        }
        if !(1024..=100_000_000).contains(&self.index_entries) {
            return refuse("index_entries", &self.index_entries, "1024 to 100000000");
        }
        if !(1..=65_536).contains(&self.mailbox) {
            return refuse("mailbox", &self.mailbox, "1 to 65536");
        }
        self.placement.validate()
    }

    pub(crate) fn weights(&self) -> Weights {
        Weights { prefill: self.prefill_weight, queue: self.queue_weight }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_out_of_bounds_name_the_field() {
        assert_eq!(Config::default().validate(), Ok(()));
        let wrong = [
            Config { prefill_weight: f64::NAN, ..Config::default() },
            Config { poll_interval: HumanDuration::default(), ..Config::default() },
            Config { breaker_failures: 0, ..Config::default() },
            Config { index_entries: 0, ..Config::default() },
            Config { mailbox: 0, ..Config::default() },
            Config {
                placement: placement::Config { min_copies: 0, ..placement::Config::default() },
                ..Config::default()
            },
        ];
        let fields = wrong.map(|config| config.validate().unwrap_err().field.unwrap());
        let names =
            ["prefill_weight", "poll_interval", "breaker_failures", "index_entries", "mailbox", "placement.min_copies"];
        assert_eq!(fields, names.map(|name| format!("router.{name}")));
    }
}
