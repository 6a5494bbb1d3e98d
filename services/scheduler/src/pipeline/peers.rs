//! Where a replica's later stages are, as the directory of schedulers shows them.
use super::client::StagePeer;
use moesaic_model::pipeline::split_layers;
use moesaic_transport::Directory;
use moesaic_transport::channel::bulk_channel;
use moesaic_transport::membership::View;
use moesaic_types::cluster::{Member, Role, ServedAs, StageInfo};
use moesaic_types::{Error, Result};
use std::ops::Range;
use std::sync::Arc;
use tokio::runtime::Handle;

/// A replica's later stages.
pub struct Stages {
    directory: Directory,
    replica: Arc<str>,
    model: ServedAs,
    ranges: Vec<Range<usize>>,
    /// Where their streams are served.
    pub(crate) runtime: Handle,
}

impl Stages {
    /// Those that are part of `replica`, of a model of so many layers in `stages` stages. Call it in a runtime.
    pub fn new(directory: Directory, replica: Arc<str>, model: ServedAs, layers: usize, stages: usize) -> Self {
        let ranges = split_layers(layers, stages);
        Self { directory, replica, model, ranges, runtime: Handle::current() }
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
             scheduler.stages={stages}, scheduler.stage_of={replica} and the same [model]"
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
