//! What a store tells on the bus: which blocks it has in which tier. Routers reckon with them; nothing else does.
use crate::actors::block_pool::{BlockPool, TakeChanges, Tell};
use crate::app::DEADLINE;
use crate::groups::Change;
use bytes::Bytes;
use moesaic_actors::WeakHandle;
use moesaic_transport::kv::{KvCue, KvCues, Tier, in_parts, sign};
use moesaic_transport::subjects::Subject;
use moesaic_types::boundary::{EventBus, KvEvent};
use moesaic_types::cluster::Service;
use moesaic_types::{BlockHash, Result};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::Notify;
use tokio::time::sleep;

/// Changes that come together are told together.
const PAUSE: Duration = Duration::from_millis(50);

const TIERS: [Tier; 2] = [Tier::Ram, Tier::Disk];

/// Publishes changes in order, each tier's with numbers of their own. Ends with the pool. Where the bus failed, and when a
/// listener lost something, everything is told anew.
pub async fn blocks(pool: WeakHandle<BlockPool>, changed: Arc<Notify>, bus: Arc<dyn EventBus>, id: Arc<str>) {
    let life = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros());
    let teller = Teller { source: format!("kv-store.{id}.{life}"), bus: Arc::clone(&bus), id: Arc::clone(&id) };
    let mut cues = KvCues::new(bus, &Subject::kv_anew(Service::KvStore, &id));
    let (mut lives, mut anew) = (None, false);
    loop {
        let cue = tokio::select! {
            () = changed.notified() => None,
            cue = cues.next() => Some(cue),
        };
        if cue.is_none() {
            sleep(PAUSE).await;
        }
        let Some(pool) = pool.upgrade() else { return };
        // a fresh pool knows of nothing that was told
        anew |= cue == Some(KvCue::Anew) || lives != Some(pool.restarts());
        let now = pool.restarts();
        let told = match pool.ask(TakeChanges { anew }, DEADLINE).await {
            Ok(tell) => teller.tell(tell, cue == Some(KvCue::Sign)).await,
            Err(error) => Err(error.into()),
        };
        lives = Some(now);
        anew = told.inspect_err(|error| tracing::debug!(%error, "tell which blocks are here")).is_err();
    }
}

struct Teller {
    source: String,
    bus: Arc<dyn EventBus>,
    id: Arc<str>,
}

impl Teller {
    /// Tells what there is; with `signs` each tier says something.
    async fn tell(&self, tell: Tell, signs: bool) -> Result<()> {
        for tier in TIERS {
            let events = events(&tell, tier);
            let events = if events.is_empty() && signs { vec![sign()] } else { events };
            for event in events.into_iter().flat_map(in_parts) {
                self.publish(tier, &event).await?;
            }
        }
        Ok(())
    }

    async fn publish(&self, tier: Tier, event: &KvEvent) -> Result<()> {
        let name = match tier {
            Tier::Ram => "ram",
            Tier::Disk => "disk",
        };
        let payload = Bytes::from(serde_json::to_vec(event).expect("KV events are plain data"));
        self.bus.publish(&self.source, &Subject::kv_store(&self.id, name).to_string(), payload).await
    }
}

/// A tier's events; changes of one kind that follow each other are one event.
fn events(tell: &Tell, tier: Tier) -> Vec<KvEvent> {
    let changes = match tell {
        Tell::Changes(changes) => changes,
        Tell::Anew(tiers) => {
            let blocks = tiers.iter().filter(|(of, _)| *of == tier).flat_map(|(_, blocks)| blocks).copied();
            return vec![KvEvent::Cleared, KvEvent::Stored { blocks: blocks.collect() }];
        }
    };
    let changes: Vec<&Change> = changes.iter().filter(|change| change.tier == tier).collect();
    let runs = changes.chunk_by(|a, b| a.is_here == b.is_here);
    let event = |run: &[&Change]| {
        let blocks: Vec<BlockHash> = run.iter().map(|change| change.hash).collect();
        if run[0].is_here { KvEvent::Stored { blocks } } else { KvEvent::Evicted { blocks } }
    };
    runs.map(event).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_tier_tells_its_own_changes_in_order() {
        let hash = |n| BlockHash([n; 16]);
        let change = |tier, n, is_here| Change { tier, hash: hash(n), is_here };
        let tell = Tell::Changes(vec![
            change(Tier::Ram, 1, true),
            change(Tier::Disk, 9, true),
            change(Tier::Ram, 2, true),
            change(Tier::Ram, 1, false),
            change(Tier::Ram, 1, true),
        ]);
        let stored = |blocks: &[u8]| KvEvent::Stored { blocks: blocks.iter().map(|n| hash(*n)).collect() };
        let evicted = KvEvent::Evicted { blocks: vec![hash(1)] };
        assert_eq!(events(&tell, Tier::Ram), [stored(&[1, 2]), evicted, stored(&[1])]);
        assert_eq!(events(&tell, Tier::Disk), [stored(&[9])]);
        let anew = Tell::Anew(vec![(Tier::Ram, vec![hash(3)]), (Tier::Disk, vec![])]);
        assert_eq!(events(&anew, Tier::Ram), [KvEvent::Cleared, stored(&[3])]);
        assert_eq!(events(&anew, Tier::Disk), [KvEvent::Cleared, stored(&[])]);
    }
}
