//! What each boundary trait promises.
mod event_bus;
mod job_queue;
mod metadata;
mod placer;
mod player;
mod prefix_store;
mod replica;

pub use event_bus::event_bus;
pub use job_queue::job_queue;
pub use metadata::metadata;
pub use placer::placer;
pub use prefix_store::{block, chain, fetched, prefix_store};
pub use replica::replica;

use std::sync::atomic::{AtomicU64, Ordering};

/// A word that no other run uses, for implementations that outlive a test.
fn unique() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("{}-{}-{}", std::process::id(), since.as_nanos(), NEXT.fetch_add(1, Ordering::Relaxed))
}
