//! What a shard holds under the placement that it follows, and under the one that comes.
use moesaic_model::backend::Backend;
use moesaic_model::decoder::ExpertStore;
use moesaic_types::cluster::Shares;
use moesaic_types::{Error, Result};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The experts of one placement.
pub struct Held<B: Backend> {
    /// The placement's epoch; 0 before the first.
    pub epoch: u64,
    /// This shard's experts under it.
    pub experts: Arc<ExpertStore<B>>,
}

impl<B: Backend> Clone for Held<B> {
    fn clone(&self) -> Self {
        Self { epoch: self.epoch, experts: Arc::clone(&self.experts) }
    }
}

/// The placement that is followed and the prepared one. Experts that both have are in memory once.
pub struct Shelf<B: Backend> {
    state: Mutex<State<B>>,
}

struct State<B: Backend> {
    current: Held<B>,
    prepared: Option<Held<B>>,
}

impl<B: Backend> Shelf<B> {
    /// Follows a placement.
    pub fn new(current: Held<B>) -> Self {
        Self { state: Mutex::new(State { current, prepared: None }) }
    }

    fn state(&self) -> MutexGuard<'_, State<B>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is followed.
    pub fn current(&self) -> Held<B> {
        self.state().current.clone()
    }

    /// What is prepared and not followed yet.
    pub fn prepared(&self) -> Option<Held<B>> {
        self.state().prepared.clone()
    }

    /// What a scheduler that follows `epoch` gets. The first to ask for the prepared one switches to it.
    ///
    /// # Errors
    /// `Unavailable` when `epoch` is over, or is not prepared here yet.
    pub fn at(&self, epoch: u64) -> Result<Held<B>> {
        let mut state = self.state();
        state.switch(epoch);
        let current = state.current.epoch;
        if epoch == current {
            return Ok(state.current.clone());
        }
        let reason = if epoch < current { "it is over" } else { "it is not prepared here" };
        Err(Error::unavailable(format!("placement {epoch}: {reason}; this shard follows {current}")))
    }

    /// Whether just this is prepared.
    pub fn has_prepared(&self, epoch: u64, shares: &Shares) -> bool {
        self.prepared().is_some_and(|prepared| prepared.epoch == epoch && prepared.experts.shares() == *shares)
    }

    /// Keeps what a coming placement wants; the preparation of an earlier one is dropped.
    ///
    /// # Errors
    /// `InvalidArgument` naming `epoch` when it is not above the one that is followed, or a later one is prepared: the
    /// call that asked for it may be given up long since.
    pub fn prepare(&self, held: Held<B>) -> Result<()> {
        let mut state = self.state();
        check_is_coming(held.epoch, state.current.epoch)?;
        if let Some(later) = state.prepared.as_ref().map(|prepared| prepared.epoch).filter(|epoch| *epoch > held.epoch)
        {
            let message = format!("epoch is {}; {later} is prepared already", held.epoch);
            return Err(Error::invalid("epoch", message));
        }
        state.prepared = Some(held);
        Ok(())
    }

    /// Switches to the prepared placement `epoch`, or follows it already.
    ///
    /// # Errors
    /// `InvalidArgument` naming `epoch` when it is over or is not prepared.
    pub fn commit(&self, epoch: u64) -> Result<()> {
        let mut state = self.state();
        state.switch(epoch);
        let current = state.current.epoch;
        if epoch == current {
            return Ok(());
        }
        let message = format!("epoch {epoch} is not prepared here; this shard follows {current}: prepare it first");
        Err(Error::invalid("epoch", message))
    }
}

impl<B: Backend> State<B> {
    fn switch(&mut self, epoch: u64) {
        if let Some(prepared) = self.prepared.take_if(|prepared| prepared.epoch == epoch) {
            tracing::info!(from = self.current.epoch, to = epoch, "follow another placement");
            self.current = prepared;
        }
    }
}

/// Checks that a placement is newer than the one that is followed.
///
/// # Errors
/// `InvalidArgument` naming `epoch`.
pub fn check_is_coming(epoch: u64, current: u64) -> Result<()> {
    if epoch > current {
        return Ok(());
    }
    Err(Error::invalid("epoch", format!("epoch is {epoch}; it must be above {current}, which this shard follows")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use moesaic_model::backend::TensorSlice;
    use moesaic_model::backend::native::NativeBackend;
    use moesaic_types::ErrorCode;

    fn held(epoch: u64) -> Held<NativeBackend> {
        let experts =
            ExpertStore::empty(Arc::new(NativeBackend::new(1, moesaic_model::Activations::Int8)), TensorSlice::WHOLE);
        Held { epoch, experts: Arc::new(experts) }
    }

    #[test]
    fn only_the_followed_placement_and_the_prepared_one_are_served() {
        let shelf = Shelf::new(held(3));
        assert_eq!(shelf.at(3).map(|held| held.epoch), Ok(3));
        for epoch in [2, 4] {
            assert_eq!(shelf.at(epoch).map(|held| held.epoch).unwrap_err().code, ErrorCode::Unavailable);
        }
        shelf.prepare(held(5)).expect("it is above");
        assert_eq!(shelf.at(3).map(|held| held.epoch), Ok(3), "prepared is not followed");
        assert_eq!(shelf.at(5).map(|held| held.epoch), Ok(5), "the first to ask switches");
        assert!(shelf.at(3).is_err(), "older epochs are over");
        assert_eq!(shelf.commit(5), Ok(()), "it is followed already");
    }

    #[test]
    fn a_commit_wants_a_preparation_and_a_preparation_a_newer_epoch() {
        let shelf = Shelf::new(held(3));
        let fields = [shelf.commit(4), shelf.commit(2), shelf.prepare(held(3)), shelf.prepare(held(2))]
            .map(|result| result.expect_err("it must be refused").field);
        assert!(fields.iter().all(|field| field.as_deref() == Some("epoch")), "{fields:?}");
        shelf.prepare(held(4)).expect("it is above");
        shelf.prepare(held(6)).expect("it is above");
        assert!(shelf.prepare(held(5)).is_err(), "what was asked for before comes late");
        assert!(shelf.commit(4).is_err(), "a later preparation took its place");
        assert_eq!(shelf.commit(6), Ok(()));
        assert_eq!(shelf.current().epoch, 6);
    }
}
