//! Composition: the two actors, the events' way into the index, and the `Placer` boundary.
use crate::actors::prefix_index::{Apply, Forget, IndexActor, Overlap};
use crate::actors::replica_table::{Choose, Ready, Refresh, Registered, Registrations, ReplicaTable, Status, Statuses};
use crate::config::Config;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use moesaic_actors::{Handle, Supervised, WeakHandle};
use moesaic_transport::subjects::Plane;
use moesaic_types::boundary::{EventBus, PlaceRequest, Placed, Placer, Replica};
use moesaic_types::{Digest, ReplicaId, Result};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;

/// Pause before the bus is tried again.
const RESUBSCRIBE_AFTER: Duration = Duration::from_millis(500);

/// A router in this process.
pub struct Router {
    config: Arc<Config>,
    registrations: Registrations,
    table: Handle<ReplicaTable>,
    index: Handle<IndexActor>,
    feed: JoinHandle<()>,
}

impl Router {
    /// Starts a router that knows no replica yet, on the current tokio runtime. Without events (a bus that fails) it
    /// places by load alone.
    ///
    /// # Errors
    /// `InvalidArgument` when the configuration is out of bounds.
    pub fn start(config: &Config, events: Arc<dyn EventBus>) -> Result<Arc<Self>> {
        config.validate()?;
        let config = Arc::new(config.clone());
        let registrations = Registrations::default();
        let table = Supervised::spawn("replica_table", config.mailbox, {
            let (config, registrations) = (Arc::clone(&config), registrations.clone());
            move || ReplicaTable::new(Arc::clone(&config), registrations.clone())
        });
        let entries = config.index_entries;
        let index = Supervised::spawn("prefix_index", config.mailbox, move || IndexActor::new(entries));
        let feed = tokio::spawn(feed(events, index.downgrade()));
        Ok(Arc::new(Self { config, registrations, table, index, feed }))
    }

    /// Adds a replica, or replaces the one with this id. Requests may go there at once.
    pub fn register(&self, id: ReplicaId, replica: Arc<dyn Replica>) {
        self.enter(id, Registered { replica, model: None });
    }

    /// The same for one that serves one model in one way ([`BlockHasher::digest`](moesaic_types::BlockHasher::digest)):
    /// requests for another do not go there.
    pub fn register_serving(&self, id: ReplicaId, replica: Arc<dyn Replica>, model: Digest) {
        self.enter(id, Registered { replica, model: Some(model) });
    }

    fn enter(&self, id: ReplicaId, registered: Registered) {
        self.registrations.insert(id, registered);
        // A full mailbox does no harm: each decision and each poll reads the registrations.
        let _ = self.table.try_tell(Refresh);
    }

    /// Takes a replica out; whether it was there.
    pub fn deregister(&self, id: &ReplicaId) -> bool {
        let _ = self.index.try_tell(Forget(id.clone()));
        self.registrations.remove(id)
    }

    /// A registered replica.
    pub fn replica(&self, id: &ReplicaId) -> Option<Arc<dyn Replica>> {
        self.registrations.get(id)
    }

    /// What is known of each replica; readiness is that one of them is ready.
    ///
    /// # Errors
    /// `Unavailable` while the table restarts, `ResourceExhausted` when its mailbox is full.
    pub async fn replicas(&self) -> Result<Vec<Status>> {
        Ok(self.table.ask(Statuses, self.config.decision_timeout.get()).await?)
    }

    async fn decide(&self, request: PlaceRequest) -> Result<Placed> {
        let deadline = self.config.decision_timeout.get();
        let overlap = match self.index.ask(Overlap(request.blocks), deadline).await {
            Ok(overlap) => overlap,
            Err(error) => {
                tracing::warn!(request = %request.id, %error, "place without prefixes");
                HashMap::new()
            }
        };
        let PlaceRequest { prompt_tokens, max_tokens, exclude, latest_was_full, model, .. } = request;
        let choose = Choose { prompt_tokens, max_tokens, exclude, latest_was_full, model, overlap };
        self.table.ask(choose, deadline).await?
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.feed.abort();
    }
}

impl Placer for Router {
    fn place(&self, request: PlaceRequest) -> BoxFuture<'_, Result<Placed>> {
        self.decide(request).boxed()
    }

    fn ready(&self) -> BoxFuture<'_, Result<Vec<ReplicaId>>> {
        self.table.ask(Ready, self.config.decision_timeout.get()).map(|ready| ready?).boxed()
    }
}

/// Feeds the index from the bus until the router is dropped. An event that the index does not take in time is lost,
/// as on the bus: the next one shows the gap.
async fn feed(events: Arc<dyn EventBus>, index: WeakHandle<IndexActor>) {
    const PATIENCE: Duration = Duration::from_secs(5);
    loop {
        match events.subscribe(&Plane::Kv.prefix()).await {
            Ok(mut stream) => {
                while let Some(event) = stream.next().await {
                    let Some(index) = index.upgrade() else { return };
                    if let Err((Apply(event), _)) = index.try_tell(Apply(event)) {
                        // Full: wait for room, while the bus holds what comes.
                        if let Err(error) = wait_for_room(&index, event, PATIENCE).await {
                            tracing::debug!(%error, "a kv event is lost");
                        }
                    }
                }
                tracing::warn!("kv events ended, subscribing again");
            }
            Err(error) => tracing::warn!(%error, "subscribe to kv events"),
        }
        tokio::time::sleep(RESUBSCRIBE_AFTER).await;
    }
}

/// Tries again, with growing pauses, until the index takes the event.
async fn wait_for_room(
    index: &Handle<IndexActor>,
    mut event: moesaic_types::boundary::Event,
    patience: Duration,
) -> Result<(), moesaic_actors::AskError> {
    let give_up = tokio::time::Instant::now() + patience;
    let mut pause = Duration::from_micros(200);
    loop {
        tokio::time::sleep(pause).await;
        match index.try_tell(Apply(event)) {
            Ok(()) => return Ok(()),
            Err((_, error)) if tokio::time::Instant::now() >= give_up => return Err(error),
            Err((Apply(again), _)) => event = again,
        }
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}
