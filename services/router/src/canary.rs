//! Canaries: tiny requests that show whether a replica works, whatever it says of itself.
//!
//! One is sent when a replica appears and now and then to one that has nothing to do, if it has a place for it; and before
//! requests go back to one that was left alone, whatever others have it do: were it to wait for a place, their load could
//! keep it out for ever.
use crate::replica::{Entry, State};
use futures::StreamExt;
use moesaic_telemetry::propagation;
use moesaic_types::boundary::Replica;
use moesaic_types::{
    Error, ErrorCode, GenerateRequest, Priority, ReplicaId, RequestId, Result, SamplingParams, StopConditions,
    TenantSalt, TokenId,
};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tracing::Instrument;

/// A prompt that every vocabulary has, too short to leave a block behind.
const PROMPT: [TokenId; 4] = [1, 2, 3, 1];

/// Replicas of one model that must agree before another's answer is doubted.
const MAJORITY: usize = 2;

/// What came of a canary.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// The replica answered with this token.
    Works(TokenId),
    /// It did not answer, or broke off.
    Failed(Error),
    /// It refused: for want of room, or because it takes no such request. That says nothing.
    Unclear(Error),
}

/// Whether a replica is to be sent a canary now.
pub fn is_due(entry: &Entry, interval: Duration, now: Instant) -> bool {
    if !matches!(entry.state, State::Ready(_)) || entry.check.is_running || !entry.may_be_asked(now) {
        return false;
    }
    let is_over = |last: Instant| now.saturating_duration_since(last) >= interval;
    // one that is idle has a place
    entry.check.is_required || (entry.is_idle() && (!entry.check.is_proven || entry.check.last.is_none_or(is_over)))
}

/// A router's own interval, longer by up to a quarter by its name: routers that hear of each other's canaries then send
/// few of them at the same time.
pub fn own_interval(name: &str, interval: Duration) -> Duration {
    let hash = name.bytes().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    interval + interval * (hash >> 26) / 256
}

/// Sends one, and waits for its answer.
pub async fn send(id: &ReplicaId, replica: &dyn Replica, timeout: Duration) -> Outcome {
    // a trace of its own: it is no part of anyone's request
    let span = tracing::info_span!(parent: None, "canary", moesaic.replica = %id, moesaic.canary = true);
    let answer = async {
        let request = request(timeout);
        let mut deltas = replica.generate(request).await?;
        loop {
            let delta = deltas.next().await.ok_or_else(|| Error::unavailable("the stream ended without a token"))??;
            if let Some(token) = delta.tokens.first() {
                return Ok(token.id);
            }
            if delta.finish.is_some() {
                return Err(Error::unavailable("the answer has no token"));
            }
        }
    };
    let answer: Result<TokenId> = match tokio::time::timeout(timeout, answer.instrument(span)).await {
        Ok(answer) => answer,
        Err(_) => Err(Error::unavailable(format!("no token came within {timeout:?}"))),
    };
    match answer {
        Ok(token) => Outcome::Works(token),
        Err(error) => match error.code {
            ErrorCode::Unavailable | ErrorCode::Internal | ErrorCode::DeadlineExceeded => Outcome::Failed(error),
            _ => Outcome::Unclear(error),
        },
    }
}

fn request(timeout: Duration) -> GenerateRequest {
    static SENT: AtomicU64 = AtomicU64::new(0);
    let number = SENT.fetch_add(1, Ordering::Relaxed);
    GenerateRequest {
        id: RequestId::new(format!("canary-{}-{number}", std::process::id())),
        prompt: PROMPT.into(),
        resumed_tokens: 0,
        sampling: SamplingParams::greedy(),
        stop: StopConditions { max_tokens: 1, ignore_eos: true, ..StopConditions::default() },
        top_logprobs: None,
        prompt_logprobs: false,
        grammar: None,
        priority: Priority::default(),
        deadline: Instant::now().checked_add(timeout),
        salt: TenantSalt::CANARY,
        traceparent: propagation::current_traceparent(),
    }
}

/// Enters what came of one.
pub fn returned(entry: &mut Entry, outcome: &Outcome, now: Instant) {
    entry.check.is_running = false;
    let is_outdated = std::mem::take(&mut entry.check.is_outdated);
    match outcome {
        Outcome::Works(_) | Outcome::Unclear(_) if is_outdated => {}
        // its refusal is an answer too
        Outcome::Works(_) | Outcome::Unclear(_) => {
            if let Outcome::Works(token) = outcome {
                entry.check.token = Some(*token);
            }
            entry.check.is_required = false;
            entry.check.works(now);
        }
        Outcome::Failed(_) => {
            entry.check.is_proven = false;
            // with much to do it may be late for other reasons
            if entry.is_idle() || entry.check.is_required { entry.trip(now) } else { entry.failed(now) }
        }
    }
}

/// What most other replicas of its model answer, where a replica answers something else.
pub fn disagrees_with(replicas: &BTreeMap<ReplicaId, Entry>, id: &ReplicaId) -> Option<TokenId> {
    let own = replicas.get(id)?;
    let mut votes: HashMap<TokenId, usize> = HashMap::new();
    let others = replicas.iter().filter(|(other, entry)| *other != id && entry.model == own.model);
    others.filter_map(|(_, entry)| entry.check.token).for_each(|token| *votes.entry(token).or_default() += 1);
    let cast: usize = votes.values().sum();
    let (token, count) = votes.into_iter().max_by_key(|(_, count)| *count)?;
    (count >= MAJORITY && 2 * count > cast && own.check.token.is_some_and(|own| own != token)).then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::breaker::Breaker;
    use moesaic_types::Digest;
    use moesaic_types::boundary::ReplicaLoad;

    const INTERVAL: Duration = Duration::from_secs(30);

    fn entry(running: usize, waiting: usize, now: Instant) -> Entry {
        let mut entry = Entry::new(None, Breaker::new(3, Duration::from_secs(1)), true);
        let load = ReplicaLoad { running, waiting, max_running: 4, ..ReplicaLoad::default() };
        entry.heard(Ok(load), now, now);
        entry
    }

    #[test]
    fn one_is_due_where_it_tells_something_and_has_a_place() {
        let now = Instant::now();
        let is_due = |entry: &Entry, now| is_due(entry, INTERVAL, now);
        let mut fresh = Entry::new(None, Breaker::new(3, Duration::from_secs(1)), true);
        assert!(!is_due(&fresh, now), "nothing is known of it");
        fresh = entry(0, 0, now);
        assert!(is_due(&fresh, now));
        fresh.check.is_running = true;
        assert!(!is_due(&fresh, now), "one is on its way");
        returned(&mut fresh, &Outcome::Works(7), now);
        let later = now + INTERVAL;
        assert!(!is_due(&fresh, now + INTERVAL - Duration::from_millis(1)) && is_due(&fresh, later));
        let busy = entry(1, 0, now);
        assert!(!is_due(&busy, now) && !is_due(&busy, later), "it works");
        let mut back = entry(4, 0, now);
        back.trip(now);
        let after = now + Duration::from_secs(1);
        assert!(!is_due(&back, now) && is_due(&back, after), "when its pause is over, with a place or without");
    }

    #[test]
    fn routers_have_intervals_of_their_own_and_none_a_shorter_one() {
        let own = |n: usize| own_interval(&format!("router.1.{n}"), INTERVAL);
        assert!((0..100).all(|n| (INTERVAL..=INTERVAL * 5 / 4).contains(&own(n))));
        assert!((1..100).filter(|n| own(*n) != own(0)).count() > 80);
    }

    #[test]
    fn a_failure_counts_by_whether_anything_excuses_it() {
        let now = Instant::now();
        let failed = Outcome::Failed(Error::unavailable("no token"));
        let mut idle = entry(0, 0, now);
        returned(&mut idle, &failed, now);
        assert!(!idle.is_ready(now) && idle.check.is_required);
        let mut busy = entry(2, 0, now);
        returned(&mut busy, &failed, now);
        assert!(busy.is_ready(now), "one failure of three");
        let after = now + Duration::from_secs(1);
        returned(&mut idle, &failed, after);
        assert!(!idle.may_be_asked(after + Duration::from_secs(1)), "the pause doubled");
        returned(&mut idle, &Outcome::Unclear(Error::internal("x")), after + Duration::from_secs(2));
        assert!(idle.is_ready(after + Duration::from_secs(2)));
    }

    #[test]
    fn one_that_was_sent_before_a_failure_excuses_nothing() {
        let now = Instant::now();
        let mut entry = entry(0, 0, now);
        entry.check.is_running = true;
        entry.trip(now);
        returned(&mut entry, &Outcome::Works(7), now);
        let later = now + Duration::from_secs(10);
        assert!(!entry.is_ready(later) && is_due(&entry, INTERVAL, later), "another is wanted");
        entry.check.is_running = true;
        returned(&mut entry, &Outcome::Works(7), later);
        assert!(entry.is_ready(later));
    }

    #[test]
    fn an_answer_is_doubted_where_two_others_of_the_model_agree_on_another() {
        let of = |model: &[u8], token| {
            let mut entry = Entry::new(Some(Digest::of(model)), Breaker::new(3, Duration::from_secs(1)), true);
            entry.check.token = token;
            entry
        };
        let doubted = |tokens: &[(&[u8], Option<TokenId>)]| {
            let entries = tokens.iter().enumerate();
            let replicas: BTreeMap<_, _> =
                entries.map(|(n, (model, token))| (ReplicaId::new(n.to_string()), of(model, *token))).collect();
            disagrees_with(&replicas, &ReplicaId::new("0"))
        };
        assert_eq!(doubted(&[(b"m", Some(1)), (b"m", Some(2)), (b"m", Some(2))]), Some(2));
        assert_eq!(doubted(&[(b"m", Some(2)), (b"m", Some(2)), (b"m", Some(2))]), None);
        assert_eq!(doubted(&[(b"m", Some(1)), (b"m", Some(2)), (b"x", Some(2))]), None, "one alone is no majority");
        let split = [1, 2, 2, 1, 1].map(|token| (b"m".as_slice(), Some(token)));
        assert_eq!(doubted(&split), None, "half of them");
        assert_eq!(doubted(&[(b"m", None), (b"m", Some(2)), (b"m", Some(2))]), None, "it has said nothing");
    }
}
