//! Composition: the experts, their accounting and the control actor.
use crate::actors::shard_control::{EndWindow, ShardControl, TakeLoad};
use crate::config::Config;
use crate::load::{Counts, LoadCounters};
use crate::shelf::{Held, Shelf};
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
    shelf: Shelf<B>,
    hidden: usize,
    counters: Arc<LoadCounters>,
    control: Handle<ShardControl>,
}

impl<B: Backend> ExpertShard<B> {
    /// Starts a shard over what it holds before the first placement: everything in embedded mode, nothing in a cluster.
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
        let shelf = Shelf::new(Held { epoch: 0, experts: Arc::new(store) });
        Ok(Arc::new(Self { shelf, hidden: spec.hidden, counters, control }))
    }

    /// What it holds.
    pub fn shelf(&self) -> &Shelf<B> {
        &self.shelf
    }

    /// Columns of its inputs and outputs.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Tokens by layer and expert over the windows that are kept, the running one included.
    ///
    /// # Errors
    /// `Unavailable` while the control actor restarts, `ResourceExhausted` when its mailbox is full.
    pub async fn load(&self) -> Result<Counts> {
        Ok(self.control.ask(TakeLoad, CONTROL_DEADLINE).await?)
    }

    /// The same; the next window starts now.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub async fn end_window(&self) -> Result<Counts> {
        Ok(self.control.ask(EndWindow, CONTROL_DEADLINE).await?)
    }

    /// Counts a layer's tokens as load of their experts.
    pub(crate) fn count(&self, layer: usize, routing: &Routing) {
        self.counters.add(layer, routing);
    }

    /// Runs a layer's experts.
    pub(crate) fn compute(
        &self,
        held: &Held<B>,
        layer: usize,
        x: &B::Tensor,
        routing: &Routing,
    ) -> moesaic_model::Result<B::Tensor> {
        let started = Instant::now();
        let output = held.experts.run(layer, x, routing);
        let label = layer.to_string();
        counter!(names::EXPERT_TOKENS_TOTAL, "layer" => label.clone()).increment(routing.experts.len() as u64);
        histogram!(names::EXPERT_DISPATCH_SECONDS).record(started.elapsed().as_secs_f64());
        if output.is_err() {
            counter!(names::EXPERT_FAILURES_TOTAL, "layer" => label).increment(1);
        }
        output
    }
}

impl<B: Backend> ExpertPool<B> for ExpertShard<B> {
    fn dispatch(&self, layer: usize, x: &B::Tensor, routing: &Routing) -> moesaic_model::Result<Ticket<B>> {
        self.count(layer, routing);
        Ok(Ticket::Ready(self.compute(&self.shelf.current(), layer, x, routing)?))
    }
}
