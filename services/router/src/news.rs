//! What routers tell each other, so that several of them count each other's decisions and share their canaries.
use moesaic_transport::subjects::{Plane, Subject};
use moesaic_types::ReplicaId;
use serde::{Deserialize, Serialize};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// News of a replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum News {
    /// A request was placed there.
    Placed {
        /// The replica.
        replica: ReplicaId,
        /// Blocks that it will need there.
        blocks: usize,
    },
    /// A canary came through.
    Works {
        /// The replica.
        replica: ReplicaId,
    },
}

/// A name for this life of a router among those that tell news: nobody looks it up.
pub fn own_name() -> String {
    static LIVES: AtomicU64 = AtomicU64::new(0);
    let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    format!("router.{}.{since}.{}", process::id(), LIVES.fetch_add(1, Ordering::Relaxed))
}

/// The subject of a router's news.
pub fn subject(name: &str) -> Subject {
    Subject::new(Plane::Load, "router", name, "news")
}
