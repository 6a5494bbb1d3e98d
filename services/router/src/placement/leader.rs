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
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Where the lease stands.
const LEASE: &str = "placement/leader";

/// Messages that wait for the actor at most: it is asked for its status alone.
const MAILBOX: usize = 64;

/// Longest wait for the actor.
const DEADLINE: Duration = Duration::from_secs(2);

/// Seeks to lead the placement of experts, and does it as long as it leads. Ends when it is dropped.
pub struct PlacementLeader {
    ground: Arc<Ground>,
    lease: Lease,
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
        Ok(Self { ground, lease, actor })
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

    /// Stops to lead, so that another router can at once.
    pub async fn stop(self) {
        self.actor.stop();
        self.actor.stopped().await;
        self.lease.give_back().await;
    }
}
