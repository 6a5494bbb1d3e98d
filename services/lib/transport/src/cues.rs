//! When to look at the metadata again: events tell of changes, and it is time every so often whether or not they come.
use futures::StreamExt;
use futures::stream::BoxStream;
use moesaic_types::boundary::{Event, EventBus};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Interval, MissedTickBehavior, interval};

/// Why to look.
pub(crate) enum Cue {
    /// It is time.
    Time,
    /// Something was told.
    Event(Event),
}

/// Cues, as they come.
pub(crate) struct Cues {
    bus: Arc<dyn EventBus>,
    /// What the subjects of its events start with.
    prefix: String,
    ticks: Interval,
    events: Option<BoxStream<'static, Event>>,
}

impl Cues {
    /// Cues by the bus's events under `prefix`, and by time: at once, then after every `pause`.
    pub(crate) fn new(bus: Arc<dyn EventBus>, prefix: String, pause: Duration) -> Self {
        let mut ticks = interval(pause);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { bus, prefix, ticks, events: None }
    }

    /// Waits for the next one. A subscription that ended or could not be made is tried again when it is time.
    pub(crate) async fn next(&mut self) -> Cue {
        loop {
            tokio::select! {
                _ = self.ticks.tick() => {
                    // before the look: nothing must happen unseen between the two
                    if self.events.is_none() {
                        self.subscribe().await;
                    }
                    return Cue::Time;
                }
                event = next(&mut self.events) => match event {
                    Some(event) => return Cue::Event(event),
                    None => self.events = None,
                }
            }
        }
    }

    async fn subscribe(&mut self) {
        let subscribed = self.bus.subscribe(&self.prefix).await;
        self.events =
            subscribed.inspect_err(|error| tracing::debug!(%error, prefix = self.prefix, "subscribe to events")).ok();
    }
}

/// The next event; waits for ever where there is no subscription.
async fn next(events: &mut Option<BoxStream<'static, Event>>) -> Option<Event> {
    match events {
        Some(events) => events.next().await,
        None => std::future::pending().await,
    }
}
