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
}

impl Default for Config {
    fn default() -> Self {
        Self { load_windows: 8, mailbox: 64 }
    }
}

impl Config {
    /// Checks the bounds.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field and its limits.
    pub fn validate(&self) -> Result<()> {
        if !(1..=1000).contains(&self.load_windows) {
            let message = format!("expert_shard.load_windows is {}; use 1 to 1000", self.load_windows);
            return Err(Error::invalid("expert_shard.load_windows", message));
        }
        if !(1..=65_536).contains(&self.mailbox) {
            let message = format!("expert_shard.mailbox is {}; use 1 to 65536", self.mailbox);
            return Err(Error::invalid("expert_shard.mailbox", message));
        }
        Ok(())
    }
}
