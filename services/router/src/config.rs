//! The `[router]` section.
use crate::placement;
use crate::policy::{Policy, Weights};
use crate::table::Rules;
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
    /// Cost of a prompt block that a kv-store has in RAM, against 1 for one that must be computed; 0..=1.
    pub store_ram_cost: f64,
    /// The same for one that a kv-store has on disk; 0..=1.
    pub store_disk_cost: f64,
    /// Requests that wait in the router's queue at most while every replica has as much as it can begin soon; further ones
    /// are refused. 0: they wait at the replicas instead. 0..=1000000.
    pub queue_capacity: usize,
    /// Requests that may wait at each replica whose batch is full, so that it has something to go on with; 1..=1000.
    pub queue_ahead: usize,
    /// How long a request waits in the queue at most; 1s..=24h.
    pub queue_timeout: HumanDuration,
    /// When no request of a priority was taken from the queue for so long, one goes before all others; 100ms..=24h.
    pub queue_promote_after: HumanDuration,
    /// How often each replica's load is asked for; 10ms..=1m.
    pub poll_interval: HumanDuration,
    /// A replica that does not say its load within this time counts as failed; 10ms..=1m.
    pub poll_timeout: HumanDuration,
    /// Failures in a row after which a replica is left alone; 1..=1000.
    pub breaker_failures: u32,
    /// How long it is first left alone; doubles with each further failure up to 30 seconds.
    pub breaker_pause: HumanDuration,
    /// How often a replica without work is sent a canary: a request of a few tokens that shows whether it works. 0s: none
    /// is sent, neither then nor to replicas that are new or were left alone. 0s..=24h.
    pub canary_interval: HumanDuration,
    /// A canary that brings no token within this time failed; 100ms..=10m.
    pub canary_timeout: HumanDuration,
    /// Entries (a block at a replica) that the prefix index remembers, and as many of kv-stores, about 100 bytes each;
    /// 1024..=100000000.
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
            store_ram_cost: 0.2,
            store_disk_cost: 0.5,
            queue_capacity: 1024,
            queue_ahead: 2,
            queue_timeout: HumanDuration::from_secs(600),
            queue_promote_after: HumanDuration::from_secs(10),
            poll_interval: HumanDuration::from_millis(250),
            poll_timeout: HumanDuration::from_secs(2),
            breaker_failures: 3,
            breaker_pause: HumanDuration::from_secs(1),
            canary_interval: HumanDuration::from_secs(30),
            canary_timeout: HumanDuration::from_secs(10),
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
        for (field, cost) in [("store_ram_cost", self.store_ram_cost), ("store_disk_cost", self.store_disk_cost)] {
            if !(0.0..=1.0).contains(&cost) {
                return refuse(field, &cost, "0 to 1");
            }
        }
        let ms = HumanDuration::from_millis;
        let (minute, day) = (ms(60_000), ms(24 * 3_600_000));
        let times = [
            ("poll_interval", self.poll_interval, ms(10), minute),
            ("poll_timeout", self.poll_timeout, ms(10), minute),
            ("breaker_pause", self.breaker_pause, ms(10), minute),
            ("decision_timeout", self.decision_timeout, ms(10), minute),
            ("queue_timeout", self.queue_timeout, ms(1000), day),
            ("queue_promote_after", self.queue_promote_after, ms(100), day),
            ("canary_interval", self.canary_interval, ms(0), day),
            ("canary_timeout", self.canary_timeout, ms(100), ms(600_000)),
        ];
        for (field, time, least, most) in times {
            if !(least.get()..=most.get()).contains(&time.get()) {
                return refuse(field, &time, &format!("{least} to {most}"));
            }
        }
        moesaic_service::check_drain("router", self.drain_timeout)?;
        let numbers = [
            ("breaker_failures", self.breaker_failures as usize, 1, 1000),
            ("queue_capacity", self.queue_capacity, 0, 1_000_000),
            ("queue_ahead", self.queue_ahead, 1, 1000),
            ("index_entries", self.index_entries, 1024, 100_000_000),
            ("mailbox", self.mailbox, 1, 65_536),
        ];
        for (field, number, least, most) in numbers {
            if !(least..=most).contains(&number) {
                return refuse(field, &number, &format!("{least} to {most}"));
            }
        }
        self.placement.validate()
    }

    /// How often a replica without work is sent a canary; `None`: none is sent at all.
    pub(crate) fn canary_interval(&self) -> Option<Duration> {
        Some(self.canary_interval.get()).filter(|interval| !interval.is_zero())
    }

    /// What decisions are made by.
    pub fn rules(&self) -> Rules {
        Rules {
            policy: self.policy,
            weights: Weights {
                prefill: self.prefill_weight,
                store_ram: self.store_ram_cost,
                store_disk: self.store_disk_cost,
                queue: self.queue_weight,
            },
            line: self.queue_capacity,
            ahead: self.queue_ahead,
            line_timeout: self.queue_timeout.get(),
            promote_after: self.queue_promote_after.get(),
            breaker_failures: self.breaker_failures,
            breaker_pause: self.breaker_pause.get(),
            canary_interval: self.canary_interval(),
        }
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
            Config { store_ram_cost: 1.1, ..Config::default() },
            Config { store_disk_cost: -0.1, ..Config::default() },
            Config { queue_capacity: 1_000_001, ..Config::default() },
            Config { queue_ahead: 0, ..Config::default() },
            Config { queue_timeout: HumanDuration::default(), ..Config::default() },
            Config { queue_promote_after: HumanDuration::default(), ..Config::default() },
            Config { canary_interval: HumanDuration::from_secs(24 * 3600 + 1), ..Config::default() },
            Config { canary_timeout: HumanDuration::default(), ..Config::default() },
            Config {
                placement: placement::Config { min_copies: 0, ..placement::Config::default() },
                ..Config::default()
            },
        ];
        let fields = wrong.map(|config| config.validate().unwrap_err().field.unwrap());
        let names = [
            "prefill_weight",
            "poll_interval",
            "breaker_failures",
            "index_entries",
            "mailbox",
            "store_ram_cost",
            "store_disk_cost",
            "queue_capacity",
            "queue_ahead",
            "queue_timeout",
            "queue_promote_after",
            "canary_interval",
            "canary_timeout",
            "placement.min_copies",
        ];
        assert_eq!(fields, names.map(|name| format!("router.{name}")));
    }
}
