//! Composition: the lease, the shards' clients and the actor.
use super::config::Config;
use super::lease::{Lease, current};
use super::procedure::Ground;
use super::shard::Shard;
use crate::actors::expert_placement::{ExpertPlacement, Status, Statuses};
use moesaic_actors::{Handle, Supervised};
use moesaic_transport::Directory;
use moesaic_transport::host;
use moesaic_transport::membership::Clients;
use moesaic_types::Result;
use moesaic_types::boundary::{EventBus, Metadata};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::timeout;

/// Where the lease stands.
const LEASE: &str = "placement/leader";

/// Messages that wait for the actor at most: it is asked for its status alone.
const MAILBOX: usize = 64;

/// Longest wait for the actor.
const DEADLINE: Duration = Duration::from_secs(2);

/// Longest wait for the metadata to take the lease back; then it runs out.
const GIVE_BACK: Duration = Duration::from_secs(2);

/// Seeks to lead the placement of experts, and does it as long as it leads. Ends when it is dropped.
pub struct PlacementLeader {
    ground: Arc<Ground>,
    /// `None` once it was stopped.
    lease: Mutex<Option<Lease>>,
    actor: Handle<ExpertPlacement>,
}

impl fmt::Debug for PlacementLeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PlacementLeader").field("lease", &self.lease).finish_non_exhaustive()
    }
}

impl PlacementLeader {
    /// Starts on the current tokio runtime. `shards` is the directory of expert-shards.
    ///
    /// # Errors
    /// `InvalidArgument` when the configuration is out of bounds.
    pub fn start(
        config: &Config,
        metadata: Arc<dyn Metadata>,
        events: Arc<dyn EventBus>,
        shards: Directory,
    ) -> Result<Self> {
        static LIVES: AtomicU64 = AtomicU64::new(0);
        config.validate()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        let (process, life) = (std::process::id(), LIVES.fetch_add(1, Ordering::Relaxed));
        let source = format!("router.{}.{process}.{now}.{life}", host::name());
        let lease = Lease::start(Arc::clone(&metadata), LEASE.to_owned(), source.clone(), config.lease.get());
        let ground = Arc::new(Ground {
            config: config.clone(),
            metadata,
            events,
            shards: Clients::new(shards, Shard::of),
            term: lease.watch(),
            source,
        });
        let actor = Supervised::spawn("expert_placement", MAILBOX, {
            let ground = Arc::clone(&ground);
            move || ExpertPlacement::new(Arc::clone(&ground))
        });
        Ok(Self { ground, lease: Mutex::new(Some(lease)), actor })
    }

    /// Whether this router leads.
    pub fn leads(&self) -> bool {
        current(&self.ground.term).is_some()
    }

    /// What is known of each model's placement; empty where this router does not lead.
    ///
    /// # Errors
    /// `Unavailable` while the actor restarts, `ResourceExhausted` when its mailbox is full.
    pub async fn status(&self) -> Result<Vec<Status>> {
        Ok(self.actor.ask(Statuses, DEADLINE).await?)
    }

    /// Stops to lead for good, so that another router can at once. Where the metadata do not answer it returns all the
    /// same, after two seconds, and the lease runs out.
    pub async fn stop(&self) {
        let lease = self.lease.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.actor.stop();
        self.actor.stopped().await;
        if let Some(lease) = lease
            && timeout(GIVE_BACK, lease.give_back()).await.is_err()
        {
            tracing::warn!(key = LEASE, "the metadata do not take the lease back; it runs out");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moesaic_testkit::{Severed, until};
    use moesaic_transport::{MemoryBus, MemoryMetadata};
    use moesaic_types::cluster::Service;

    fn lead(metadata: &Arc<Severed>) -> PlacementLeader {
        let (events, lease) = (Arc::new(MemoryBus::new()), Duration::from_secs(60));
        let shards = Directory::start(metadata.clone(), events.clone(), Service::ExpertShard, lease);
        PlacementLeader::start(&Config::default(), metadata.clone(), events, shards).unwrap()
    }

    #[tokio::test]
    async fn one_that_stops_gives_the_lease_back_and_one_that_cannot_ends_all_the_same() {
        let all = Arc::new(MemoryMetadata::default());
        let metadata = Severed::over(all.clone());
        let one = lead(&metadata);
        until("it leads", || async { one.leads() }).await;
        one.stop().await;
        assert!(!one.leads() && all.get(LEASE).await.unwrap().is_none(), "at once, not by its time");
        one.stop().await;
        let two = lead(&metadata);
        until("another leads", || async { two.leads() }).await;
        metadata.hang();
        two.stop().await;
        assert!(all.get(LEASE).await.unwrap().is_some());
    }
}
