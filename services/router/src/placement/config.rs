//! The `[router.placement]` section.
use super::plan::Limits;
use moesaic_config::HumanDuration;
use moesaic_types::{Error, Result};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Settings of the placement of experts; those of the router that leads are in force.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Copies of hot experts, over all groups, in each layer; 0..=65536.
    pub redundant_experts: usize,
    /// Groups that hold each expert at least, where there are as many: with 2, a lost group's experts are served by
    /// others at once; 1..=64.
    pub min_copies: usize,
    /// Experts of a layer that a group holds at most; copies give way to it, and it gives way where the experts would
    /// not fit at all. For a group that is told to stop it does not: what only that group has goes to the others at
    /// once where they can hold it within this limit, and else only when it is gone for `lost_after`. Set it where a
    /// group's memory does not hold the whole model: with no limit the last group that stays is given all of it.
    /// 0: no limit; 0..=65536.
    pub max_experts: usize,
    /// Groups that the first placement waits for; 1..=1024.
    pub min_groups: usize,
    /// The first placement also waits until no group came for so long; 0s..=1h.
    pub settle: HumanDuration,
    /// How often experts are placed anew by the load since; 10ms..=24h.
    pub rebalance_interval: HumanDuration,
    /// By how much the busiest groups must get less busy for that, as a share; 0..=1.
    pub min_gain: f64,
    /// Tokens of all experts of a layer, each counted once for each of its experts, below which its load says nothing:
    /// what stands stays.
    pub min_load: u64,
    /// How often shards are asked what they hold, so that those that restarted get it again; 10ms..=1m.
    pub check_interval: HumanDuration,
    /// Longest wait for what a shard answers at once; 10ms..=1m.
    pub call_timeout: HumanDuration,
    /// Longest wait until a shard has loaded its experts; 10ms..=24h.
    pub prepare_timeout: HumanDuration,
    /// A group that misses a shard for so long is given up: its experts go to the others; 10ms..=24h.
    pub lost_after: HumanDuration,
    /// Pause after a shard failed to load, or the placement could not be written; doubles up to a minute; 10ms..=1m.
    pub retry_pause: HumanDuration,
    /// The router that leads is another's turn when it was not heard of for so long; 100ms..=1m.
    pub lease: HumanDuration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            redundant_experts: 0,
            min_copies: 1,
            max_experts: 0,
            min_groups: 1,
            settle: HumanDuration::from_secs(2),
            rebalance_interval: HumanDuration::from_secs(60),
            min_gain: 0.05,
            min_load: 10_000,
            check_interval: HumanDuration::from_millis(500),
            call_timeout: HumanDuration::from_secs(2),
            prepare_timeout: HumanDuration::from_secs(600),
            lost_after: HumanDuration::from_secs(30),
            retry_pause: HumanDuration::from_secs(1),
            lease: HumanDuration::from_secs(3),
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
            let name = format!("router.placement.{field}");
            Err(Error::invalid(name.clone(), format!("{name} is {value}; use {bounds}")))
        };
        let counts = [
            ("redundant_experts", self.redundant_experts, 0..=65_536),
            ("min_copies", self.min_copies, 1..=64),
            ("max_experts", self.max_experts, 0..=65_536),
            ("min_groups", self.min_groups, 1..=1024),
        ];
        for (field, count, bounds) in counts {
            if !bounds.contains(&count) {
                return refuse(field, &count, &format!("{} to {}", bounds.start(), bounds.end()));
            }
        }
        if !(0.0..=1.0).contains(&self.min_gain) {
            return refuse("min_gain", &self.min_gain, "0 to 1");
        }
        let (ms, s) = (Duration::from_millis, Duration::from_secs);
        let (minute, hour, day) = ((s(60), "1m"), (s(3600), "1h"), (s(86_400), "24h"));
        let times = [
            ("settle", self.settle, (s(0), "0s"), hour),
            ("rebalance_interval", self.rebalance_interval, (ms(10), "10ms"), day),
            ("check_interval", self.check_interval, (ms(10), "10ms"), minute),
            ("call_timeout", self.call_timeout, (ms(10), "10ms"), minute),
            ("prepare_timeout", self.prepare_timeout, (ms(10), "10ms"), day),
            ("lost_after", self.lost_after, (ms(10), "10ms"), day),
            ("retry_pause", self.retry_pause, (ms(10), "10ms"), minute),
            ("lease", self.lease, (ms(100), "100ms"), minute),
        ];
        for (field, time, (least, least_text), (most, most_text)) in times {
            if !(least..=most).contains(&time.get()) {
                return refuse(field, &time, &format!("{least_text} to {most_text}"));
            }
        }
        Ok(())
    }

    pub(crate) fn limits(&self) -> Limits {
        Limits {
            redundant_experts: self.redundant_experts,
            min_copies: self.min_copies,
            max_experts: self.max_experts,
            min_gain: self.min_gain,
            min_load: self.min_load,
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
            Config { redundant_experts: 65_537, ..Config::default() },
            Config { min_copies: 0, ..Config::default() },
            Config { min_groups: 0, ..Config::default() },
            Config { min_gain: f64::NAN, ..Config::default() },
            Config { settle: HumanDuration::from_secs(3601), ..Config::default() },
            Config { check_interval: HumanDuration::from_millis(9), ..Config::default() },
            Config { lease: HumanDuration::from_secs(61), ..Config::default() },
        ];
        let fields = wrong.map(|config| config.validate().unwrap_err().field.unwrap());
        let names = ["redundant_experts", "min_copies", "min_groups", "min_gain", "settle", "check_interval", "lease"];
        assert_eq!(fields, names.map(|name| format!("router.placement.{name}")));
    }
}
