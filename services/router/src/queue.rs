//! The line of requests that wait for a replica with room: who is next. Plain data; the clock is the caller's.
//!
//! Higher priorities go first. Within one, tenants share by start-time fair queueing (Goyal, Vin, Cheng 1996): each
//! tenant's next request has a start tag, the lowest goes next, and it moves its tenant's next tag on by what it costs,
//! in tokens. A tenant that was away begins at the tag that was served last: it has saved nothing up, and waits behind
//! no more than one request of each other tenant. Within a tenant it is first come, first served. A priority of which
//! nobody was taken for a while has one taken before all others, so that none starves.
//!
//! Tags are given when a request is at the head of its tenant's line and are moved on when one is [charged](Queue::charge):
//! a request that leaves the line costs its tenant nothing.
use moesaic_types::{Priority, TenantId};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::{Duration, Instant};

#[cfg(test)]
mod tests;

/// Tenants that are remembered without a request in line, beside as many as have one.
const IDLE_TENANTS: usize = 1024;

/// A request in line.
#[derive(Clone, Debug, PartialEq)]
pub struct Waiting<T> {
    /// Whose it is.
    pub tenant: TenantId,
    /// Higher goes first.
    pub priority: Priority,
    /// What it costs its tenant, in tokens.
    pub cost: u64,
    /// Since when it stands in line.
    pub since: Instant,
    /// The request.
    pub request: T,
    arrival: u64,
    start: u64,
}

/// The line.
#[derive(Debug)]
pub struct Queue<T> {
    classes: BTreeMap<Reverse<Priority>, Class<T>>,
    promote_after: Duration,
    len: usize,
    arrivals: u64,
}

/// The requests of one priority.
#[derive(Debug)]
struct Class<T> {
    tenants: HashMap<TenantId, Lane<T>>,
    /// Of each tenant with a request in line: its tag, when its first one came, and which it is.
    heads: BTreeSet<(u64, u64, TenantId)>,
    /// The tag that was served last.
    now: u64,
    /// When a request was last taken, or the first one came.
    served: Instant,
}

/// The requests of a tenant.
#[derive(Debug)]
struct Lane<T> {
    waiting: VecDeque<Waiting<T>>,
    /// Its next request's tag.
    start: u64,
}

impl<T> Queue<T> {
    /// An empty line. A priority of which nobody was taken for `promote_after` has one taken before all others.
    pub fn new(promote_after: Duration) -> Self {
        Self { classes: BTreeMap::new(), promote_after, len: 0, arrivals: 0 }
    }

    /// Requests in line.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Puts a request at the end of its tenant's line.
    pub fn push(&mut self, tenant: TenantId, priority: Priority, cost: u64, request: T, now: Instant) {
        self.arrivals += 1;
        let waiting = Waiting { tenant, priority, cost, since: now, request, arrival: self.arrivals, start: 0 };
        self.insert(waiting, now);
    }

    /// Puts a request back where it was.
    pub fn put_back(&mut self, waiting: Waiting<T>, now: Instant) {
        self.insert(waiting, now);
    }

    fn insert(&mut self, waiting: Waiting<T>, now: Instant) {
        self.len += 1;
        self.classes.entry(Reverse(waiting.priority)).or_insert_with(|| Class::new(now)).insert(waiting);
    }

    /// Takes the next request for which `may` holds out of the line. Charge it, or put it back.
    pub fn take(&mut self, now: Instant, mut may: impl FnMut(&T) -> bool) -> Option<Waiting<T>> {
        for priority in self.order(now) {
            let Some(class) = self.classes.get_mut(&priority) else { continue };
            if let Some(taken) = class.take(&mut may) {
                self.len -= 1;
                self.drop_if_empty(priority);
                return Some(taken);
            }
        }
        None
    }

    /// The priorities in the order in which they are looked at: those of which nobody was taken for too long, the
    /// longest first, then the others from the highest down.
    fn order(&self, now: Instant) -> Vec<Reverse<Priority>> {
        let (mut starved, rest): (Vec<_>, Vec<_>) = self
            .classes
            .iter()
            .map(|(priority, class)| (class.served, *priority))
            .partition(|(served, _)| now.saturating_duration_since(*served) >= self.promote_after);
        starved.sort_by_key(|(served, _)| *served);
        starved.into_iter().chain(rest).map(|(_, priority)| priority).collect()
    }

    /// A request that was taken goes where it wanted: its tenant pays for it.
    pub fn charge(&mut self, taken: &Waiting<T>, now: Instant) {
        // where nobody of this priority waits any longer, nobody is wronged
        if let Some(class) = self.classes.get_mut(&Reverse(taken.priority)) {
            class.charge(taken, now);
        }
    }

    /// Takes out the requests for which `is_gone` holds, in no order.
    pub fn remove(&mut self, mut is_gone: impl FnMut(&Waiting<T>) -> bool) -> Vec<Waiting<T>> {
        let mut gone = Vec::new();
        for class in self.classes.values_mut() {
            class.remove(&mut is_gone, &mut gone);
        }
        self.len -= gone.len();
        self.classes.retain(|_, class| !class.heads.is_empty());
        gone
    }

    fn drop_if_empty(&mut self, priority: Reverse<Priority>) {
        if self.classes.get(&priority).is_some_and(|class| class.heads.is_empty()) {
            self.classes.remove(&priority);
        }
    }
}

impl<T> Class<T> {
    fn new(now: Instant) -> Self {
        Self { tenants: HashMap::new(), heads: BTreeSet::new(), now: 0, served: now }
    }

    fn insert(&mut self, waiting: Waiting<T>) {
        let tenant = waiting.tenant;
        let now = self.now;
        let lane = self.tenants.entry(tenant).or_insert_with(|| Lane { waiting: VecDeque::new(), start: now });
        if lane.waiting.is_empty() {
            // one that was away has saved nothing up
            lane.start = lane.start.max(now);
        } else {
            self.heads.remove(&lane.key(tenant));
        }
        let at = lane.waiting.partition_point(|before| before.arrival < waiting.arrival);
        lane.waiting.insert(at, waiting);
        self.heads.insert(lane.key(tenant));
        self.forget_idle();
    }

    fn take(&mut self, may: &mut impl FnMut(&T) -> bool) -> Option<Waiting<T>> {
        let found = self.heads.iter().find_map(|(_, _, tenant)| {
            let lane = self.tenants.get(tenant)?;
            Some((*tenant, lane.waiting.iter().position(|waiting| may(&waiting.request))?))
        });
        let (tenant, at) = found?;
        let lane = self.tenants.get_mut(&tenant)?;
        self.heads.remove(&lane.key(tenant));
        let mut taken = lane.waiting.remove(at)?;
        taken.start = lane.start;
        if !lane.waiting.is_empty() {
            self.heads.insert(lane.key(tenant));
        }
        Some(taken)
    }

    fn charge(&mut self, taken: &Waiting<T>, now: Instant) {
        self.served = now;
        self.now = self.now.max(taken.start);
        // its tenant's lane may be gone and come again since it was taken
        let lane =
            self.tenants.entry(taken.tenant).or_insert_with(|| Lane { waiting: VecDeque::new(), start: taken.start });
        self.heads.remove(&lane.key(taken.tenant));
        lane.start = lane.start.max(taken.start).saturating_add(taken.cost.max(1));
        if !lane.waiting.is_empty() {
            self.heads.insert(lane.key(taken.tenant));
        }
        self.forget_idle();
    }

    fn remove(&mut self, is_gone: &mut impl FnMut(&Waiting<T>) -> bool, gone: &mut Vec<Waiting<T>>) {
        for (tenant, lane) in &mut self.tenants {
            if !lane.waiting.iter().any(&mut *is_gone) {
                continue;
            }
            self.heads.remove(&lane.key(*tenant));
            let (left, stay): (VecDeque<_>, VecDeque<_>) = lane.waiting.drain(..).partition(&mut *is_gone);
            lane.waiting = stay;
            gone.extend(left);
            if !lane.waiting.is_empty() {
                self.heads.insert(lane.key(*tenant));
            }
        }
    }

    /// A tenant without a request is remembered as long as it is ahead of the others, and they are not too many.
    fn forget_idle(&mut self) {
        let limit = 2 * self.heads.len() + IDLE_TENANTS;
        if self.tenants.len() <= limit {
            return;
        }
        let now = self.now;
        self.tenants.retain(|_, lane| !lane.waiting.is_empty() || lane.start > now);
        if self.tenants.len() > limit / 2 {
            self.tenants.retain(|_, lane| !lane.waiting.is_empty());
        }
    }
}

impl<T> Lane<T> {
    fn key(&self, tenant: TenantId) -> (u64, u64, TenantId) {
        (self.start, self.waiting.front().map_or(0, |first| first.arrival), tenant)
    }
}
