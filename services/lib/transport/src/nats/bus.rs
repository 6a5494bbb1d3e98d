//! `EventBus` over NATS: at most once, and what is lost shows as a gap in the numbers.
//!
//! The payload travels as it is; who sent it and its number stand in headers. NATS keeps the order of what one
//! connection publishes, so the numbers are given where the events are handed to it.
use super::namespace::Namespace;
use super::{DEADLINE, Nats, check_payload};
use async_nats::{HeaderMap, Message};
use bytes::Bytes;
use futures::StreamExt;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::BoxStream;
use moesaic_types::boundary::{Event, EventBus};
use moesaic_types::{Error, Result};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, mpsc};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;

const SOURCE: &str = "Moesaic-Source";
const SEQUENCE: &str = "Moesaic-Sequence";

/// Events that wait for a slow reader before it loses some.
const READER_EVENTS: usize = 4096;

/// How long a publisher waits for a connection that takes no more, once; then its events are lost until it does again.
const PATIENCE: Duration = Duration::from_secs(1);

/// An event bus over NATS; cheap to clone.
///
/// `publish` never waits for a lost connection: the event takes its number, is lost, and the answer is `Unavailable`.
/// A reader's stream goes on after a reconnect.
#[derive(Clone, Debug)]
pub struct NatsBus {
    nats: Nats,
    outbox: Arc<Mutex<Outbox>>,
}

#[derive(Debug, Default)]
struct Outbox {
    /// The last number of each source and subject.
    sequences: HashMap<(Arc<str>, Arc<str>), u64>,
    /// The last event found no room.
    is_stalled: bool,
}

impl NatsBus {
    /// A bus over a connection.
    pub fn new(nats: Nats) -> Self {
        Self { nats, outbox: Arc::default() }
    }

    async fn send(&self, source: Arc<str>, subject: Arc<str>, payload: Bytes) -> Result<()> {
        check_payload("an event", payload.len())?;
        let is_source = !source.is_empty() && !source.contains(['\r', '\n']);
        let outer = self.nats.namespace.outer(&subject).filter(|outer| is_source && is_subject(outer));
        let outer = outer
            .ok_or_else(|| Error::invalid("subject", format!("{subject:?} from {source:?} cannot be published")))?;
        // Held while the event is handed over, so that the numbers' order is the order of delivery.
        let mut outbox = self.outbox.lock().await;
        let sequence = outbox.sequences.entry((Arc::clone(&source), Arc::clone(&subject))).or_insert(0);
        *sequence += 1;
        let mut headers = HeaderMap::new();
        headers.insert(SOURCE, &*source);
        headers.insert(SEQUENCE, sequence.to_string());
        if !self.nats.is_connected() {
            return Err(self.nats.unavailable(format!("not connected; an event of {subject} is lost")));
        }
        let handed_over = self.nats.client.publish_with_headers(outer, headers, payload);
        let patience = if outbox.is_stalled { Duration::ZERO } else { PATIENCE };
        let handed_over = timeout(patience, handed_over).await;
        outbox.is_stalled = handed_over.is_err();
        match handed_over {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(self.nats.unavailable(error)),
            Err(_) => Err(self.nats.unavailable(format!("it takes no more; an event of {subject} is lost"))),
        }
    }

    async fn read(&self, prefix: String) -> Result<BoxStream<'static, Event>> {
        let pattern = pattern(&prefix, &self.nats.namespace).ok_or_else(|| {
            Error::invalid(
                "prefix",
                format!("{prefix:?} is no start of a subject: it has an empty part, a space or a *"),
            )
        })?;
        let subscribed = self.nats.client.subscribe(pattern);
        let messages = timeout(DEADLINE, subscribed).await.map_err(|_| self.nats.unavailable("it takes no more"))?;
        let messages = messages.map_err(|error| self.nats.unavailable(error))?;
        self.settle().await;
        let (events, reader) = mpsc::channel(READER_EVENTS);
        tokio::spawn(forward(messages, prefix, self.nats.namespace.clone(), events));
        Ok(ReceiverStream::new(reader).boxed())
    }

    /// Waits until the server has seen all that this connection asked for: what others publish from then on arrives.
    /// Without a connection there is nothing to wait for: it is all asked for again once there is one.
    async fn settle(&self) {
        let echo = async {
            let inbox = self.nats.client.new_inbox();
            let mut answers = self.nats.client.subscribe(inbox.clone()).await.ok()?;
            self.nats.client.publish(inbox, Bytes::new()).await.ok()?;
            answers.next().await
        };
        if self.nats.is_connected() && !matches!(timeout(DEADLINE, echo).await, Ok(Some(_))) {
            tracing::warn!(nats = &*self.nats.address, "events may not come yet: nats does not answer");
        }
    }
}

impl EventBus for NatsBus {
    fn publish(&self, source: &str, subject: &str, payload: Bytes) -> BoxFuture<'_, Result<()>> {
        self.send(source.into(), subject.into(), payload).boxed()
    }

    fn subscribe(&self, prefix: &str) -> BoxFuture<'_, Result<BoxStream<'static, Event>>> {
        self.read(prefix.to_owned()).boxed()
    }
}

/// Events of so many sources and subjects are told apart; beyond, all are forgotten.
const SOURCES: usize = 1 << 16;

/// The numbers that a reader has seen.
#[derive(Debug, Default)]
struct Seen(HashMap<(Arc<str>, Arc<str>), u64>);

impl Seen {
    /// Whether an event is later than those before it. What a publisher wrote to a connection before it lost it can
    /// arrive after what it wrote to the next one.
    fn is_later(&mut self, event: &Event) -> bool {
        if self.0.len() >= SOURCES {
            self.0.clear();
        }
        let last = self.0.entry((Arc::clone(&event.source), Arc::clone(&event.subject))).or_insert(0);
        let is_later = event.sequence > *last;
        *last = event.sequence.max(*last);
        is_later
    }
}

/// Hands events on until the reader is gone; a full queue loses them, and the reader sees the gap. NATS's own queue
/// stays empty, so that it does not take us for a slow consumer.
async fn forward(
    mut messages: async_nats::Subscriber,
    prefix: String,
    namespace: Namespace,
    events: mpsc::Sender<Event>,
) {
    let mut seen = Seen::default();
    loop {
        let message = tokio::select! {
            () = events.closed() => return,
            message = messages.next() => message,
        };
        let Some(message) = message else { return };
        if let Some(event) = read_event(message, &namespace).filter(|event| event.subject.starts_with(&prefix))
            && seen.is_later(&event)
        {
            // full: lost; closed: the next round ends
            let _ = events.try_send(event);
        }
    }
}

/// An event; `None` where the message is none of ours.
fn read_event(message: Message, namespace: &Namespace) -> Option<Event> {
    let subject = namespace.inner(&message.subject)?.into();
    let headers = message.headers?;
    let sequence = headers.get(SEQUENCE)?.as_str().parse().ok()?;
    let source = headers.get(SOURCE)?.as_str().into();
    Some(Event { subject, source, sequence, payload: message.payload })
}

fn is_subject(text: &str) -> bool {
    let is_part = |part: &str| !part.is_empty() && !part.contains(|c: char| c.is_whitespace() || "*>".contains(c));
    text.split('.').all(is_part)
}

/// What to subscribe to for all subjects that start with `prefix`: NATS matches whole parts, so the last one, which may
/// go on, is left open.
fn pattern(prefix: &str, namespace: &Namespace) -> Option<String> {
    let (whole, last) = prefix.rsplit_once('.').map_or((None, prefix), |(whole, last)| (Some(whole), last));
    let fits = whole.is_none_or(is_subject) && (last.is_empty() || is_subject(last));
    fits.then(|| match namespace.outer(prefix) {
        Some(outer) => format!("{}>", outer.strip_suffix(last).unwrap_or(&outer)),
        None => namespace.all(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_late_or_twice_is_not_handed_on() {
        let event = |source: &str, subject: &str, sequence| Event {
            subject: subject.into(),
            source: source.into(),
            sequence,
            payload: Bytes::new(),
        };
        let mut seen = Seen::default();
        for (source, subject, sequence, is_later) in [
            ("a", "x", 4, true),
            ("a", "x", 9, true),
            ("a", "x", 9, false),
            ("a", "x", 5, false),
            ("b", "x", 5, true),
            ("a", "y", 1, true),
            ("a", "x", 10, true),
        ] {
            assert_eq!(seen.is_later(&event(source, subject, sequence)), is_later, "{source} {subject} {sequence}");
        }
    }

    #[test]
    fn a_prefix_becomes_a_pattern_of_whole_parts() {
        let pattern = |prefix| pattern(prefix, &Namespace::default());
        assert_eq!(pattern("moesaic.v1.kv.").as_deref(), Some("moesaic.v1.kv.>"));
        assert_eq!(pattern("moesaic.v1.kv").as_deref(), Some("moesaic.v1.>"));
        for all in ["moesaic", "moes", "", "other.v1.x"] {
            assert_eq!(pattern(all).as_deref(), Some("moesaic.>"), "{all}");
        }
        for wrong in ["a..b", ".", "a b.", "a.*", ">.x", "*"] {
            assert_eq!(pattern(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn subjects_with_wildcards_or_holes_are_none() {
        assert!(is_subject("moesaic.v1.kv.scheduler.r0.blocks"));
        for wrong in ["", "a.", ".a", "a..b", "a b", "a.*", "a.>", "a\n"] {
            assert!(!is_subject(wrong), "{wrong}");
        }
    }
}
