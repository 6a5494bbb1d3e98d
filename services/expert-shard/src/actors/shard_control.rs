//! Owns what the placement knows of this shard: its epoch and the windows of expert load.
use crate::load::{Counts, LoadCounters};
use actix::{Actor, Context, Handler, Message};
use std::collections::VecDeque;
use std::sync::Arc;

/// The actor's state; a restart begins at epoch 0 with no windows, and the next placement sets it right.
pub struct ShardControl {
    counters: Arc<LoadCounters>,
    windows: VecDeque<Counts>,
    window_limit: usize,
    epoch: u64,
}

impl ShardControl {
    /// Fresh state over the shard's counters.
    pub fn new(counters: Arc<LoadCounters>, window_limit: usize) -> Self {
        Self { counters, windows: VecDeque::new(), window_limit, epoch: 0 }
    }
}

impl Actor for ShardControl {
    type Context = Context<Self>;
}

/// What the placement asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The placement's epoch that this shard follows.
    pub epoch: u64,
    /// Tokens by layer and expert over the windows that are kept, the one that ends now included.
    pub load: Counts,
}

/// Ends the current window and reports.
#[derive(Message)]
#[rtype(result = "Report")]
pub struct TakeReport;

impl Handler<TakeReport> for ShardControl {
    type Result = actix::MessageResult<TakeReport>;

    fn handle(&mut self, _: TakeReport, _: &mut Context<Self>) -> Self::Result {
        self.windows.push_back(self.counters.take());
        while self.windows.len() > self.window_limit {
            self.windows.pop_front();
        }
        let mut load = Counts::new();
        for (layer, counts) in self.windows.iter().flatten() {
            let sums = load.entry(*layer).or_insert_with(|| vec![0; counts.len()]);
            for (sum, count) in sums.iter_mut().zip(counts) {
                *sum += count;
            }
        }
        actix::MessageResult(Report { epoch: self.epoch, load })
    }
}

/// Follows a newer placement; false when `epoch` is older than the one that is followed.
#[derive(Message)]
#[rtype(result = "bool")]
pub struct FollowEpoch(
    /// The placement's epoch.
    pub u64,
);

impl Handler<FollowEpoch> for ShardControl {
    type Result = bool;

    fn handle(&mut self, FollowEpoch(epoch): FollowEpoch, _: &mut Context<Self>) -> bool {
        let newer = epoch >= self.epoch;
        if newer {
            self.epoch = epoch;
        }
        newer
    }
}
