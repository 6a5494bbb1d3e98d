//! The `[expert_shard]` section.
use moesaic_config::HumanDuration;
use moesaic_types::{Error, Result};
use serde::{Deserialize, Serialize};

/// Settings of an expert-shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address of the shard's own process; its /metrics, /live and /ready are 1000 ports above.
    pub grpc: String,
    /// How long it may take after the signal to stop to hand over the experts that only this shard's group has, and then
    /// to compute what schedulers wait for; 0s..=24h. The others must load those experts, for which they have
    /// `router.placement.prepare_timeout`: give it the time that this takes.
    pub drain_timeout: HumanDuration,
    /// The expert-parallel group that it is in; shards of one group hold slices of the same experts. 0..=4095.
    pub group: usize,
    /// Which slice of each expert it holds, below `ranks`.
    pub rank: usize,
    /// Slices that each expert is cut into (tensor parallelism); 1..=64.
    pub ranks: usize,
    /// Windows of expert load that are kept for placement; 1..=1000. A window ends when the load is asked for.
    pub load_windows: usize,
    /// Messages that the control actor holds at most; 1..=65536.
    pub mailbox: usize,
    /// Requests of schedulers that wait at most; more are left in their streams; 1..=65536.
    pub queue: usize,
    /// Tokens of several schedulers that are computed together at most; 1..=1048576.
    pub max_batch_tokens: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            grpc: "127.0.0.1:9030".into(),
            drain_timeout: HumanDuration::from_secs(30),
            group: 0,
            rank: 0,
            ranks: 1,
            load_windows: 8,
            mailbox: 64,
            queue: 256,
            max_batch_tokens: 8192,
        }
    }
}

impl Config {
    /// Checks the bounds.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field and its limits.
    pub fn validate(&self) -> Result<()> {
        let within = |name: &str, value: usize, min: usize, max: usize| {
            let name = format!("expert_shard.{name}");
            let message = format!("{name} is {value}; use {min} to {max}");
            if (min..=max).contains(&value) { Ok(()) } else { Err(Error::invalid(name, message)) }
        };
        within("group", self.group, 0, 4095)?;
        within("ranks", self.ranks, 1, 64)?;
        within("rank", self.rank, 0, self.ranks - 1)?;
        within("load_windows", self.load_windows, 1, 1000)?;
        within("mailbox", self.mailbox, 1, 65_536)?;
        within("queue", self.queue, 1, 65_536)?;
        within("max_batch_tokens", self.max_batch_tokens, 1, 1 << 20)?;
        moesaic_service::check_drain("expert_shard", self.drain_timeout)
    }
}
