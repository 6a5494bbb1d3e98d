//! Composition: the two actors, the events' ways into them and out, and the `Placer` boundary.
use crate::actors::prefix_index::Index;
use crate::actors::replica_table::{
    Choose, Chosen, InLine, Parts, Ready, Refresh, Registered, Registrations, ReplicaTable, Status, Statuses,
};
use crate::canary;
use crate::config::Config;
use crate::feeds::Feeds;
use crate::index::Owner;
use crate::news;
use futures::FutureExt;
use futures::future::BoxFuture;
use moesaic_actors::{Handle, Supervised};
use moesaic_types::boundary::{EventBus, PlaceRequest, Placed, Placer, Replica};
use moesaic_types::{Digest, Error, ReplicaId, Result};
use std::collections::BTreeSet;
use std::sync::Arc;
use tokio::runtime;
use tokio::sync::mpsc;

/// Events that wait to be published.
const OUTBOX: usize = 1024;

/// How often a request asks again whose line was lost with the actor that kept it.
const LIVES: usize = 3;

/// A router in this process.
pub struct Router {
    config: Arc<Config>,
    registrations: Registrations,
    table: Handle<ReplicaTable>,
    index: Index,
    _feeds: Feeds,
}

impl Router {
    /// Starts a router that knows no replica yet, on the current tokio runtime. Without events (a bus that fails) it
    /// places by polled load alone.
    ///
    /// # Errors
    /// `InvalidArgument` when the configuration is out of bounds.
    pub fn start(config: &Config, events: Arc<dyn EventBus>) -> Result<Arc<Self>> {
        config.validate()?;
        let config = Arc::new(config.clone());
        let registrations = Registrations::default();
        let ((news, told), (questions, asked)) = (mpsc::channel(OUTBOX), mpsc::channel(OUTBOX));
        let index = Index::start(config.index_entries, config.mailbox, registrations.clone(), questions);
        let name = news::own_name();
        let parts = Parts {
            canary_interval: config.canary_interval().map(|interval| canary::own_interval(&name, interval)),
            config: Arc::clone(&config),
            registrations: registrations.clone(),
            index: index.clone(),
            news,
            runtime: runtime::Handle::current(),
        };
        let new_table = move || ReplicaTable::new(parts.clone());
        let table = Supervised::spawn("replica_table", config.mailbox, new_table);
        let feeds = Feeds::start(events, name, index.actor(), &table, told, asked);
        Ok(Arc::new(Self { config, registrations, table, index, _feeds: feeds }))
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
        // first: the index takes no events from who is not registered, so nothing comes after it has forgotten
        let was_there = self.registrations.remove(id);
        self.index.forget(Owner::Replica(id.clone()));
        was_there
    }

    /// These kv-stores there are from now on: what others had is forgotten, and they are not heard any longer.
    pub fn set_stores(&self, ids: BTreeSet<Arc<str>>) {
        self.index.set_stores(ids);
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

    /// Requests that wait for a replica with room.
    ///
    /// # Errors
    /// As [`Self::replicas`].
    pub async fn waiting(&self) -> Result<usize> {
        Ok(self.table.ask(InLine, self.config.decision_timeout.get()).await?)
    }

    /// Entries of the prefix index: a block at an owner each.
    ///
    /// # Errors
    /// `Unavailable` while the index restarts.
    pub async fn indexed(&self) -> Result<usize> {
        self.index.entries().ok_or_else(|| Error::unavailable("the prefix index restarts"))
    }

    async fn decide(&self, request: PlaceRequest) -> Result<Placed> {
        let request = Arc::new(request);
        for life in 0..LIVES {
            match self.choose(&request, life == 0).await? {
                Chosen::Now(placed) => return Ok(placed),
                Chosen::Later(later) => {
                    if let Ok(answer) = later.await {
                        return answer;
                    }
                }
            }
        }
        Err(Error::unavailable("the router lost its line; send the request again"))
    }

    async fn choose(&self, request: &Arc<PlaceRequest>, is_first: bool) -> Result<Chosen> {
        let deadline = self.config.decision_timeout.get();
        let prefixes = self.index.prefixes(request);
        self.table.ask(Choose { request: Arc::clone(request), is_first, prefixes }, deadline).await?
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

#[cfg(test)]
mod tests;
