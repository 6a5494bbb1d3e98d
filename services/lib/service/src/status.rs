//! How the process is: what the admin server answers and what is logged when it changes.
use crate::cluster::Cluster;
use crate::process::Process;
use moesaic_transport::membership::Standing;
use moesaic_types::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::watch;

/// Where it is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It prepares.
    Starting,
    /// It does its job, or could.
    Running,
    /// It was told to stop.
    Draining,
}

/// What a look at the process showed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Look {
    /// Whether it can do its job, or why not.
    pub(crate) ready: Result<()>,
    /// What is missing that it can do without.
    pub(crate) degraded: Vec<&'static str>,
}

/// Looks at a process.
pub(crate) struct Status<P> {
    pub(crate) process: Arc<P>,
    pub(crate) cluster: Cluster,
    phase: watch::Receiver<Phase>,
    standing: watch::Receiver<Standing>,
    /// Others have seen it; they go on with what they know when the metadata are away.
    was_seen: AtomicBool,
}

impl<P: Process> Status<P> {
    pub(crate) fn new(
        process: Arc<P>,
        cluster: Cluster,
        phase: watch::Receiver<Phase>,
        standing: watch::Receiver<Standing>,
    ) -> Self {
        Self { process, cluster, phase, standing, was_seen: AtomicBool::new(false) }
    }

    pub(crate) async fn look(&self) -> Look {
        let standing = *self.standing.borrow();
        if standing == Standing::Held {
            self.was_seen.store(true, Ordering::Release);
        }
        let was_seen = self.was_seen.load(Ordering::Acquire);
        Look { ready: self.ready(was_seen).await, degraded: degraded(standing, self.cluster.hears_events()) }
    }

    async fn ready(&self, was_seen: bool) -> Result<()> {
        let phase = *self.phase.borrow();
        if phase == Phase::Draining {
            return Err(Error::unavailable("it is stopping"));
        }
        self.process.ready().await?;
        if phase == Phase::Starting {
            return Err(Error::unavailable("it is starting"));
        }
        if P::MUST_BE_SEEN && !was_seen {
            return Err(Error::unavailable("others do not see it yet: redis could not be written (cluster.redis_url)"));
        }
        Ok(())
    }
}

fn degraded(standing: Standing, hears_events: bool) -> Vec<&'static str> {
    let mut list = Vec::new();
    if standing == Standing::Joining {
        list.push("redis (cluster.redis_url) does not answer: going on with what was known last");
    }
    if !hears_events {
        list.push("nats (cluster.nats_url) is not connected: changes are seen later, and routers do not hear where prefixes are");
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_names_the_setting() {
        assert_eq!(degraded(Standing::Held, true), Vec::<&str>::new());
        let all = degraded(Standing::Joining, false).join("\n");
        assert!(all.contains("cluster.redis_url") && all.contains("cluster.nats_url"), "{all}");
    }
}
