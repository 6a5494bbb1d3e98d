//! A replica's experts: in its own process, or in the cluster's shards.
use crate::config::{Config, ExpertsAt};
use crate::model::{Experts, OwnExperts};
use moesaic_model::LoadOptions;
use moesaic_model::backend::Backend;
use moesaic_model::config::Found;
use moesaic_model::expert_pool::{ExpertPool, Ticket};
use moesaic_model::source::WeightSource;
use moesaic_model::spec::ModelSpec;
use moesaic_service::Cluster;
use moesaic_transport::placement::{Follower, follow};
use moesaic_transport::{ExpertsOptions, RemoteExperts};
use moesaic_types::cluster::Service;
use moesaic_types::{ErrorCode, Routing};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Who executes a replica's experts.
pub enum ReplicaExperts {
    /// Its own process.
    Own,
    /// The cluster's shards.
    Shards {
        /// The way to them.
        experts: Arc<RemoteExperts>,
        /// Keeps the placement up to date.
        placement: Follower,
    },
}

impl ReplicaExperts {
    /// As the configuration says; a model without experts needs no shards. Call it in a runtime.
    pub fn start(config: &Config, found: &Found, cluster: &Cluster) -> Self {
        if config.experts == ExpertsAt::Own || found.spec.moe_layers().next().is_none() {
            return Self::Own;
        }
        let options = ExpertsOptions {
            activations: config.expert_activations,
            outputs: config.expert_outputs,
            timeout: Duration::from_millis(config.expert_timeout_ms),
            silence: Duration::from_millis(config.expert_silence_ms),
            ..ExpertsOptions::default()
        };
        let placement = follow(Arc::clone(&cluster.metadata), Arc::clone(&cluster.events), found.experts);
        let shards = cluster.directory(Service::ExpertShard);
        let experts = RemoteExperts::start(shards, placement.placements(), found.experts, options);
        Self::Shards { experts, placement }
    }

    /// Waits until all of them can be asked. Cancel-safe.
    pub async fn reached(&self) {
        if let Self::Shards { experts, .. } = self {
            experts.reached().await;
        }
    }

    /// Whether all of them can be asked now.
    ///
    /// # Errors
    /// `Unavailable` naming what is missing.
    pub fn ready(&self) -> moesaic_types::Result<()> {
        match self {
            Self::Own => Ok(()),
            Self::Shards { experts, .. } => experts.ready(),
        }
    }
}

impl Experts for Arc<ReplicaExperts> {
    fn pool<B: Backend>(
        &self,
        source: &dyn WeightSource,
        spec: &ModelSpec,
        backend: Arc<B>,
        options: &LoadOptions<'_>,
        layers: Range<usize>,
    ) -> moesaic_model::Result<Arc<dyn ExpertPool<B>>> {
        match &**self {
            ReplicaExperts::Own => OwnExperts.pool(source, spec, backend, options, layers),
            ReplicaExperts::Shards { experts, .. } => {
                Ok(Arc::new(RemotePool::new(Arc::clone(experts), backend, spec.hidden)))
            }
        }
    }
}

/// From so many tokens on a step is worth two micro-batches: below, a shard's time for one is not much longer than for
/// half of it, so that the overlap would not pay for the second message.
const MICRO_BATCH_TOKENS: usize = 8;

/// Experts in other processes.
pub struct RemotePool<B: Backend> {
    experts: Arc<RemoteExperts>,
    backend: Arc<B>,
    hidden: usize,
}

impl<B: Backend> RemotePool<B> {
    /// The experts of a model with rows of `hidden` columns; `backend` runs the rest of it.
    pub fn new(experts: Arc<RemoteExperts>, backend: Arc<B>, hidden: usize) -> Self {
        Self { experts, backend, hidden }
    }
}

impl<B: Backend> ExpertPool<B> for RemotePool<B> {
    fn dispatch(&self, layer: usize, x: &B::Tensor, routing: &Routing) -> moesaic_model::Result<Ticket<B>> {
        let dispatched = self.experts.dispatch(layer, self.backend.to_host(x)?, self.hidden, routing);
        let (backend, hidden) = (Arc::clone(&self.backend), self.hidden);
        Ok(Ticket::Pending(Box::new(move || {
            let sums = dispatched.wait();
            let sums = sums.map_err(|error| match error.code {
                ErrorCode::Unavailable => moesaic_model::Error::Experts { layer, reason: error.to_string() },
                // the same would come again
                _ => backend.error(format!("the experts of layer {layer}: {error}")),
            })?;
            backend.to_device(sums, hidden)
        })))
    }

    fn advanced(&self) -> u64 {
        self.experts.advanced()
    }

    fn micro_batches(&self, tokens: usize) -> usize {
        if tokens >= MICRO_BATCH_TOKENS { 2 } else { 1 }
    }
}
