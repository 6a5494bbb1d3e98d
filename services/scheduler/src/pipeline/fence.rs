//! Who has a stage: one life of one replica's engine, and never again an older one.
use moesaic_proto::stage::v1::Open;
use moesaic_types::{Error, Result};
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::watch;

/// What a stage serves, and the life that has it.
pub(super) struct Fence {
    replica: Arc<str>,
    layers: Range<usize>,
    held: watch::Sender<Life>,
}

/// A life of a replica's engine: later ones are greater. The default one is before all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Life {
    /// Of the process's registration.
    generation: u64,
    /// Of the engine in that process.
    number: u64,
}

impl Fence {
    /// A stage that has these layers of this replica, and that nobody has yet.
    pub(super) fn new(replica: Arc<str>, layers: Range<usize>) -> Self {
        Self { replica, layers, held: watch::Sender::default() }
    }

    /// Gives the stage to whoever opens it.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field when it is another replica or wants other layers, `Unavailable` when a later
    /// life has the stage, or this one had it before.
    pub(super) fn take(&self, open: &Open) -> Result<Life> {
        let (layers, own) = (open.first_layer as usize..open.end_layer as usize, &self.layers);
        if *open.replica != *self.replica {
            let message = format!("replica: this is a stage of replica {}, not of {}", self.replica, open.replica);
            return Err(Error::invalid("replica", message));
        }
        if layers != *own {
            let message = format!("first_layer: layers {layers:?} are expected here; this stage has {own:?}");
            return Err(Error::invalid("first_layer", message));
        }
        let life = Life { generation: open.generation, number: open.life };
        let is_later = self.held.send_if_modified(|held| {
            let is_later = *held < life;
            *held = life.max(*held);
            is_later
        });
        if is_later { Ok(life) } else { Err(taken(&self.replica)) }
    }

    /// Whether a life has the stage.
    pub(super) fn holds(&self, life: Life) -> bool {
        *self.held.borrow() == life
    }

    /// Waits until a life does not have the stage any longer; for `None` for ever. The error that tells it. Cancel-safe.
    pub(super) async fn lost(&self, life: Option<Life>) -> Error {
        let Some(life) = life else { return std::future::pending().await };
        // the sender is here
        let _ = self.held.subscribe().wait_for(|held| *held != life).await;
        taken(&self.replica)
    }
}

fn taken(replica: &str) -> Error {
    Error::unavailable(format!("a later life of replica {replica} has this stage"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use moesaic_types::ErrorCode;

    fn open(generation: u64, life: u64) -> Open {
        Open { blocks: 1, first_layer: 2, end_layer: 4, replica: "s0".into(), generation, life }
    }

    #[test]
    fn only_a_later_life_of_the_same_replica_takes_a_stage_over() {
        let fence = Fence::new("s0".into(), 2..4);
        let first = fence.take(&open(7, 3)).unwrap();
        assert!(fence.holds(first) && !fence.holds(Life::default()));
        for older in [open(7, 3), open(7, 2), open(6, 9), open(0, 0)] {
            let error = fence.take(&older).unwrap_err();
            assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
        }
        let wrong = [Open { replica: "s1".into(), ..open(9, 9) }, Open { end_layer: 5, ..open(9, 9) }];
        let fields = wrong.map(|open| fence.take(&open).unwrap_err().field.unwrap());
        assert_eq!(fields, ["replica", "first_layer"]);
        assert!(fence.holds(first), "what is refused takes nothing");
        let again = fence.take(&open(7, 4)).unwrap();
        let restarted = fence.take(&open(8, 1)).unwrap();
        assert!(!fence.holds(first) && !fence.holds(again) && fence.holds(restarted));
    }

    #[tokio::test]
    async fn who_loses_a_stage_is_told() {
        let fence = Fence::new("s0".into(), 2..4);
        let first = fence.take(&open(1, 1)).unwrap();
        let (error, _) = tokio::join!(fence.lost(Some(first)), async { fence.take(&open(1, 2)) });
        assert!(error.message.contains("later life"), "{error}");
    }
}
