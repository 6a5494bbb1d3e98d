//! Owns what the placement asks of this shard's load: the windows that are kept.
use crate::load::{Counts, LoadCounters};
use actix::{Actor, Context, Handler, Message, MessageResult};
use std::collections::VecDeque;
use std::sync::Arc;

/// The actor's state; a restart begins with no windows.
pub struct ShardControl {
    counters: Arc<LoadCounters>,
    /// Those that ended, oldest first.
    ended: VecDeque<Counts>,
    /// Windows that are kept, the running one included.
    window_limit: usize,
    running: Counts,
}

impl ShardControl {
    /// Fresh state over the shard's counters.
    pub fn new(counters: Arc<LoadCounters>, window_limit: usize) -> Self {
        Self { counters, ended: VecDeque::new(), window_limit, running: Counts::new() }
    }

    fn load(&mut self) -> Counts {
        add(&mut self.running, &self.counters.take());
        let mut load = self.running.clone();
        self.ended.iter().for_each(|counts| add(&mut load, counts));
        load
    }
}

fn add(sums: &mut Counts, counts: &Counts) {
    for (layer, counts) in counts {
        let sums = sums.entry(*layer).or_insert_with(|| vec![0; counts.len()]);
        sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }
}

impl Actor for ShardControl {
    type Context = Context<Self>;
}

/// Tokens by layer and expert over the windows that are kept, the running one included.
#[derive(Message)]
#[rtype(result = "Counts")]
pub struct TakeLoad;

impl Handler<TakeLoad> for ShardControl {
    type Result = MessageResult<TakeLoad>;

    fn handle(&mut self, _: TakeLoad, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.load())
    }
}

/// The same; the next window starts.
#[derive(Message)]
#[rtype(result = "Counts")]
pub struct EndWindow;

impl Handler<EndWindow> for ShardControl {
    type Result = MessageResult<EndWindow>;

    fn handle(&mut self, _: EndWindow, _: &mut Context<Self>) -> Self::Result {
        let load = self.load();
        self.ended.push_back(std::mem::take(&mut self.running));
        while self.ended.len() >= self.window_limit {
            self.ended.pop_front();
        }
        MessageResult(load)
    }
}
