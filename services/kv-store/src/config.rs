//! The `[kv_store]` section.
use moesaic_config::{ByteSize, HumanDuration};
use moesaic_types::{Error, Result};
use serde::{Deserialize, Serialize};

/// Settings of a kv-store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address of the kv-store's own process; its /metrics, /live and /ready are 1000 ports above.
    pub grpc: String,
    /// How long running calls may go on after the signal to stop; 0s..=24h.
    pub drain_timeout: HumanDuration,
    /// Bytes of blocks that are kept in RAM; 0 keeps none.
    pub capacity: ByteSize,
    /// Messages that the block pool holds at most; 1..=65536.
    pub mailbox: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            grpc: "127.0.0.1:9040".into(),
            drain_timeout: HumanDuration::from_secs(10),
            capacity: ByteSize(256 << 20),
            mailbox: 256,
        }
    }
}

impl Config {
    /// Checks the bounds.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field and its limits.
    pub fn validate(&self) -> Result<()> {
        moesaic_service::check_drain("kv_store", self.drain_timeout)?;
        if !(1..=65_536).contains(&self.mailbox) {
            let message = format!("kv_store.mailbox is {}; use 1 to 65536", self.mailbox);
            return Err(Error::invalid("kv_store.mailbox", message));
        }
        Ok(())
    }
}
