//! The replicas, the decisions, and who waits for one with room. Plain data; the clock is the caller's, who also asks
//! replicas and answers requests.
use crate::breaker::Breaker;
use crate::policy::{self, Candidate, Policy, Weights};
use crate::prefixes::Prefixes;
use crate::queue::{Queue, Waiting};
use crate::replica::{Entry, State};
use moesaic_types::boundary::{PlaceRequest, Placed, ReplicaLoad};
use moesaic_types::{BLOCK_TOKENS, Digest, Error, ErrorCode, ReplicaId, Result};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a client is told to wait at least and at most where the line is full.
const RETRY_AFTER: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Tokens of output that a tenant is charged for at most, for each request in line.
pub const COUNTED_OUTPUT: usize = 256;

/// What an operator decides.
#[derive(Clone, Debug)]
pub struct Rules {
    /// How a replica is chosen.
    pub policy: Policy,
    /// What work costs.
    pub weights: Weights,
    /// Requests in line at most; 0: none waits here, they wait at the replicas.
    pub line: usize,
    /// Requests that may wait at a replica that has no place in its batch.
    pub ahead: usize,
    /// How long a request stands in line at most.
    pub line_timeout: Duration,
    /// A priority of which nobody was taken for so long has one taken before all others.
    pub promote_after: Duration,
    /// Failures in a row after which a replica is left alone.
    pub breaker_failures: u32,
    /// How long it is first left alone.
    pub breaker_pause: Duration,
    /// How often a replica without work is sent a canary; `None`: none is sent at all.
    pub canary_interval: Option<Duration>,
}

/// A request in line, and whom to tell.
#[derive(Debug)]
pub struct Pending<R> {
    /// The request.
    pub request: Arc<PlaceRequest>,
    /// Takes the answer.
    pub reply: R,
}

/// What comes of a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// It goes there.
    Placed(Placed),
    /// No replica that could take it has room.
    Wait,
    /// No replica can take it.
    Refused(Error),
}

/// The replicas and the line.
#[derive(Debug)]
pub struct Table<R> {
    rules: Rules,
    replicas: BTreeMap<ReplicaId, Entry>,
    turn: usize,
    line: Queue<Pending<R>>,
    /// How long those waited who were taken last.
    waited: Duration,
    /// How often the replicas were looked through for a request.
    #[cfg(test)]
    looks: std::cell::Cell<usize>,
}

impl<R> Table<R> {
    /// A table without replicas.
    pub fn new(rules: Rules) -> Self {
        let line = Queue::new(rules.promote_after);
        Self {
            rules,
            replicas: BTreeMap::new(),
            turn: 0,
            line,
            waited: Duration::ZERO,
            #[cfg(test)]
            looks: Default::default(),
        }
    }

    /// Adds a replica of which nothing is known.
    pub fn add(&mut self, id: ReplicaId, model: Option<Digest>) {
        let breaker = Breaker::new(self.rules.breaker_failures, self.rules.breaker_pause);
        let has_canaries = self.rules.canary_interval.is_some();
        self.replicas.insert(id, Entry::new(model, breaker, has_canaries));
    }

    /// Takes a replica out.
    pub fn remove(&mut self, id: &ReplicaId) {
        self.replicas.remove(id);
    }

    /// The replicas, by id.
    pub fn replicas(&self) -> &BTreeMap<ReplicaId, Entry> {
        &self.replicas
    }

    /// A replica.
    pub fn replica_mut(&mut self, id: &ReplicaId) -> Option<&mut Entry> {
        self.replicas.get_mut(id)
    }

    /// Requests in line.
    pub fn waiting(&self) -> usize {
        self.line.len()
    }

    /// A replica told its load at this time, or failed to; whether it is in another state than before.
    pub fn heard(&mut self, id: &ReplicaId, load: Result<ReplicaLoad>, told: Instant, now: Instant) -> bool {
        self.replicas.get_mut(id).is_some_and(|entry| entry.heard(load, told, now))
    }

    /// Counts what the request's latest try came to. Once for each request.
    pub fn count_latest(&mut self, request: &PlaceRequest, now: Instant) {
        if let Some(failed) = request.latest_failure() {
            if let Some(entry) = self.replicas.get_mut(failed) {
                entry.failed(now);
            }
        } else if let Some(entry) = request.exclude.last().and_then(|id| self.replicas.get_mut(id)) {
            entry.was_full(now);
        }
    }

    /// Where a request goes now. It is counted there.
    pub fn decide(&mut self, request: &PlaceRequest, prefixes: &Prefixes, now: Instant) -> Decision {
        let picked = self.pick(request, prefixes, now);
        self.turn = self.turn.wrapping_add(1);
        match picked {
            Ok(Some(placed)) => {
                self.count(request, &placed, now);
                Decision::Placed(placed)
            }
            Ok(None) => Decision::Wait,
            Err(error) => Decision::Refused(error),
        }
    }

    fn count(&mut self, request: &PlaceRequest, placed: &Placed, now: Instant) {
        if let Some(entry) = self.replicas.get_mut(&placed.replica) {
            entry.recent.add(now, blocks_of(request).saturating_sub(placed.overlap_blocks));
        }
    }

    /// The best replica for a request; `None` when none of those that could take it has room, an error when there are
    /// none.
    fn pick(&self, request: &PlaceRequest, prefixes: &Prefixes, now: Instant) -> Result<Option<Placed>> {
        #[cfg(test)]
        self.looks.set(self.looks.get() + 1);
        let count = self.replicas.len();
        let (mut ids, mut candidates) = (Vec::with_capacity(count), Vec::with_capacity(count));
        let (line, ahead, blocks) = (self.rules.line, self.rules.ahead, blocks_of(request));
        let has_canaries = self.rules.canary_interval.is_some();
        let mut best = None;
        for (id, entry) in &self.replicas {
            if !self.may_take(request, id, entry, now) {
                continue;
            }
            let (load, fresh) = (entry.load(), entry.recent.fresh());
            // A prompt that fits nowhere goes anywhere: the replica's refusal names the limit. And one that has not shown
            // that it works takes requests where nobody else can.
            let fits = load.max_context == 0 || request.prompt_tokens < load.max_context;
            let rank = Some((fits, !has_canaries || entry.check.is_proven));
            if rank > best {
                best = rank;
                ids.clear();
                candidates.clear();
            }
            if rank == best && (line == 0 || entry.room(blocks, ahead) > 0) {
                ids.push(id);
                candidates.push(Candidate { load, fresh });
            }
        }
        if best.is_none() {
            return Err(self.nobody(&request.exclude, request.model));
        }
        let (Rules { policy, weights, .. }, known) = (&self.rules, |at: usize| prefixes.known(ids[at]));
        let chosen = policy::choose(*policy, weights, request.prompt_tokens, &candidates, known, self.turn);
        Ok(chosen.map(|at| Placed { replica: ids[at].clone(), overlap_blocks: known(at).local }))
    }

    /// Whether a replica takes requests, and this one among them.
    fn may_take(&self, request: &PlaceRequest, id: &ReplicaId, entry: &Entry, now: Instant) -> bool {
        let PlaceRequest { exclude, full, model, .. } = request;
        // who waits may go where there was no room; who does not would find none
        let is_out = || exclude.contains(id) && (self.rules.line == 0 || !full.contains(id));
        entry.is_ready(now) && entry.serves(*model) && (exclude.is_empty() || !is_out())
    }

    fn nobody(&self, exclude: &[ReplicaId], model: Option<Digest>) -> Error {
        let failure = self.replicas.iter().find_map(|(id, entry)| match &entry.state {
            State::Failed(error) => Some(format!("; {id}: {error}")),
            State::Unknown | State::Ready(_) => None,
        });
        let tried = exclude.iter().filter(|id| self.replicas.contains_key(id)).count();
        let others = match self.replicas.values().filter(|entry| !entry.serves(model)).count() {
            0 => String::new(),
            others => format!(", {others} with another model"),
        };
        let (count, failure) = (self.replicas.len(), failure.unwrap_or_default());
        Error::unavailable(format!("no replica is ready ({count} known, {tried} tried{others}){failure}"))
    }

    /// The replicas that requests may go to.
    ///
    /// # Errors
    /// `Unavailable`, with a reason, when there is none.
    pub fn ready(&self, now: Instant) -> Result<Vec<ReplicaId>> {
        let ready = self.replicas.iter().filter(|(_, entry)| entry.is_ready(now)).map(|(id, _)| id.clone());
        Some(ready.collect::<Vec<_>>()).filter(|ready| !ready.is_empty()).ok_or_else(|| self.nobody(&[], None))
    }

    /// Puts a request in line. Where that is full, one of a lower priority or of a tenant that has more there
    /// [makes room](Queue::displace); it is handed back, with what it is told.
    ///
    /// # Errors
    /// `ResourceExhausted` where the line is full of requests that have as good a right to be there, with how long those
    /// waited who were taken last.
    pub fn wait(&mut self, request: Arc<PlaceRequest>, reply: R, now: Instant) -> Result<Option<(R, Error)>> {
        let (tenant, priority) = (request.tenant, request.priority);
        let mut displaced = None;
        if self.line.len() >= self.rules.line {
            let message = format!("the router's line is full: {} requests wait for a replica", self.line.len());
            let retry_after = self.waited.clamp(RETRY_AFTER.0, RETRY_AFTER.1);
            let Some(other) = self.line.displace(tenant, priority) else {
                return Err(Error::exhausted(message, retry_after));
            };
            let message = format!("{message}, and one of a higher priority or of a tenant with fewer came");
            displaced = Some((other.request.reply, Error::exhausted(message, retry_after)));
        }
        self.line.push(tenant, priority, cost_of(&request), Pending { request, reply }, now);
        Ok(displaced)
    }

    /// Takes the next request out of the line for which a replica has room now; [`Self::bind`] it.
    pub fn next(&mut self, now: Instant) -> Option<Waiting<Pending<R>>> {
        if self.line.is_empty() {
            return None;
        }
        let ahead = self.rules.ahead;
        if !self.replicas.values().any(|entry| entry.is_ready(now) && entry.room(0, ahead) > 0) {
            return None;
        }
        // the line is looked through while the replicas are
        let mut line = std::mem::replace(&mut self.line, Queue::new(self.rules.promote_after));
        let mut refusals = Refusals::new(self.replicas.values());
        let next = line.take(now, |Pending { request, .. }| {
            refusals.or_find(request, || matches!(self.pick(request, &Prefixes::default(), now), Ok(Some(_))))
        });
        self.line = line;
        next
    }

    /// Gives a request that was taken to the best replica now, or puts it back. A reply that nobody waits for
    /// (`told` says so) is not counted.
    pub fn bind(
        &mut self,
        waiting: Waiting<Pending<R>>,
        prefixes: &Prefixes,
        now: Instant,
        told: impl FnOnce(R, Placed) -> bool,
    ) -> Option<Placed> {
        let request = Arc::clone(&waiting.request.request);
        let Decision::Placed(placed) = self.decide(&request, prefixes, now) else {
            self.line.put_back(waiting, now);
            return None;
        };
        self.line.charge(&waiting, now);
        self.waited = (self.waited * 7 + now.saturating_duration_since(waiting.since)) / 8;
        if told(waiting.request.reply, placed.clone()) {
            return Some(placed);
        }
        if let Some(entry) = self.replicas.get_mut(&placed.replica) {
            entry.recent.take_back();
        }
        None
    }

    /// Takes those out of the line who wait for nothing any longer, with what they are told: `is_gone` holds for the
    /// reply, their time is over, or no replica can take them.
    pub fn overdue(&mut self, now: Instant, is_gone: impl Fn(&R) -> bool) -> Vec<(R, Option<Error>)> {
        if self.line.is_empty() {
            return Vec::new();
        }
        let mut line = std::mem::replace(&mut self.line, Queue::new(self.rules.promote_after));
        let is_late = |waiting: &Waiting<Pending<R>>| {
            waiting.request.request.deadline.is_some_and(|deadline| deadline <= now)
                || now.saturating_duration_since(waiting.since) >= self.rules.line_timeout
        };
        let is_hopeless =
            |request: &PlaceRequest| !self.replicas.iter().any(|(id, entry)| self.may_take(request, id, entry, now));
        let is_over = |waiting: &Waiting<Pending<R>>| {
            is_gone(&waiting.request.reply) || is_late(waiting) || is_hopeless(&waiting.request.request)
        };
        let over = line.remove(is_over);
        self.line = line;
        let told = |waiting: Waiting<Pending<R>>| {
            let Pending { request, reply } = waiting.request;
            let error = match (is_gone(&reply), request.deadline) {
                (true, _) => None,
                (_, Some(deadline)) if deadline <= now => {
                    Some(Error::new(ErrorCode::DeadlineExceeded, "the deadline passed in the router's line"))
                }
                _ if now.saturating_duration_since(waiting.since) >= self.rules.line_timeout => {
                    let message = format!("no replica had room for {:?}", self.rules.line_timeout);
                    Some(Error::exhausted(message, self.waited.clamp(RETRY_AFTER.0, RETRY_AFTER.1)))
                }
                _ => Some(self.nobody(&request.exclude, request.model)),
            };
            (reply, error)
        };
        over.into_iter().map(told).collect()
    }
}

/// Which requests found no replica with room in one look through the line, so that others like them need not look: for
/// the same model, with a prompt that fits the same replicas, and with as many blocks or more.
struct Refusals {
    /// The contexts of the replicas, ascending.
    limits: Vec<usize>,
    /// By model and number of limits that the prompt is beyond: the fewest blocks for which there was no room.
    fewest: HashMap<(Option<Digest>, usize), usize>,
}

impl Refusals {
    fn new<'a>(replicas: impl Iterator<Item = &'a Entry>) -> Self {
        let mut limits: Vec<usize> = replicas.map(|entry| entry.load().max_context).collect();
        limits.sort_unstable();
        limits.dedup();
        Self { limits, fewest: HashMap::new() }
    }

    /// Whether a replica has room, by what is known of requests like this one or by a look.
    fn or_find(&mut self, request: &PlaceRequest, look: impl FnOnce() -> bool) -> bool {
        if !request.exclude.is_empty() {
            // it may not go where others may
            return look();
        }
        let beyond = self.limits.partition_point(|limit| *limit <= request.prompt_tokens);
        let (like, blocks) = ((request.model, beyond), blocks_of(request));
        if self.fewest.get(&like).is_some_and(|fewest| blocks >= *fewest) {
            return false;
        }
        let is_found = look();
        if !is_found {
            self.fewest.insert(like, blocks);
        }
        is_found
    }
}

/// What a request costs its tenant, in tokens. The router does not hear how long an answer became, and many clients ask
/// for as much as may be: beyond a common answer's length, what may be generated counts for nothing.
fn cost_of(request: &PlaceRequest) -> u64 {
    (request.prompt_tokens + request.max_tokens.min(COUNTED_OUTPUT)) as u64
}

/// Blocks that a request needs. Not all that may be generated will be; a block is what a short answer needs.
pub fn blocks_of(request: &PlaceRequest) -> usize {
    request.prompt_tokens.div_ceil(BLOCK_TOKENS) + request.max_tokens.div_ceil(BLOCK_TOKENS).min(1)
}

#[cfg(test)]
mod tests;
