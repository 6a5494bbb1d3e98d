//! What stands in the metadata about a group of blocks: for each node that has some of it, one record under a lease.
use bytes::Bytes;
use moesaic_types::BlockHash;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// A record that is not renewed for so long is gone. A node that dies is known by its generation long before.
pub const LEASE: Duration = Duration::from_secs(30 * 60);

/// Where blocks are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// In memory.
    Ram,
    /// On disk.
    Disk,
}

/// A node has blocks of a group; node and group are in the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holding {
    /// The life of the node that says so. Others' words are not listened to: that life is over.
    pub generation: u64,
    /// The best tier that has some of it.
    pub tier: Tier,
}

impl Holding {
    /// Where a node's record of a group stands.
    pub fn key(group: &BlockHash, node: &str) -> String {
        format!("kv/{group:?}/{node}")
    }

    /// As it stands in the metadata.
    pub fn to_bytes(self) -> Bytes {
        serde_json::to_vec(&self).expect("a record is plain data").into()
    }

    /// `None` where it is not a record that this build understands.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let holding = Holding { generation: 7, tier: Tier::Disk };
        assert_eq!(&holding.to_bytes()[..], br#"{"generation":7,"tier":"disk"}"#);
        assert_eq!(Holding::read(&holding.to_bytes()), Some(holding));
        assert_eq!(Holding::read(b"{}"), None);
        let key = Holding::key(&BlockHash([0xab; 16]), "kv-0");
        assert_eq!(key, "kv/abababababababababababababababab/kv-0");
    }
}
