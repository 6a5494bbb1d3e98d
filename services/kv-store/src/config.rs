//! The `[kv_store]` section.
use moesaic_config::{ByteSize, HumanDuration};
use moesaic_types::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

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
    /// A folder for blocks that RAM has no room for, this process's alone; without one they are dropped. Files are
    /// written beside and renamed, and not synced: after a power loss some blocks may be lost, and none is served broken.
    pub disk_folder: Option<PathBuf>,
    /// Bytes of blocks that are kept in that folder. On a disk that has less room, what it has is used.
    pub disk_capacity: ByteSize,
    /// How long a disk that failed is left alone; 10ms..=1h.
    pub disk_retry: HumanDuration,
    /// A disk that takes longer for one thing is left alone until it answers, and blocks are served from RAM;
    /// 10ms..=1h.
    pub disk_timeout: HumanDuration,
    /// Messages that the block pool holds at most; 1..=65536.
    pub mailbox: usize,
    /// Nodes that keep a block, this one included; 1..=8. A node that is lost costs its blocks, unless others keep them.
    pub replication: usize,
    /// Blocks that may be on their way to other nodes at once; 1..=1024. More are not copied.
    pub replication_queue: usize,
    /// Calls that move blocks at once; 1..=65536. More are refused.
    pub max_streams: usize,
    /// Bytes of blocks that these calls hold, beside what is kept; 64MiB..=1TiB. Others wait.
    pub transfer_memory: ByteSize,
    /// A call that moves no block for so long is ended; 10ms..=1h.
    pub stream_idle: HumanDuration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            grpc: "127.0.0.1:9040".into(),
            drain_timeout: HumanDuration::from_secs(10),
            capacity: ByteSize(256 << 20),
            disk_folder: None,
            disk_capacity: ByteSize(16 << 30),
            disk_retry: HumanDuration::from_secs(30),
            disk_timeout: HumanDuration::from_secs(5),
            mailbox: 1024,
            replication: 1,
            replication_queue: 16,
            max_streams: 256,
            transfer_memory: ByteSize::mib(512),
            stream_idle: HumanDuration::from_secs(30),
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
        let counts = [
            ("mailbox", self.mailbox, 65_536),
            ("replication", self.replication, 8),
            ("replication_queue", self.replication_queue, 1024),
            ("max_streams", self.max_streams, 65_536),
        ];
        for (field, value, limit) in counts {
            if !(1..=limit).contains(&value) {
                let name = format!("kv_store.{field}");
                return Err(Error::invalid(name.clone(), format!("{name} is {value}; use 1 to {limit}")));
            }
        }
        let (least, most) = (HumanDuration::from_millis(10), HumanDuration::from_secs(3600));
        let durations =
            [("disk_retry", self.disk_retry), ("disk_timeout", self.disk_timeout), ("stream_idle", self.stream_idle)];
        for (field, value) in durations {
            if !(least.get()..=most.get()).contains(&value.get()) {
                let name = format!("kv_store.{field}");
                return Err(Error::invalid(name.clone(), format!("{name} is {value}; use 10ms to 1h")));
            }
        }
        if !(ByteSize::mib(64)..=ByteSize::gib(1024)).contains(&self.transfer_memory) {
            let message = format!("kv_store.transfer_memory is {}; use 64MiB to 1TiB", self.transfer_memory);
            return Err(Error::invalid("kv_store.transfer_memory", message));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_out_of_bounds_name_the_field() {
        assert_eq!(Config::default().validate(), Ok(()));
        let wrong = [
            ("mailbox", Config { mailbox: 0, ..Config::default() }),
            ("replication", Config { replication: 9, ..Config::default() }),
            ("replication_queue", Config { replication_queue: 0, ..Config::default() }),
            ("max_streams", Config { max_streams: 0, ..Config::default() }),
            ("transfer_memory", Config { transfer_memory: ByteSize::mib(63), ..Config::default() }),
            ("stream_idle", Config { stream_idle: HumanDuration::from_millis(9), ..Config::default() }),
            ("disk_timeout", Config { disk_timeout: HumanDuration::from_millis(9), ..Config::default() }),
            ("disk_retry", Config { disk_retry: HumanDuration::from_millis(9), ..Config::default() }),
        ];
        for (field, config) in wrong {
            assert_eq!(config.validate().unwrap_err().field, Some(format!("kv_store.{field}")));
        }
    }
}
