//! The line of requests that wait for a replica with room: who is next. Plain data; the clock is the caller's.
//!
//! Higher priorities go first. Within one, tenants share by start-time fair queueing (Goyal, Vin, Cheng 1996): each
//! tenant's next request has a start tag, the lowest goes next, and it moves its tenant's next tag on by what it costs,
//! in tokens of its prompt and of a common answer. A tenant that was away begins at the tag that was served last: it has
//! saved nothing up, and waits behind no more than one request of each other tenant. Within a tenant it is first come,
//! first served. A priority of which nobody was taken for a while has one taken before all others, so that none starves.
//!
//! Where the line is full, a newcomer [displaces](Queue::displace) the newest request of whoever has the most in the lowest
//! priority, so that nobody can keep all others out of it.
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
    /// The tenants with a request in line.
    present: Present,
    /// The tag that was served last.
    now: u64,
    /// When a request was last taken, or the first one came.
    served: Instant,
}

/// Tenants with a request in line, in two orders.
#[derive(Debug, Default)]
struct Present {
    /// By their tag, then by when their first one came.
    heads: BTreeSet<(u64, u64, TenantId)>,
    /// By how many they have in line, then by when their last one came.
    sizes: BTreeSet<(usize, u64, TenantId)>,
}

impl Present {
    fn add<T>(&mut self, tenant: TenantId, lane: &Lane<T>) {
        if !lane.waiting.is_empty() {
            self.heads.insert(lane.head(tenant));
            self.sizes.insert(lane.size(tenant));
        }
    }

    /// Before a lane changes, in whatever way.
    fn remove<T>(&mut self, tenant: TenantId, lane: &Lane<T>) {
        self.heads.remove(&lane.head(tenant));
        self.sizes.remove(&lane.size(tenant));
    }
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

    /// Takes the request out that gives its place to a newcomer where there is none left: the newest of the tenant that
    /// has the most in the lowest priority. `None` where the newcomer has no better right to the place: its priority is
    /// lower, or the same and its tenant would then have as many in line as the other.
    pub fn displace(&mut self, tenant: TenantId, priority: Priority) -> Option<Waiting<T>> {
        let (lowest, class) = self.classes.iter_mut().next_back()?;
        let lowest = *lowest;
        let (most, _, whose) = *class.present.sizes.last()?;
        let own = class.tenants.get(&tenant).map_or(0, |lane| lane.waiting.len());
        if priority < lowest.0 || (priority == lowest.0 && own + 1 >= most) {
            return None;
        }
        let lane = class.tenants.get_mut(&whose)?;
        class.present.remove(whose, lane);
        let displaced = lane.waiting.pop_back();
        class.present.add(whose, lane);
        self.len -= usize::from(displaced.is_some());
        self.drop_if_empty(lowest);
        displaced
    }

    /// Takes out the requests for which `is_gone` holds, in no order.
    pub fn remove(&mut self, mut is_gone: impl FnMut(&Waiting<T>) -> bool) -> Vec<Waiting<T>> {
        let mut gone = Vec::new();
        for class in self.classes.values_mut() {
            class.remove(&mut is_gone, &mut gone);
        }
        self.len -= gone.len();
        self.classes.retain(|_, class| !class.present.heads.is_empty());
        gone
    }

    fn drop_if_empty(&mut self, priority: Reverse<Priority>) {
        if self.classes.get(&priority).is_some_and(|class| class.present.heads.is_empty()) {
            self.classes.remove(&priority);
        }
    }
}

impl<T> Class<T> {
    fn new(now: Instant) -> Self {
        Self { tenants: HashMap::new(), present: Present::default(), now: 0, served: now }
    }

    fn insert(&mut self, waiting: Waiting<T>) {
        let tenant = waiting.tenant;
        let now = self.now;
        let lane = self.tenants.entry(tenant).or_insert_with(|| Lane { waiting: VecDeque::new(), start: now });
        if lane.waiting.is_empty() {
            // one that was away has saved nothing up
            lane.start = lane.start.max(now);
        }
        self.present.remove(tenant, lane);
        let at = lane.waiting.partition_point(|before| before.arrival < waiting.arrival);
        lane.waiting.insert(at, waiting);
        self.present.add(tenant, lane);
        self.forget_idle();
    }

    fn take(&mut self, may: &mut impl FnMut(&T) -> bool) -> Option<Waiting<T>> {
        let found = self.present.heads.iter().find_map(|(_, _, tenant)| {
            let lane = self.tenants.get(tenant)?;
            Some((*tenant, lane.waiting.iter().position(|waiting| may(&waiting.request))?))
        });
        let (tenant, at) = found?;
        let lane = self.tenants.get_mut(&tenant)?;
        self.present.remove(tenant, lane);
        let mut taken = lane.waiting.remove(at)?;
        taken.start = lane.start;
        self.present.add(tenant, lane);
        Some(taken)
    }

    fn charge(&mut self, taken: &Waiting<T>, now: Instant) {
        self.served = now;
        self.now = self.now.max(taken.start);
        // its tenant's lane may be gone and come again since it was taken
        let lane =
            self.tenants.entry(taken.tenant).or_insert_with(|| Lane { waiting: VecDeque::new(), start: taken.start });
        self.present.remove(taken.tenant, lane);
        lane.start = lane.start.max(taken.start).saturating_add(taken.cost.max(1));
        self.present.add(taken.tenant, lane);
        self.forget_idle();
    }

    fn remove(&mut self, is_gone: &mut impl FnMut(&Waiting<T>) -> bool, gone: &mut Vec<Waiting<T>>) {
        for (tenant, lane) in &mut self.tenants {
            if !lane.waiting.iter().any(&mut *is_gone) {
                continue;
            }
            self.present.remove(*tenant, lane);
            let (left, stay): (VecDeque<_>, VecDeque<_>) = lane.waiting.drain(..).partition(&mut *is_gone);
            lane.waiting = stay;
            gone.extend(left);
            self.present.add(*tenant, lane);
        }
    }

    /// A tenant without a request is remembered as long as it is ahead of the others, and they are not too many.
    fn forget_idle(&mut self) {
        let limit = 2 * self.present.heads.len() + IDLE_TENANTS;
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
    fn head(&self, tenant: TenantId) -> (u64, u64, TenantId) {
        (self.start, self.waiting.front().map_or(0, |first| first.arrival), tenant)
    }

    fn size(&self, tenant: TenantId) -> (usize, u64, TenantId) {
        (self.waiting.len(), self.waiting.back().map_or(0, |last| last.arrival), tenant)
    }
}
