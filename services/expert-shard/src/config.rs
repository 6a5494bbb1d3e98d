//! The `[expert_shard]` section.
use moesaic_types::{Error, Result};
use serde::{Deserialize, Serialize};

/// Settings of an expert-shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
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
        Self { load_windows: 8, mailbox: 64, queue: 256, max_batch_tokens: 8192 }
    }
}

impl Config {
    /// Checks the bounds.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field and its limits.
    pub fn validate(&self) -> Result<()> {
        let within = |name: &str, value: usize, max: usize| {
            let name = format!("expert_shard.{name}");
            let message = format!("{name} is {value}; use 1 to {max}");
            if (1..=max).contains(&value) { Ok(()) } else { Err(Error::invalid(name, message)) }
        };
        within("load_windows", self.load_windows, 1000)?;
        within("mailbox", self.mailbox, 65_536)?;
        within("queue", self.queue, 65_536)?;
        within("max_batch_tokens", self.max_batch_tokens, 1 << 20)
    }
}
