//! Owns what the router that leads knows of each model's placement, and drives it. A restart begins with what the
//! shards and the metadata say.
use crate::metrics;
use crate::placement::lease::current;
use crate::placement::state::{Failure, Model, Steps};
use crate::placement::{Ground, Looked};
use actix::{Actor, ActorFutureExt, AsyncContext, Context, Handler, Message, MessageResult};
use moesaic_types::cluster::Placement;
use moesaic_types::{Digest, Result};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Instant;

/// The actor's state.
pub struct ExpertPlacement {
    ground: Arc<Ground>,
    /// The term that this state is of.
    term: Option<u64>,
    models: HashMap<Digest, Model>,
    /// A look is under way.
    is_looking: bool,
    /// Counts what was done to shards: a look that began before tells of what is over.
    deeds: u64,
    rebalanced: Instant,
    /// The metadata could not be read the last time.
    was_refused: bool,
}

/// What is known of a model's placement.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// The model's weights.
    pub model: Digest,
    /// The placement that was written last.
    pub placement: Option<Placement>,
    /// The groups of which all shards answered.
    pub groups: Vec<usize>,
    /// How much busier the busiest groups are than the average one; 1 is even.
    pub imbalance: Option<f64>,
}

impl ExpertPlacement {
    /// Fresh state, of which nothing is known.
    pub(crate) fn new(ground: Arc<Ground>) -> Self {
        metrics::leads_placement(false);
        Self {
            ground,
            term: None,
            models: HashMap::new(),
            is_looking: false,
            deeds: 0,
            rebalanced: Instant::now(),
            was_refused: false,
        }
    }

    fn tick(&mut self, context: &mut Context<Self>) {
        let term = current(&self.ground.term).map(|term| term.number);
        if term != self.term {
            self.begin(term);
        }
        let Some(term) = term.filter(|_| !self.is_looking) else { return };
        self.is_looking = true;
        let deeds = self.deeds;
        let now = Instant::now();
        let is_due = now.saturating_duration_since(self.rebalanced) >= self.ground.config.rebalance_interval.get();
        if is_due {
            self.rebalanced = now;
            self.models.values_mut().for_each(Model::rebalance);
        }
        let ground = Arc::clone(&self.ground);
        let look = async move { ground.leading(term, ground.look(is_due)).await };
        context.spawn(actix::fut::wrap_future::<_, Self>(look).map(move |looked, actor, context| {
            if actor.term == Some(term) {
                actor.is_looking = false;
                if actor.deeds == deeds {
                    actor.looked(context, term, looked);
                }
            }
        }));
    }

    /// Another term: of the last one, only the placements count that were written in it.
    fn begin(&mut self, term: Option<u64>) {
        if term.is_some() {
            tracing::info!("this router leads the placement of experts");
        }
        metrics::leads_placement(term.is_some());
        for model in self.models.values_mut() {
            *model = Model::new(model.known().cloned());
        }
        (self.term, self.is_looking, self.rebalanced) = (term, false, Instant::now());
    }

    fn looked(&mut self, context: &mut Context<Self>, term: u64, looked: Result<Looked>) {
        let looked = match looked {
            Ok(looked) => looked,
            Err(error) => {
                if !self.was_refused {
                    tracing::warn!(%error, "read the placement of experts");
                }
                self.was_refused = true;
                return;
            }
        };
        self.was_refused = false;
        let now = Instant::now();
        for (digest, found) in looked {
            let model = self.models.entry(digest).or_insert_with(|| Model::new(None));
            let steps = model.next(now, &self.ground.config, found);
            metrics::placement(&digest, model.known(), model.imbalance(), model.whole().count());
            self.take(context, term, digest, steps);
        }
    }

    /// Sets out to do it.
    fn take(&self, context: &mut Context<Self>, term: u64, digest: Digest, steps: Steps) {
        if let Some(change) = steps.change {
            let ground = Arc::clone(&self.ground);
            let change = async move { ground.leading(term, ground.change(digest, change)).await };
            context.spawn(actix::fut::wrap_future::<_, Self>(change).map(move |outcome, actor, _| {
                if actor.term == Some(term) {
                    actor.changed(&digest, outcome);
                }
            }));
        }
        for mend in steps.mends {
            let ground = Arc::clone(&self.ground);
            tracing::info!(shard = &*mend.id, epoch = mend.epoch, "take a shard to the placement that stands");
            let mend = async move {
                let mended = ground.leading(term, ground.mend(&mend)).await;
                (mend, mended)
            };
            context.spawn(actix::fut::wrap_future::<_, Self>(mend).map(move |(mend, mended), actor, _| {
                if actor.term != Some(term) {
                    return;
                }
                if let Err(error) = &mended {
                    tracing::warn!(shard = &*mend.id, epoch = mend.epoch, %error, "take a shard to the placement");
                }
                actor.deeds += 1;
                if let Some(model) = actor.models.get_mut(&digest) {
                    let config = &actor.ground.config;
                    model.mended(Instant::now(), config, &mend.id, mend.generation, mended.is_ok());
                }
            }));
        }
    }

    fn changed(&mut self, digest: &Digest, outcome: Result<Option<Placement>, Failure>) {
        match &outcome {
            Ok(Some(_)) => metrics::placement_changed(true),
            Ok(None) => {}
            Err(Failure { group, error }) => {
                metrics::placement_changed(false);
                tracing::warn!(%error, group, "place experts anew; the placement stands as it was");
            }
        }
        self.deeds += 1;
        if let Some(model) = self.models.get_mut(digest) {
            model.changed(Instant::now(), &self.ground.config, outcome);
        }
    }
}

impl Actor for ExpertPlacement {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Context<Self>) {
        self.tick(context);
        context.run_interval(self.ground.config.check_interval.get(), Self::tick);
    }
}

/// What is known of each model's placement.
#[derive(Message)]
#[rtype(result = "Vec<Status>")]
pub struct Statuses;

impl Handler<Statuses> for ExpertPlacement {
    type Result = MessageResult<Statuses>;

    fn handle(&mut self, _: Statuses, _: &mut Context<Self>) -> Self::Result {
        let models: BTreeMap<_, _> = self.models.iter().map(|(digest, model)| (digest.0, model)).collect();
        let status = |(digest, model): ([u8; 32], &Model)| Status {
            model: Digest(digest),
            placement: model.known().cloned(),
            groups: model.whole().collect(),
            imbalance: model.imbalance(),
        };
        MessageResult(models.into_iter().filter(|_| self.term.is_some()).map(status).collect())
    }
}
