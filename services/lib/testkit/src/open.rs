//! Counting what nobody has dropped yet.
use tokio::sync::watch;

/// Counts one more as open until it is dropped.
#[derive(Debug)]
pub struct Open(watch::Sender<usize>);

impl Open {
    /// One more.
    pub fn new(open: &watch::Sender<usize>) -> Self {
        open.send_modify(|open| *open += 1);
        Self(open.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open -= 1);
    }
}
