//! Looks at the engine's pulse from outside its thread, says aloud when a step does not end, and tells who waits.
use crate::config::Config;
use crate::engine::Parts;
use crate::health::{Bounds, Health};
use std::sync::Arc;
use tokio::sync::watch;

/// Follows the pulse until it is aborted. Readers of `health` see a change within [`Bounds::look_every`].
pub async fn watch(parts: Arc<Parts>, health: watch::Sender<Health>) {
    let mut tick = tokio::time::interval(Bounds::new(&parts.config).look_every());
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let now = parts.health();
        if !now.differs(&health.borrow()) {
            continue;
        }
        if now != Health::Working {
            // The engine says that it is ready, after it has begun another step; judged under the same lock, so that the
            // later of the two is right.
            parts.snapshot.send_if_modified(|snapshot| {
                let changed = snapshot.ready && parts.health() != Health::Working;
                snapshot.ready &= !changed;
                changed
            });
        }
        health.send_replace(now);
        log(now, &parts.config);
    }
}

fn log(now: Health, config: &Config) {
    let replica = config.replica.as_str();
    match now {
        Health::Working => tracing::info!(replica, "the engine gets on again"),
        Health::Stalled(time) => tracing::error!(
            replica,
            step_ms = time.as_millis(),
            step_stalled_after_ms = config.step_stalled_after_ms,
            "a step does not end; not ready until it does: look for a lost expert shard, a device error or too few \
             threads; if such steps are normal here, raise scheduler.step_stalled_after_ms"
        ),
        Health::Hanging(time) => tracing::error!(
            replica,
            silent_ms = time.as_millis(),
            step_silence_ms = config.step_silence_ms,
            "a step does not get on; not ready until it does, and its requests go on elsewhere: look for a device error or \
             too few threads; if one layer takes so long here, raise scheduler.step_silence_ms"
        ),
        Health::WithoutExperts(time) => tracing::error!(
            replica,
            without_ms = time.as_millis(),
            experts_patience_ms = config.experts_patience_ms,
            "the experts do not answer; not ready until they do: bring the lost expert shards back"
        ),
        Health::Dead(time) => tracing::error!(
            replica,
            step_ms = time.as_millis(),
            step_dead_after_ms = config.step_dead_after_ms,
            "a step does not end; not live any longer: restart this process"
        ),
    }
}
