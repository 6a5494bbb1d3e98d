//! Where a replica's later stages are, as the directory of schedulers shows them.
use super::client::{RemoteStages, StageOptions, StageOwner, StagePeer};
use moesaic_transport::Directory;
use moesaic_transport::channel::bulk_channel;
use moesaic_transport::membership::View;
use moesaic_types::cluster::{Member, Role, ServedAs, StageInfo};
use moesaic_types::{Error, Result};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use tokio::runtime::Handle;

/// How long an engine that starts waits for stages that are away before it says so and tries again.
const PATIENCE: Duration = Duration::from_secs(10);

/// The generation of the process's own registration; `None` before it is registered. The directory would show that of a
/// later process with the same name.
pub type Generation = Box<dyn Fn() -> Option<u64> + Send + Sync>;

/// A replica's later stages.
pub struct Stages {
    directory: Directory,
    replica: Arc<str>,
    generation: Generation,
    model: ServedAs,
    ranges: Vec<Range<usize>>,
    options: StageOptions,
    /// Lives of the replica's engine in this process.
    lives: Arc<AtomicU64>,
    /// Where their streams are served.
    runtime: Handle,
}

impl Stages {
    /// Those that are part of `replica`, this process, of a model whose layers are in these stages. Call it in a runtime.
    pub fn new(
        directory: Directory,
        (replica, generation): (Arc<str>, Generation),
        model: ServedAs,
        ranges: Vec<Range<usize>>,
        options: StageOptions,
    ) -> Self {
        Self {
            directory,
            replica,
            generation,
            model,
            ranges,
            options,
            lives: Arc::default(),
            runtime: Handle::current(),
        }
    }

    /// The way to all of them, for one life of the engine; waits a while for those that are away, on a thread that is
    /// not the runtime's.
    ///
    /// # Errors
    /// `Unavailable` naming the first that is missing or takes no stream.
    pub(crate) fn connect(&self, hidden: usize) -> Result<RemoteStages> {
        let reached = async { tokio::time::timeout(PATIENCE, self.reached()).await };
        // what is missing is told below
        let _ = self.runtime.block_on(reached);
        let stages = RemoteStages::new(self.peers()?, hidden, self.owner()?, self.options, self.runtime.clone());
        stages.knock().map(|()| stages)
    }

    fn owner(&self) -> Result<StageOwner> {
        let missing = || Error::unavailable(format!("replica {} is not registered yet", self.replica));
        let generation = (self.generation)().ok_or_else(missing)?;
        Ok(StageOwner { replica: Arc::clone(&self.replica), generation, lives: Arc::clone(&self.lives) })
    }

    /// Layers of the first stage.
    pub(crate) fn first(&self) -> usize {
        self.ranges[0].end
    }

    /// All of them, as they are now.
    ///
    /// # Errors
    /// `Unavailable` naming the first that is missing.
    pub fn peers(&self) -> Result<Vec<StagePeer>> {
        let view = self.directory.view();
        // a channel wants the runtime that it will connect in
        let _entered = self.runtime.enter();
        let peer = |(stage, layers): (usize, &Range<usize>)| {
            let member = self.find(&view, stage).ok_or_else(|| self.missing(stage))?;
            let name = format!("stage {stage} of replica {} ({})", self.replica, member.id);
            Ok(StagePeer { name, channel: bulk_channel(member)?, layers: layers.clone() })
        };
        self.ranges.iter().enumerate().skip(1).map(peer).collect()
    }

    fn find<'a>(&self, view: &'a View, stage: usize) -> Option<&'a Member> {
        view.ready().map(|record| &record.member).find(|member| {
            let wanted = StageInfo {
                model: self.model.clone(),
                replica: Arc::clone(&self.replica),
                stage,
                stages: self.ranges.len(),
            };
            matches!(&member.role, Role::Stage(info) if *info == wanted)
        })
    }

    fn missing(&self, stage: usize) -> Error {
        let (stages, replica) = (self.ranges.len(), &self.replica);
        Error::unavailable(format!(
            "stage {stage} of {stages} is not there; start a scheduler with scheduler.stage={stage}, \
             scheduler.stages={stages}, scheduler.stage_of={replica}, and the same [model], scheduler.experts, \
             scheduler.expert_activations and scheduler.expert_outputs"
        ))
    }

    /// Waits until all are there. Cancel-safe.
    pub async fn reached(&self) {
        let mut views = self.directory.watch();
        loop {
            views.borrow_and_update();
            if self.peers().is_ok() || views.changed().await.is_err() {
                return;
            }
        }
    }
}
