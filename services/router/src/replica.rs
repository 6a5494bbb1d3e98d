//! What is known of one replica. Plain data; the clock is the caller's.
use crate::breaker::Breaker;
use crate::policy::Fresh;
use moesaic_types::boundary::ReplicaLoad;
use moesaic_types::{Digest, Error, Result, TokenId};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How long a request may be on its way from the router's decision, by the gateway, to the replica's count: a load that
/// was told earlier than that after a decision does not count the request yet.
pub const TRANSIT: Duration = Duration::from_millis(50);

/// How long a placement is remembered that no load has counted: longer than a load is ever asked for anew, so that this
/// bounds only what is remembered of a replica that is not heard.
pub const REMEMBERED: Duration = Duration::from_secs(65);

/// What is known of a replica.
#[derive(Debug)]
pub struct Entry {
    /// The model that it serves, as it serves it; `None`: whatever is asked for.
    pub model: Option<Digest>,
    /// What it said last.
    pub state: State,
    /// What was placed there and may not be in its load yet.
    pub recent: Recent,
    /// How its canaries went.
    pub check: Check,
    breaker: Breaker,
    /// Canaries are sent: without them it could never show that it works again.
    has_canaries: bool,
    /// It refused a request for want of room, then.
    full_since: Option<Instant>,
}

/// What a replica said last.
#[derive(Clone, Debug, PartialEq)]
pub enum State {
    /// Nothing yet: it is taken for ready, since a request that it refuses goes elsewhere.
    Unknown,
    /// Its load.
    Ready(ReplicaLoad),
    /// It failed, or said that it is not ready.
    Failed(Error),
}

/// Requests that were placed a moment ago, by this router or another.
#[derive(Debug, Default)]
pub struct Recent {
    placed: VecDeque<(Instant, usize)>,
    blocks: usize,
}

impl Recent {
    /// A request that needs so many blocks was placed. What nobody has counted for long is forgotten.
    pub fn add(&mut self, now: Instant, blocks: usize) {
        self.forget(|at| now.saturating_duration_since(at) >= REMEMBERED);
        self.placed.push_back((now, blocks));
        self.blocks += blocks;
    }

    /// The latest of them does not come after all.
    pub fn take_back(&mut self) {
        if let Some((_, blocks)) = self.placed.pop_back() {
            self.blocks -= blocks;
        }
    }

    /// A load told at this time counts those that had arrived by then.
    fn counted_at(&mut self, told: Instant) {
        self.forget(|at| at + TRANSIT <= told);
    }

    fn forget(&mut self, is_over: impl Fn(Instant) -> bool) {
        while let Some((_, blocks)) = self.placed.pop_front_if(|(at, _)| is_over(*at)) {
            self.blocks -= blocks;
        }
    }

    /// Their number and blocks.
    pub fn fresh(&self) -> Fresh {
        Fresh { requests: self.placed.len(), blocks: self.blocks }
    }
}

/// How a replica's canaries went.
#[derive(Debug, Default)]
pub struct Check {
    /// One came through, or it was seen at work.
    pub is_proven: bool,
    /// One must come through before requests go there again.
    pub is_required: bool,
    /// One is on its way.
    pub is_running: bool,
    /// That one was sent before it was known that one must come through.
    pub is_outdated: bool,
    /// When it was last known to work.
    pub last: Option<Instant>,
    /// What the last one answered.
    pub token: Option<TokenId>,
}

impl Check {
    /// Another canary has to come through before requests go there, where canaries are sent; one that is under way was
    /// sent before this was known, and shows nothing.
    fn require(&mut self, has_canaries: bool) {
        self.is_required = has_canaries;
        self.is_outdated = self.is_running;
    }

    /// The replica works.
    pub fn works(&mut self, now: Instant) {
        self.is_proven = true;
        self.last = Some(now);
    }
}

const NO_LOAD: &ReplicaLoad =
    &ReplicaLoad { running: 0, waiting: 0, kv_blocks_total: 0, kv_blocks_used: 0, max_context: 0, max_running: 0 };

impl Entry {
    /// A replica of which nothing is known. Where canaries are sent, one that was left alone takes requests again only
    /// after one came through.
    pub fn new(model: Option<Digest>, breaker: Breaker, has_canaries: bool) -> Self {
        let (state, recent, check) = (State::Unknown, Recent::default(), Check::default());
        Self { model, state, recent, check, breaker, has_canaries, full_since: None }
    }

    /// Whether it may be asked something.
    pub fn may_be_asked(&self, now: Instant) -> bool {
        self.breaker.allows(now)
    }

    /// Whether what it says of itself counts.
    pub fn is_heard(&self, now: Instant) -> bool {
        matches!(self.state, State::Ready(_)) && self.breaker.allows(now)
    }

    /// Whether requests may go there.
    pub fn is_ready(&self, now: Instant) -> bool {
        !matches!(self.state, State::Failed(_)) && self.breaker.allows(now) && !self.check.is_required
    }

    /// Whether it serves this model.
    pub fn serves(&self, model: Option<Digest>) -> bool {
        self.model.zip(model).is_none_or(|(own, asked)| own == asked)
    }

    /// Its load; nothing, without limits, where it is not known.
    pub fn load(&self) -> &ReplicaLoad {
        match &self.state {
            State::Ready(load) => load,
            State::Unknown | State::Failed(_) => NO_LOAD,
        }
    }

    /// How many requests of so many blocks it can take; see [`policy::room`](crate::policy::room).
    pub fn room(&self, blocks: usize, ahead: usize) -> usize {
        match self.full_since {
            Some(_) => 0,
            None => crate::policy::room(self.load(), self.recent.fresh(), blocks, ahead),
        }
    }

    /// Nothing runs or waits there, as far as is known.
    pub fn is_idle(&self) -> bool {
        let load = self.load();
        load.running + load.waiting + self.recent.fresh().requests == 0
    }

    /// It refused a request for want of room.
    pub fn was_full(&mut self, now: Instant) {
        self.full_since = Some(now);
    }

    /// It told its load at this time, or failed to; whether it is another state than before.
    pub fn heard(&mut self, load: Result<ReplicaLoad>, told: Instant, now: Instant) -> bool {
        match load {
            Ok(load) => {
                let was_failed = matches!(self.state, State::Failed(_));
                self.breaker.succeeded(now);
                self.recent.counted_at(told);
                self.full_since = self.full_since.filter(|since| *since >= told);
                if load.running > 0 {
                    // it works for somebody
                    self.check.works(now);
                }
                self.state = State::Ready(load);
                was_failed
            }
            Err(error) => {
                let was_ready = !matches!(self.state, State::Failed(_));
                self.state = State::Failed(error);
                self.failed(now);
                was_ready
            }
        }
    }

    /// It works, as another router found: that is as good as a canary of our own, unless it is to be left alone still.
    pub fn works_elsewhere(&mut self, now: Instant) {
        self.check.works(now);
        self.check.is_required &= !self.breaker.allows(now);
    }

    /// A request or a question failed there.
    pub fn failed(&mut self, now: Instant) {
        self.breaker.failed(now);
        if !self.breaker.allows(now) {
            self.check.require(self.has_canaries);
        }
    }

    /// It is left alone from now on.
    pub fn trip(&mut self, now: Instant) {
        self.breaker.trip(now);
        self.check.require(self.has_canaries);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry {
        Entry::new(None, Breaker::new(2, Duration::from_secs(1)), true)
    }

    fn load(running: usize) -> ReplicaLoad {
        ReplicaLoad { running, max_running: 4, kv_blocks_total: 100, ..ReplicaLoad::default() }
    }

    #[test]
    fn a_request_counts_until_a_load_told_after_it_came() {
        let (mut entry, start) = (entry(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        entry.heard(Ok(load(0)), at(0), at(0));
        entry.recent.add(at(10), 3);
        entry.recent.add(at(40), 4);
        assert_eq!((entry.room(1, 1), entry.recent.fresh()), (3, Fresh { requests: 2, blocks: 7 }));
        entry.heard(Ok(load(0)), at(59), at(100));
        assert_eq!(entry.recent.fresh().requests, 2, "told before the first could have come");
        entry.heard(Ok(load(1)), at(60), at(100));
        assert_eq!((entry.room(1, 1), entry.recent.fresh()), (3, Fresh { requests: 1, blocks: 4 }));
        entry.heard(Ok(load(2)), at(90), at(100));
        assert_eq!((entry.room(1, 1), entry.recent.fresh()), (3, Fresh::default()));
        entry.recent.add(at(101), 5);
        entry.recent.take_back();
        assert_eq!(entry.recent.fresh(), Fresh::default());
    }

    #[test]
    fn what_is_placed_at_one_that_is_not_heard_is_forgotten_in_time() {
        let (mut entry, start) = (entry(), Instant::now());
        for second in 0..1000 {
            entry.recent.add(start + Duration::from_secs(second), 2);
        }
        let requests = REMEMBERED.as_secs() as usize;
        assert_eq!(entry.recent.fresh(), Fresh { requests, blocks: 2 * requests });
    }

    #[test]
    fn one_that_was_full_has_no_room_until_it_speaks_again() {
        let (mut entry, start) = (entry(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        entry.heard(Ok(load(0)), at(0), at(0));
        entry.was_full(at(10));
        assert_eq!(entry.room(1, 1), 0);
        entry.heard(Ok(load(3)), at(9), at(20));
        assert_eq!(entry.room(1, 1), 0, "told before");
        entry.heard(Ok(load(3)), at(11), at(20));
        assert_eq!(entry.room(1, 1), 2);
    }

    #[test]
    fn one_that_was_left_alone_must_prove_itself() {
        let (mut entry, now) = (entry(), Instant::now());
        entry.heard(Ok(load(0)), now, now);
        assert!(entry.is_ready(now) && entry.is_idle() && !entry.check.is_proven);
        entry.failed(now);
        assert!(entry.is_ready(now));
        entry.failed(now);
        let later = now + Duration::from_secs(1);
        assert!(!entry.may_be_asked(now) && entry.may_be_asked(later) && !entry.is_ready(later));
        entry.check.is_required = false;
        assert!(entry.is_ready(later));
        entry.trip(later);
        assert!(!entry.may_be_asked(later + Duration::from_secs(1)), "the pause doubled");
        let last = later + Duration::from_secs(2);
        entry.works_elsewhere(later);
        assert!(!entry.is_ready(last), "it was found before it failed here");
        entry.works_elsewhere(last);
        assert!(entry.is_ready(last));
    }

    #[test]
    fn without_canaries_the_pause_alone_ends_it() {
        let (second, now) = (Duration::from_secs(1), Instant::now());
        let mut entry = Entry::new(None, Breaker::new(2, second), false);
        entry.failed(now);
        entry.failed(now);
        assert!(!entry.is_ready(now) && entry.is_ready(now + second));
        entry.trip(now + second);
        assert!(!entry.is_ready(now + 2 * second) && entry.is_ready(now + 3 * second), "the pause doubled");
    }
}
