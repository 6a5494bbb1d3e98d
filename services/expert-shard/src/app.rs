//! Composition: the experts, their accounting and the control actor.
use crate::actors::shard_control::{FollowEpoch, Report, ShardControl, TakeReport};
use crate::config::Config;
use crate::load::LoadCounters;
use metrics::{counter, histogram};
use moesaic_actors::{Handle, Supervised};
use moesaic_model::backend::Backend;
use moesaic_model::decoder::ExpertStore;
use moesaic_model::expert_pool::{ExpertPool, Ticket};
use moesaic_model::spec::ModelSpec;
use moesaic_telemetry::metrics as names;
use moesaic_types::{Result, Routing};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest wait for the control actor.
const CONTROL_DEADLINE: Duration = Duration::from_secs(2);

/// A shard on one device.
pub struct ExpertShard<B: Backend> {
    store: ExpertStore<B>,
    counters: Arc<LoadCounters>,
    control: Handle<ShardControl>,
}

impl<B: Backend> ExpertShard<B> {
    /// Starts a shard over loaded experts.
    ///
    /// # Errors
    /// `InvalidArgument` when the configuration is out of bounds.
    pub fn start(config: &Config, spec: &ModelSpec, store: ExpertStore<B>) -> Result<Arc<Self>> {
        config.validate()?;
        let experts = |layer| spec.moe(layer).map_or(0, |moe| moe.experts);
        let counters = Arc::new(LoadCounters::new(spec.moe_layers().map(|layer| (layer, experts(layer)))));
        let (shared, windows) = (counters.clone(), config.load_windows);
        let control =
            Supervised::spawn("shard_control", config.mailbox, move || ShardControl::new(shared.clone(), windows));
        Ok(Arc::new(Self { store, counters, control }))
    }

    /// Ends the load window and reports the epoch and the load.
    ///
    /// # Errors
    /// `Unavailable` while the control actor restarts, `ResourceExhausted` when its mailbox is full.
    pub async fn report(&self) -> Result<Report> {
        Ok(self.control.ask(TakeReport, CONTROL_DEADLINE).await?)
    }

    /// Follows a placement's epoch; false when it is stale.
    ///
    /// # Errors
    /// As [`Self::report`].
    pub async fn follow(&self, epoch: u64) -> Result<bool> {
        Ok(self.control.ask(FollowEpoch(epoch), CONTROL_DEADLINE).await?)
    }
}

impl<B: Backend> ExpertPool<B> for ExpertShard<B> {
    fn dispatch(&self, layer: usize, x: &B::Tensor, routing: &Routing) -> moesaic_model::Result<Ticket<B>> {
        let started = Instant::now();
        self.counters.add(layer, routing);
        let ticket = self.store.dispatch(layer, x, routing);
        let label = layer.to_string();
        counter!(names::EXPERT_TOKENS_TOTAL, "layer" => label.clone()).increment(routing.experts.len() as u64);
        histogram!(names::EXPERT_DISPATCH_SECONDS).record(started.elapsed().as_secs_f64());
        if ticket.is_err() {
            counter!(names::EXPERT_FAILURES_TOTAL, "layer" => label).increment(1);
        }
        ticket
    }
}
