//! A process's connections to the cluster's servers.
use moesaic_transport::{ClusterConfig, Directory, Nats, NatsBus, RedisMetadata};
use moesaic_types::Result;
use moesaic_types::boundary::{EventBus, Metadata};
use moesaic_types::cluster::Service;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::watch;

/// What a service needs to find the others; cheap to clone. Neither Redis nor NATS must be there for it to be made.
#[derive(Clone)]
pub struct Cluster {
    /// Small shared state.
    pub metadata: Arc<dyn Metadata>,
    /// Events.
    pub events: Arc<dyn EventBus>,
    /// This process's name among those of its service.
    pub id: Arc<str>,
    /// Where others reach this process.
    pub address: Arc<str>,
    /// A member that was not heard of for so long is gone.
    pub lease: Duration,
    nats: Nats,
    generation: Arc<OnceLock<watch::Receiver<Option<u64>>>>,
}

impl Cluster {
    pub(crate) async fn connect(config: &ClusterConfig, service: Service, listening: SocketAddr) -> Result<Self> {
        let id: Arc<str> = config.id_of(listening.port()).into();
        let address = config.address_of(listening).into();
        let metadata = Arc::new(RedisMetadata::connect(config.redis(), &config.key_prefix)?);
        let nats =
            Nats::connect(config.nats(), &format!("moesaic-{service} {id}")).await?.of_cluster(&config.key_prefix);
        let events = Arc::new(NatsBus::new(nats.clone()));
        Ok(Self { metadata, events, id, address, lease: config.lease.get(), nats, generation: Arc::default() })
    }

    /// Watches the members of a service.
    pub fn directory(&self, service: Service) -> Directory {
        Directory::start(Arc::clone(&self.metadata), Arc::clone(&self.events), service, self.lease)
    }

    /// Says where the generation of this process's registration is told.
    pub(crate) fn registered(&self, generation: watch::Receiver<Option<u64>>) {
        // a process registers once
        let _ = self.generation.set(generation);
    }

    /// The generation of this process's own registration; `None` before it is registered.
    pub fn generation(&self) -> Option<u64> {
        self.generation.get().and_then(|generation| *generation.borrow())
    }

    /// Whether NATS is connected, as far as is known.
    pub fn hears_events(&self) -> bool {
        self.nats.is_connected()
    }
}
