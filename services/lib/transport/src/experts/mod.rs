//! Experts in other processes: a layer's tokens go to the shards that the placement names, and come back summed.
//!
//! A token's sum is that of its groups, ascending, and in a group of its ranks, ascending: it is the same in every batch.
mod link;
mod plan;
mod view;

use crate::channel::{MAX_MESSAGE, payload};
use crate::membership::Directory;
use crate::placement::Placements;
use crate::pulse::PULSE_EVERY;
use link::Link;
use metrics::{counter, histogram};
use moesaic_proto::expert::v1::compute_response::Outcome;
use moesaic_proto::expert::v1::{ComputeRequest, ComputeResponse};
use moesaic_proto::{WireDType, decode_tensor, encode_tensor, put_routing};
use moesaic_telemetry::metrics as names;
use moesaic_types::{Digest, Error, ErrorCode, Result, Routing};
use plan::Part;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use view::{Reach, View};

/// How experts are reached.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertsOptions {
    /// How tokens travel to shards.
    pub activations: WireDType,
    /// How sums travel back.
    pub outputs: WireDType,
    /// Longest wait for a layer.
    pub timeout: Duration,
    /// A shard of which nothing came for so long hangs or is cut off: its copies are asked. Some times
    /// [`PULSE_EVERY`].
    pub silence: Duration,
    /// The largest message, in bytes: what is longer than it, or than
    /// [`MAX_PIECE`](crate::channel::MAX_PIECE), is sent as several.
    pub max_message: usize,
    /// Longest wait for a placement that a shard follows already, or for a lost shard's replica.
    pub patience: Duration,
}

impl Default for ExpertsOptions {
    fn default() -> Self {
        let (timeout, silence) = (Duration::from_secs(30), Duration::from_millis(1500));
        let (activations, outputs) = (WireDType::F32, WireDType::F32);
        Self { activations, outputs, timeout, silence, max_message: MAX_MESSAGE, patience: Duration::from_secs(1) }
    }
}

impl ExpertsOptions {
    /// Cuts parts whose request or answer would be above the limit of a piece.
    fn fit(&self, parts: Vec<Part>, hidden: usize) -> Vec<Part> {
        let room = payload(self.max_message);
        let row = self.activations.row_bytes(hidden).max(self.outputs.row_bytes(hidden));
        let (offset, choice) = (size_of::<u32>(), size_of::<u32>() + size_of::<f32>());
        parts.into_iter().flat_map(|part| plan::fit(part, room, row + offset, choice)).collect()
    }
}

/// The experts of one model, wherever they are.
#[derive(Debug)]
pub struct RemoteExperts {
    options: ExpertsOptions,
    /// Tells who follows the placement that a shard is at a later one.
    outdated: Arc<Notify>,
    view: watch::Receiver<Arc<View>>,
    /// Counts changes of the view and of its streams.
    changes: watch::Receiver<u64>,
    runtime: Handle,
    task: AbortHandle,
    /// Grows while somebody waits, for not longer than may be waited.
    waits: AtomicU64,
}

impl Drop for RemoteExperts {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl RemoteExperts {
    /// Follows the shards of `model` that the directory shows, and the placement. Call it in a runtime.
    pub fn start(directory: Directory, placement: Placements, model: Digest, options: ExpertsOptions) -> Arc<Self> {
        let (changed, changes) = watch::channel(0);
        let (told, view) = watch::channel(Arc::default());
        let Placements { latest, outdated } = placement;
        let following = view::follow(directory, latest, model, options.clone(), changed, told);
        let task = tokio::spawn(following).abort_handle();
        Arc::new(Self { options, outdated, view, changes, runtime: Handle::current(), task, waits: AtomicU64::new(0) })
    }

    /// Whether every expert of the placement can be asked now.
    ///
    /// # Errors
    /// `Unavailable` naming what is missing.
    pub fn ready(&self) -> Result<()> {
        let view = self.view.borrow().clone();
        let placement = view.placement.as_ref().ok_or_else(no_placement)?;
        let reach = view.reach();
        for (layer, holders) in &placement.layers {
            if let Some(expert) = holders.iter().position(|groups| !groups.iter().any(|group| reach.has(*group))) {
                return Err(unreached(*layer, expert, &holders[expert], &reach));
            }
        }
        Ok(())
    }

    /// Grows while layers are waited for: who waits does not hang, since each wait has an end.
    pub fn advanced(&self) -> u64 {
        self.waits.load(Ordering::Relaxed)
    }

    /// Waits until every expert can be asked. Cancel-safe.
    pub async fn reached(&self) {
        let mut changes = self.changes.clone();
        loop {
            changes.borrow_and_update();
            if self.ready().is_ok() || changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Sends tokens `x` `[tokens, hidden]` of a layer to their experts. Neither this nor [`Dispatched::wait`] may be
    /// called on a thread of the runtime.
    pub fn dispatch(self: &Arc<Self>, layer: usize, x: Vec<f32>, hidden: usize, routing: &Routing) -> Dispatched {
        let tokens = Tokens { layer, x, hidden, routing: routing.clone() };
        let traceparent = moesaic_telemetry::propagation::current_traceparent().unwrap_or_default();
        let attempt = self.attempt(&tokens, &traceparent, false);
        Dispatched { experts: Arc::clone(self), tokens, traceparent, attempt, begun: Instant::now() }
    }

    /// Sends every part.
    fn attempt(&self, tokens: &Tokens, traceparent: &str, is_again: bool) -> Attempt {
        let changes = *self.changes.borrow();
        Attempt { changes, sent: self.send(tokens, traceparent, is_again) }
    }

    fn send(&self, tokens: &Tokens, traceparent: &str, is_again: bool) -> Result<Sent> {
        let view = self.view.borrow().clone();
        let placement = view.placement.as_ref().ok_or_else(no_placement)?;
        let holders = placement.layers.get(&tokens.layer).ok_or_else(|| {
            Error::unavailable(format!("placement {} does not have layer {}", placement.epoch, tokens.layer))
        })?;
        let reach = view.reach();
        let cut = plan::cut(&tokens.routing, holders, |group| reach.has(group)).map_err(|expert| {
            let groups = holders.get(expert as usize).map_or(&[][..], |groups| groups);
            unreached(tokens.layer, expert as usize, groups, &reach)
        })?;
        let parts = self.options.fit(cut, tokens.hidden);
        let (sender, answers) = mpsc::channel();
        let mut replies = Vec::new();
        for (at, part) in parts.iter().enumerate() {
            let request = self.request(tokens, part, placement.epoch, traceparent);
            let request = ComputeRequest { is_again, ..request };
            for link in reach.group(part.group)? {
                let (sender, place) = (sender.clone(), replies.len());
                replies.push((at, Arc::clone(link)));
                // who waits may have given up
                let waiter = move |answer| drop(sender.send((place, answer)));
                link.send(request.clone(), Box::new(waiter));
            }
        }
        Ok(Sent { parts, epoch: placement.epoch, replies, answers })
    }

    fn request(&self, tokens: &Tokens, part: &Part, epoch: u64, traceparent: &str) -> ComputeRequest {
        let Tokens { layer, x, hidden, .. } = tokens;
        let rows = part.tokens.iter().map(|token| &x[*token as usize * hidden..][..*hidden]);
        let x = encode_tensor(rows, *hidden, self.options.activations);
        counter!(names::EXPERT_SENT_BYTES_TOTAL).increment(x.data.len() as u64);
        let mut request = ComputeRequest {
            epoch,
            layer: *layer as u32,
            x: Some(x),
            reply_dtype: moesaic_proto::tensor::v1::DType::from(self.options.outputs).into(),
            traceparent: traceparent.to_owned(),
            ..Default::default()
        };
        put_routing(&mut request, &part.routing);
        request
    }

    /// Waits until the view is another than that of `attempt`, or `patience` is over; whether it is.
    fn changed(&self, since: u64, patience: Duration) -> bool {
        let mut changes = self.changes.clone();
        let ends = Instant::now() + patience;
        loop {
            self.waits.fetch_add(1, Ordering::Relaxed);
            let pause = ends.saturating_duration_since(Instant::now()).min(PULSE_EVERY);
            let changed = async { tokio::time::timeout(pause, changes.wait_for(|count| *count != since)).await };
            match self.runtime.block_on(changed) {
                Ok(changed) => return changed.is_ok(),
                Err(_) if Instant::now() >= ends => return false,
                Err(_) => {}
            }
        }
    }
}

fn unreached(layer: usize, expert: usize, groups: &[usize], reach: &Reach) -> Error {
    let reasons = groups.iter().filter_map(|group| reach.group(*group).err()).map(|error| error.to_string());
    let reasons: Vec<_> = reasons.collect();
    Error::unavailable(format!("expert {expert} of layer {layer}: {}", reasons.join("; ")))
}

fn no_placement() -> Error {
    Error::unavailable("the experts are not placed yet: no router leads, or no shard has registered")
}

/// A layer's tokens.
#[derive(Debug)]
struct Tokens {
    layer: usize,
    /// `[tokens, hidden]`.
    x: Vec<f32>,
    hidden: usize,
    routing: Routing,
}

/// One sending of a layer.
#[derive(Debug)]
struct Attempt {
    /// The changes that it knew of.
    changes: u64,
    sent: Result<Sent>,
}

/// Parts that are under way.
#[derive(Debug)]
struct Sent {
    parts: Vec<Part>,
    epoch: u64,
    /// The part of each answer and who gives it, by group and rank.
    replies: Vec<(usize, Arc<Link>)>,
    answers: mpsc::Receiver<(usize, Result<ComputeResponse>)>,
}

/// A failure, and what would help.
struct Failure {
    error: Error,
    /// Others can be asked at once: the shard does not have its experts yet.
    is_behind: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, is_behind: false }
    }
}

/// A layer that is under way.
#[derive(Debug)]
pub struct Dispatched {
    experts: Arc<RemoteExperts>,
    tokens: Tokens,
    traceparent: String,
    attempt: Attempt,
    begun: Instant,
}

/// Sendings of one layer at most; then the step fails, and is run again by who runs it.
const ATTEMPTS: usize = 3;

impl Dispatched {
    /// The weighted sums `[tokens, hidden]`.
    ///
    /// # Errors
    /// `Unavailable` when experts cannot be reached, also under a view that comes while it waits.
    pub fn wait(mut self) -> Result<Vec<f32>> {
        let deadline = self.begun + self.experts.options.timeout;
        for attempt in 1.. {
            let failure = match self.attempt.sent {
                Ok(sent) => match sent.collect(&self.tokens, deadline, &self.experts) {
                    Ok(output) => {
                        histogram!(names::EXPERT_ROUND_TRIP_SECONDS).record(self.begun.elapsed().as_secs_f64());
                        return Ok(output);
                    }
                    Err(failure) => failure,
                },
                Err(error) => error.into(),
            };
            let patience = self.experts.options.patience.min(deadline.saturating_duration_since(Instant::now()));
            let is_final = attempt == ATTEMPTS || failure.error.code != ErrorCode::Unavailable;
            if is_final || !(failure.is_behind || self.experts.changed(self.attempt.changes, patience)) {
                return Err(failure.error);
            }
            counter!(names::EXPERT_RETRIES_TOTAL).increment(1);
            tracing::debug!(error = %failure.error, "send a layer again");
            self.attempt = self.experts.attempt(&self.tokens, &self.traceparent, true);
        }
        unreachable!("the last attempt returns")
    }
}

impl Sent {
    /// Awaits all answers and adds them up.
    fn collect(self, tokens: &Tokens, deadline: Instant, experts: &RemoteExperts) -> Result<Vec<f32>, Failure> {
        let mut outputs: Vec<Option<Vec<f32>>> = vec![None; self.replies.len()];
        for _ in 0..self.replies.len() {
            let (place, answer) = self.next(deadline, &experts.waits).ok_or_else(|| {
                Error::unavailable(format!("the experts of layer {} did not answer in time", tokens.layer))
            })?;
            let (at, link) = &self.replies[place];
            let answer = answer?;
            if answer.epoch > self.epoch {
                experts.outdated.notify_one();
            }
            outputs[place] = Some(self.open(answer, &self.parts[*at], link, tokens.hidden)?);
        }
        let mut sums = vec![0.0; tokens.x.len()];
        for (output, (at, _)) in outputs.into_iter().flatten().zip(&self.replies) {
            for (row, token) in output.chunks_exact(tokens.hidden).zip(&self.parts[*at].tokens) {
                let sum = &mut sums[*token as usize * tokens.hidden..][..tokens.hidden];
                sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
            }
        }
        Ok(sums)
    }

    /// The next answer by the deadline.
    fn next(&self, deadline: Instant, waits: &AtomicU64) -> Option<(usize, Result<ComputeResponse>)> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.answers.recv_timeout(left.min(PULSE_EVERY)) {
                Ok(answer) => return Some(answer),
                Err(RecvTimeoutError::Timeout) if !left.is_zero() => waits.fetch_add(1, Ordering::Relaxed),
                Err(_) => return None,
            };
        }
    }

    fn open(&self, answer: ComputeResponse, part: &Part, link: &Link, hidden: usize) -> Result<Vec<f32>, Failure> {
        match answer.outcome {
            Some(Outcome::Output(output)) => {
                counter!(names::EXPERT_RECEIVED_BYTES_TOTAL).increment(output.data.len() as u64);
                let values = decode_tensor("output", &output, hidden)?;
                if values.len() != part.tokens.len() * hidden {
                    let (got, expected) = (values.len() / hidden, part.tokens.len());
                    return Err(Error::internal(format!("a shard answers {got} of {expected} tokens")).into());
                }
                Ok(values)
            }
            Some(Outcome::Error(error)) => {
                let is_behind = answer.epoch < self.epoch;
                if is_behind {
                    link.set_behind(self.epoch);
                }
                Err(Failure { error: error.into(), is_behind })
            }
            Some(Outcome::Pulse(_)) | None => Err(Error::internal("a shard's answer has no outcome").into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::MAX_PIECE;

    #[test]
    fn a_large_request_or_answer_travels_in_pieces_that_a_slow_link_passes() {
        const TOKENS: u32 = 4096;
        let hidden = 2048;
        let part = || {
            let mut routing = Routing::new();
            (0..TOKENS).for_each(|token| routing.push([(token % 8, 0.5), (8 + token % 8, 0.5)]));
            Part { group: 1, tokens: (0..TOKENS).collect(), routing }
        };
        let (wide, narrow) = (WireDType::F32, WireDType::Bf16);
        for (activations, outputs) in [(wide, narrow), (narrow, wide), (narrow, narrow)] {
            let options = ExpertsOptions { activations, outputs, ..ExpertsOptions::default() };
            let bytes = |part: &Part, dtype: WireDType| {
                dtype.row_bytes(hidden) * part.tokens.len() + 8 * part.routing.experts.len() + 4 * part.tokens.len()
            };
            assert!(bytes(&part(), narrow) > 3 * MAX_PIECE, "it is large");
            let pieces = options.fit(vec![part()], hidden);
            let largest = pieces.iter().map(|piece| bytes(piece, activations).max(bytes(piece, outputs))).max();
            assert!(largest.is_some_and(|bytes| bytes <= MAX_PIECE && bytes > MAX_PIECE / 2), "{largest:?}");
            let tokens = pieces.iter().flat_map(|piece| piece.tokens.iter().copied());
            assert!(tokens.eq(0..TOKENS), "every token travels once, in order");
        }
        let small = ExpertsOptions { max_message: MAX_PIECE / 4, ..ExpertsOptions::default() };
        let most = small.fit(vec![part()], hidden).iter().map(|piece| piece.tokens.len()).max();
        assert!(most.is_some_and(|tokens| tokens * 4 * hidden < MAX_PIECE / 4), "a lower limit holds as well");
    }
}
