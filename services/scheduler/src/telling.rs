//! What a replica tells on the bus: which blocks it has, and how busy it is.
use crate::actors::engine_control::Slot;
use crate::app::Scheduler;
use crate::config::Config;
use crate::engine::Command;
use bytes::Bytes;
use moesaic_transport::kv::{KvCue, KvCues, in_parts, sign};
use moesaic_transport::subjects::Subject;
use moesaic_types::boundary::{EventBus, KvEvent, Replica};
use moesaic_types::cluster::Service;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;
use tokio::time::sleep;

/// Between two loads that are told.
const LOAD_PAUSE: Duration = Duration::from_millis(20);

/// A name for this life among those that tell something.
fn own_name(replica: &str) -> String {
    let life = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros());
    format!("scheduler.{replica}.{life}")
}

/// Publishes KV events in order. Ends with the scheduler. A failed one is tried again, so that no reader of the bus
/// believes in blocks that are gone. Whoever lost one asks, and the engine says everything anew.
pub async fn blocks(
    bus: Arc<dyn EventBus>,
    config: Config,
    mut batches: mpsc::Receiver<Vec<KvEvent>>,
    engine: Arc<Slot>,
) {
    let (source, subject) = (own_name(&config.replica), config.kv_subject());
    let mut cues = KvCues::new(Arc::clone(&bus), &Subject::kv_anew(Service::Scheduler, &config.replica));
    loop {
        let batch = tokio::select! {
            batch = batches.recv() => match batch {
                Some(batch) => batch,
                None => return,
            },
            cue = cues.next() => match cue {
                KvCue::Sign => vec![sign()],
                KvCue::Anew => {
                    // without an engine there is nothing to say; a fresh one says so by itself
                    let _ = engine.sender().map(|engine| engine.try_send(Command::TellBlocks));
                    continue;
                }
            },
        };
        for event in batch.into_iter().flat_map(in_parts) {
            let payload = Bytes::from(serde_json::to_vec(&event).expect("KV events are plain data"));
            let mut pause = Duration::from_millis(config.restart_backoff_ms.max(1));
            while let Err(error) = bus.publish(&source, &subject, payload.clone()).await {
                if batches.is_closed() {
                    return;
                }
                tracing::warn!(%error, subject, "publish a KV event");
                sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(30));
            }
        }
    }
}

/// Publishes the load whenever the number of requests that run or wait changed. Ends with the scheduler. What is lost,
/// routers learn when they ask.
pub async fn load(bus: Arc<dyn EventBus>, replica: String, scheduler: Weak<Scheduler>) {
    let (source, subject) = (own_name(&replica), Subject::load(&replica).to_string());
    let Some(mut snapshots) = scheduler.upgrade().map(|scheduler| scheduler.watch()) else { return };
    let mut told = None;
    while snapshots.changed().await.is_ok() {
        let Some(load) = scheduler.upgrade().map(|scheduler| async move { scheduler.load().await }) else { return };
        // one that takes no requests says so when it is asked
        let Ok(load) = load.await else { continue };
        if told == Some((load.running, load.waiting)) {
            continue;
        }
        told = Some((load.running, load.waiting));
        let payload = Bytes::from(serde_json::to_vec(&load).expect("loads are plain data"));
        if let Err(error) = bus.publish(&source, &subject, payload).await {
            tracing::debug!(%error, "tell the load");
        }
        sleep(LOAD_PAUSE).await;
    }
}
