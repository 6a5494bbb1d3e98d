//! Newtypes for identifiers.
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;

/// A token's number in the model's vocabulary.
pub type TokenId = u32;

/// Identifies one request from the gateway's door to the last shard; the client's `x-request-id` where it gave one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RequestId(pub Arc<str>);

impl RequestId {
    /// Wraps the text of an id.
    pub fn new(id: impl Into<Arc<str>>) -> Self {
        Self(id.into())
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Identifies one scheduler (a replica is the data-parallel dimension).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ReplicaId(pub Arc<str>);

impl ReplicaId {
    /// Wraps the text of an id.
    pub fn new(id: impl Into<Arc<str>>) -> Self {
        Self(id.into())
    }
}

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
