//! Finds a replica for a choice and hands the choice to it.
use super::answer::Backend;
use super::deadline;
use super::job::Job;
use moesaic_telemetry::{count, propagation};
use moesaic_types::boundary::{DeltaStream, PlaceRequest, Replica};
use moesaic_types::{Error, ErrorCode, GenerateRequest, ReplicaId, RequestId, Result, TokenId};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tracing::{Instrument, Span};

/// A choice at a replica.
pub(super) struct Placed {
    pub(super) replica: ReplicaId,
    pub(super) deltas: DeltaStream,
    at: Arc<dyn Replica>,
    request: RequestId,
    /// Open as long as the replica works on the choice; a later attempt links to it.
    pub(super) attempt: Span,
}

impl Placed {
    /// The client has all that it wants: dropping the stream next is an answer's end, not a cancellation.
    pub(super) fn enough(&self) {
        self.at.enough(&self.request);
    }
}

/// Before replicas are asked again; doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// Tries replicas until one accepts; those that do not are added to `failed`. Where none does, a fresh choice ends. One
/// that lost its replica in an `earlier` attempt waits, for whoever failed may be back soon; what is told in the end is
/// that loss: it says more than that nobody is left.
pub(super) async fn seek(
    backend: &Backend,
    job: &Job,
    index: usize,
    emitted: &[TokenId],
    failed: &mut Vec<ReplicaId>,
    earlier: Option<(&Span, Error)>,
) -> Result<Placed> {
    let patient_until = earlier.as_ref().map(|_| Instant::now() + backend.patience);
    let (mut linked, mut first) = match earlier {
        Some((attempt, error)) => (Some(attempt.clone()), Some(error)),
        None => (None, None),
    };
    let (mut full, mut latest_was_full) = (Vec::new(), false);
    let (mut attempts, mut pause) = (failed.len(), FIRST_PAUSE);
    loop {
        attempts += 1;
        let attempt = tracing::info_span!(
            parent: job.told.span(),
            "attempt",
            moesaic.attempt = count(attempts),
            moesaic.choice = count(index),
            moesaic.replica = tracing::field::Empty,
            moesaic.resumed_tokens = count(emitted.len()),
        );
        if let Some(earlier) = &linked {
            propagation::link(&attempt, earlier);
        }
        let tried = Tried { failed, full: &full, latest_was_full };
        let sent = send(backend, job, index, emitted, tried, attempt.clone()).instrument(attempt.clone());
        match deadline::by(job.deadline, sent).await? {
            Ok(placed) => return Ok(placed),
            Err((Some(replica), error)) if elsewhere(&error) => {
                tracing::warn!(id = %job.id, %replica, %error, "replica refused a request; trying another");
                latest_was_full = error.code == ErrorCode::ResourceExhausted;
                if latest_was_full { &mut full } else { &mut *failed }.push(replica);
                linked = Some(attempt);
                first.get_or_insert(error);
                if failed.len() + full.len() < backend.attempts {
                    continue;
                }
            }
            // what a replica says of a fresh request is about the request
            Err((Some(_), error)) if emitted.is_empty() => return Err(error),
            Err((None, error)) if elsewhere(&error) => {
                first.get_or_insert(error);
            }
            Err((_, error)) => return Err(first.unwrap_or(error)),
        }
        // nobody is left
        if patient_until.is_none_or(|until| Instant::now() + pause > until) {
            return Err(first.unwrap_or_else(|| Error::unavailable("no replica took the request; send it again")));
        }
        deadline::by(job.deadline, tokio::time::sleep(pause)).await?;
        pause = (pause * 2).min(LAST_PAUSE);
        failed.clear();
        full.clear();
    }
}

/// Replicas that were asked.
struct Tried<'a> {
    /// They failed, and are not asked again.
    failed: &'a [ReplicaId],
    /// They had no room, which is no failure.
    full: &'a [ReplicaId],
    latest_was_full: bool,
}

impl Tried<'_> {
    /// All of them, the latest last.
    fn in_order(&self) -> Vec<ReplicaId> {
        match self.latest_was_full {
            true => [self.failed, self.full].concat(),
            false => [self.full, self.failed].concat(),
        }
    }
}

/// Whether another replica may do better.
fn elsewhere(error: &Error) -> bool {
    matches!(error.code, ErrorCode::Unavailable | ErrorCode::ResourceExhausted)
}

/// Places and sends a choice; an error comes with the replica that gave it, if it was one.
async fn send(
    backend: &Backend,
    job: &Job,
    index: usize,
    emitted: &[TokenId],
    tried: Tried<'_>,
    attempt: Span,
) -> Result<Placed, (Option<ReplicaId>, Error)> {
    let prompt: Arc<[TokenId]> = match emitted {
        [] => job.prompt.clone(),
        _ => job.prompt.iter().chain(emitted).copied().collect(),
    };
    let id = match job.n {
        1 => job.id.clone(),
        _ => RequestId::new(format!("{}-{index}", job.id)),
    };
    let left = job.stop.max_tokens - emitted.len().min(job.stop.max_tokens);
    let place = PlaceRequest {
        id: id.clone(),
        blocks: job.blocks.to_vec(),
        prompt_tokens: prompt.len(),
        max_tokens: left,
        exclude: tried.in_order(),
        full: tried.full.to_vec(),
        model: Some(job.model.hasher.digest()),
        tenant: job.tenant.id,
        priority: job.priority,
        deadline: job.deadline,
    };
    let placed = backend.placer.place(place).await.map_err(|error| (None, error))?.replica;
    attempt.record("moesaic.replica", tracing::field::display(&placed));
    let replica = (backend.replicas)(&placed);
    let replica = replica.ok_or_else(|| (Some(placed.clone()), Error::unavailable("the placed replica is gone")))?;
    let mut sampling = job.sampling.clone();
    sampling.seed = sampling.seed.wrapping_add(index as u64);
    let mut stop = job.stop.clone();
    stop.max_tokens = left;
    stop.min_tokens = stop.min_tokens.saturating_sub(emitted.len());
    let request = GenerateRequest {
        id: id.clone(),
        prompt,
        resumed_tokens: emitted.len(),
        sampling,
        stop,
        top_logprobs: job.top_logprobs,
        prompt_logprobs: job.prompt_logprobs && emitted.is_empty(),
        grammar: job.grammar.clone(),
        priority: job.priority,
        deadline: job.deadline,
        salt: job.tenant.salt,
        traceparent: propagation::current_traceparent(),
    };
    match replica.generate(request).await {
        Ok(deltas) => Ok(Placed { replica: placed, deltas, at: replica, request: id, attempt }),
        Err(error) => Err((Some(placed), job.names.apply(error))),
    }
}
