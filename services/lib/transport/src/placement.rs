//! Where the placement of experts stands: one record for each model in the metadata, which the leading router writes
//! and all others follow.
//!
//! Records are compared by the metadata's version, which never comes back, so that a server that lags behind takes
//! nobody back to an older placement. Epochs only grow as well, unless everybody who knew them is gone: then the
//! metadata came back empty, and what is written next holds whatever its epoch.
use crate::cues::Cues;
use crate::subjects::Subject;
use bytes::Bytes;
use moesaic_types::boundary::{EventBus, Metadata};
use moesaic_types::cluster::Placement;
use moesaic_types::{Digest, Result};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;

/// How often the metadata are read, whether or not events come.
const POLL: Duration = Duration::from_secs(2);

/// Where a model's placement stands.
pub fn key(model: &Digest) -> String {
    format!("placement/{}", hex(model))
}

fn hex(model: &Digest) -> String {
    model.0.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What stands in the metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The placement; `None` where this build does not understand it, or it is not one of this model.
    pub placement: Option<Placement>,
    /// The record's version: who writes the next placement must name it.
    pub version: u64,
}

/// What is told when a placement was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Placed {
    epoch: u64,
}

/// Reads a model's placement; `None` where there is none.
///
/// # Errors
/// `Unavailable` when the metadata cannot be read.
pub async fn read(metadata: &dyn Metadata, model: &Digest) -> Result<Option<Standing>> {
    let found = metadata.get(&key(model)).await?;
    Ok(found.map(|(bytes, version)| {
        let placement: Option<Placement> = serde_json::from_slice(&bytes).ok();
        Standing { placement: placement.filter(|found| found.model == *model && found.is_complete()), version }
    }))
}

/// Writes a placement over the version that the writer knows (`None`: over none), and tells those who follow. The new
/// version, or `None` when another wrote meanwhile. `source` names the writer in this life of it.
///
/// # Errors
/// `Unavailable` when the metadata did not answer: then it was written or not.
pub async fn publish(
    metadata: &dyn Metadata,
    events: &dyn EventBus,
    source: &str,
    placement: &Placement,
    expected: Option<u64>,
) -> Result<Option<u64>> {
    let bytes: Bytes = serde_json::to_vec(placement).expect("a placement is plain data").into();
    let written = metadata.compare_and_set(&key(&placement.model), expected, bytes, None).await?;
    if written.is_some() {
        let subject = Subject::placement(&hex(&placement.model)).to_string();
        let payload = serde_json::to_vec(&Placed { epoch: placement.epoch }).expect("an event is plain data");
        // a lost event is no loss: who follows asks the metadata as well
        if let Err(error) = events.publish(source, &subject, payload.into()).await {
            tracing::debug!(%error, subject, "publish a placement event");
        }
    }
    Ok(written)
}

/// The placement, as those see it who are served by it.
#[derive(Clone, Debug)]
pub struct Placements {
    /// The last known; `None` until the first is.
    pub latest: watch::Receiver<Option<Arc<Placement>>>,
    /// Told when somebody else is seen to follow a later one: then it is read at once.
    pub outdated: Arc<Notify>,
}

impl From<watch::Receiver<Option<Arc<Placement>>>> for Placements {
    /// Where nobody reads.
    fn from(latest: watch::Receiver<Option<Arc<Placement>>>) -> Self {
        Self { latest, outdated: Arc::default() }
    }
}

/// Follows a model's placement. Ends when it is dropped.
#[derive(Debug)]
pub struct Follower {
    placements: Placements,
    task: AbortHandle,
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Follower {
    /// The placement now; `None` until the first is known.
    pub fn placement(&self) -> Option<Arc<Placement>> {
        self.placements.latest.borrow().clone()
    }

    /// The same, to wait for changes.
    pub fn watch(&self) -> watch::Receiver<Option<Arc<Placement>>> {
        self.placements.latest.clone()
    }

    /// The same, for who may see that a later one is followed.
    pub fn placements(&self) -> Placements {
        self.placements.clone()
    }
}

/// Starts to follow a model's placement: read at once, at each event, where somebody follows a later one, and every few
/// seconds. The last one is kept while the metadata cannot be read.
pub fn follow(metadata: Arc<dyn Metadata>, events: Arc<dyn EventBus>, model: Digest) -> Follower {
    let (told, latest) = watch::channel(None);
    let outdated = Arc::<Notify>::default();
    let placements = Placements { latest, outdated: Arc::clone(&outdated) };
    let watcher = Watcher { metadata, events, model, known: Known::default(), told, outdated, was_unreadable: false };
    Follower { placements, task: tokio::spawn(watcher.run()).abort_handle() }
}

/// What is known, and what counts as news: without a clock or a server.
#[derive(Debug, Default)]
struct Known {
    /// Of the record; `None` where there was none when it was last read.
    version: Option<u64>,
    placement: Option<Arc<Placement>>,
}

impl Known {
    /// Takes in what was read; whether the placement is another now.
    fn read(&mut self, found: Option<Standing>) -> bool {
        let Some(Standing { placement, version }) = found else {
            self.version = None;
            return false;
        };
        let Some(placement) = placement else { return false };
        let epoch = self.placement.as_ref().map_or(0, |known| known.epoch);
        let is_later = self.version.is_none_or(|known| version > known);
        if !is_later && placement.epoch <= epoch {
            return false;
        }
        self.version = Some(version);
        let is_new = self.placement.as_deref() != Some(&placement);
        if is_new {
            self.placement = Some(Arc::new(placement));
        }
        is_new
    }
}

struct Watcher {
    metadata: Arc<dyn Metadata>,
    events: Arc<dyn EventBus>,
    model: Digest,
    known: Known,
    told: watch::Sender<Option<Arc<Placement>>>,
    outdated: Arc<Notify>,
    was_unreadable: bool,
}

impl Watcher {
    async fn run(mut self) {
        let subject = Subject::placement(&hex(&self.model)).to_string();
        let mut cues = Cues::new(Arc::clone(&self.events), subject, POLL);
        loop {
            // a cue that is lost to the other branch was one to read
            tokio::select! {
                _ = cues.next() => {}
                () = self.outdated.notified() => {}
            }
            self.poll().await;
        }
    }

    async fn poll(&mut self) {
        match read(&*self.metadata, &self.model).await {
            Ok(found) => {
                self.was_unreadable = false;
                if found.as_ref().is_some_and(|found| found.placement.is_none()) {
                    tracing::debug!(key = key(&self.model), "the placement is not understood");
                }
                if self.known.read(found) {
                    self.told.send_replace(self.known.placement.clone());
                }
            }
            Err(error) => {
                if !self.was_unreadable {
                    tracing::warn!(%error, key = key(&self.model), "read the placement; going on with the last known");
                }
                self.was_unreadable = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MemoryBus, MemoryMetadata};
    use std::collections::BTreeMap;

    fn standing(version: u64, epoch: u64) -> Option<Standing> {
        let layers = BTreeMap::from([(0, vec![vec![0]])]);
        Some(Standing { placement: Some(Placement { epoch, model: Digest::default(), groups: 1, layers }), version })
    }

    fn epoch(known: &Known) -> Option<u64> {
        known.placement.as_ref().map(|placement| placement.epoch)
    }

    #[test]
    fn a_server_that_lags_behind_takes_nobody_back() {
        let mut known = Known::default();
        assert!(known.read(standing(10, 1)));
        assert!(known.read(standing(20, 2)));
        assert!(!known.read(standing(20, 2)), "nothing is new");
        assert!(!known.read(standing(10, 1)));
        assert_eq!(epoch(&known), Some(2));
    }

    #[test]
    fn what_is_written_after_a_loss_holds_and_the_last_one_is_kept_meanwhile() {
        let mut known = Known::default();
        assert!(known.read(standing(10, 7)));
        assert!(!known.read(None));
        assert_eq!(epoch(&known), Some(7));
        assert!(known.read(standing(9, 1)), "it was seen to be empty: neither version nor epoch need be higher");
        let mut unaware = Known::default();
        unaware.read(standing(10, 7));
        assert!(unaware.read(standing(11, 1)), "a higher version alone is enough");
        assert!(unaware.read(standing(3, 8)), "and so is a higher epoch, where the server's clock was set back");
        assert_eq!(epoch(&unaware), Some(8));
    }

    #[tokio::test]
    async fn it_is_read_at_once_where_somebody_follows_a_later_one() {
        let (metadata, events) = (Arc::new(MemoryMetadata::new()), Arc::new(MemoryBus::new()));
        let follower = follow(metadata.clone(), events, Digest::default());
        let mut latest = follower.watch();
        // nobody hears the events of this bus
        let silent = MemoryBus::new();
        let placement = |epoch| standing(1, epoch).and_then(|standing| standing.placement).expect("it has one");
        let first = publish(&*metadata, &silent, "r0", &placement(1), None).await.expect("it is there");
        tokio::time::timeout(2 * POLL, latest.changed()).await.expect("it is time to read").expect("it goes on");
        publish(&*metadata, &silent, "r0", &placement(2), first)
            .await
            .expect("it is there")
            .expect("nobody else writes");
        follower.placements().outdated.notify_one();
        tokio::time::timeout(POLL / 2, latest.changed()).await.expect("it does not wait").expect("it goes on");
        assert_eq!(follower.placement().map(|placement| placement.epoch), Some(2));
    }

    #[test]
    fn what_is_not_understood_changes_nothing() {
        let mut known = Known::default();
        known.read(standing(10, 1));
        assert!(!known.read(Some(Standing { placement: None, version: 11 })));
        assert_eq!(epoch(&known), Some(1));
    }
}
