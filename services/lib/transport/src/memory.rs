//! The boundaries within one process.
use bytes::Bytes;
use futures::StreamExt;
use futures::future::{BoxFuture, FutureExt, ready};
use futures::stream::BoxStream;
use moesaic_types::Result;
use moesaic_types::boundary::{Event, EventBus, Metadata, Versioned};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;

/// Events that wait for a slow reader before it loses some.
const READER_EVENTS: usize = 4096;

/// An event bus within the process.
#[derive(Debug, Default)]
pub struct MemoryBus {
    state: Mutex<BusState>,
}

#[derive(Debug, Default)]
struct BusState {
    /// The last number of each source and subject.
    sequences: HashMap<(Arc<str>, Arc<str>), u64>,
    readers: Vec<Reader>,
}

#[derive(Debug)]
struct Reader {
    prefix: String,
    events: mpsc::Sender<Event>,
}

impl MemoryBus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, BusState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EventBus for MemoryBus {
    fn publish(&self, source: &str, subject: &str, payload: Bytes) -> BoxFuture<'_, Result<()>> {
        let (source, subject): (Arc<str>, Arc<str>) = (source.into(), subject.into());
        // Under one lock, so that the numbers' order is the order of delivery.
        let mut state = self.state();
        let sequence = state.sequences.entry((Arc::clone(&source), Arc::clone(&subject))).or_insert(0);
        *sequence += 1;
        let event = Event { subject, source, sequence: *sequence, payload };
        state.readers.retain(|reader| {
            if !event.subject.starts_with(&reader.prefix) {
                return !reader.events.is_closed();
            }
            // A full queue loses the event: the reader sees the gap in the numbers.
            !matches!(reader.events.try_send(event.clone()), Err(mpsc::error::TrySendError::Closed(_)))
        });
        ready(Ok(())).boxed()
    }

    fn subscribe(&self, prefix: &str) -> BoxFuture<'_, Result<BoxStream<'static, Event>>> {
        let (events, reader) = mpsc::channel(READER_EVENTS);
        self.state().readers.push(Reader { prefix: prefix.to_owned(), events });
        ready(Ok(ReceiverStream::new(reader).boxed())).boxed()
    }
}

/// Metadata within the process.
#[derive(Debug, Default)]
pub struct MemoryMetadata {
    state: Mutex<MetadataState>,
}

#[derive(Debug, Default)]
struct MetadataState {
    values: BTreeMap<String, Entry<(Bytes, u64)>>,
    counters: BTreeMap<String, Entry<i64>>,
    /// One number for all keys, so that a key that is written again has a version that it never had.
    last_version: u64,
    writes: u64,
}

#[derive(Debug)]
struct Entry<T> {
    value: T,
    expires: Option<Instant>,
}

impl<T> Entry<T> {
    fn new(value: T, now: Instant, expires_after: Option<Duration>) -> Self {
        Self { value, expires: expires_after.and_then(|after| now.checked_add(after)) }
    }

    fn is_live(&self, now: Instant) -> bool {
        self.expires.is_none_or(|expires| now < expires)
    }
}

/// Expired keys that nobody asks for are dropped once in so many writes.
const WRITES_PER_SWEEP: u64 = 1024;

impl MetadataState {
    fn version(&self, key: &str, now: Instant) -> Option<u64> {
        self.values.get(key).filter(|entry| entry.is_live(now)).map(|entry| entry.value.1)
    }

    fn count_write(&mut self, now: Instant) {
        self.writes += 1;
        if self.writes.is_multiple_of(WRITES_PER_SWEEP) {
            self.values.retain(|_, entry| entry.is_live(now));
            self.counters.retain(|_, entry| entry.is_live(now));
        }
    }
}

impl MemoryMetadata {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, MetadataState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Metadata for MemoryMetadata {
    fn get(&self, key: &str) -> BoxFuture<'_, Result<Option<(Bytes, u64)>>> {
        let now = Instant::now();
        let found = self.state().values.get(key).filter(|entry| entry.is_live(now)).map(|entry| entry.value.clone());
        ready(Ok(found)).boxed()
    }

    fn get_many(&self, keys: &[String]) -> BoxFuture<'_, Result<Vec<Option<Versioned>>>> {
        let now = Instant::now();
        let state = self.state();
        let live = |key: &String| state.values.get(key).filter(|entry| entry.is_live(now));
        let found = keys.iter().map(|key| live(key).map(|entry| entry.value.clone())).collect();
        ready(Ok(found)).boxed()
    }

    fn compare_and_set(
        &self,
        key: &str,
        expected: Option<u64>,
        value: Bytes,
        expires_after: Option<Duration>,
    ) -> BoxFuture<'_, Result<Option<u64>>> {
        let now = Instant::now();
        let mut state = self.state();
        if state.version(key, now) != expected {
            return ready(Ok(None)).boxed();
        }
        state.last_version += 1;
        let version = state.last_version;
        state.values.insert(key.to_owned(), Entry::new((value, version), now, expires_after));
        state.count_write(now);
        ready(Ok(Some(version))).boxed()
    }

    fn remove(&self, key: &str, expected: u64) -> BoxFuture<'_, Result<bool>> {
        let mut state = self.state();
        let fits = state.version(key, Instant::now()) == Some(expected);
        if fits {
            state.values.remove(key);
        }
        ready(Ok(fits)).boxed()
    }

    fn add(&self, key: &str, amount: i64, expires_after: Option<Duration>) -> BoxFuture<'_, Result<i64>> {
        let now = Instant::now();
        let mut state = self.state();
        let total = match state.counters.get_mut(key).filter(|entry| entry.is_live(now)) {
            Some(entry) => {
                entry.value = entry.value.saturating_add(amount);
                entry.value
            }
            None => {
                state.counters.insert(key.to_owned(), Entry::new(amount, now, expires_after));
                amount
            }
        };
        state.count_write(now);
        ready(Ok(total)).boxed()
    }

    fn keys(&self, prefix: &str) -> BoxFuture<'_, Result<Vec<String>>> {
        let now = Instant::now();
        let state = self.state();
        let from = state.values.range(prefix.to_owned()..).take_while(|(key, _)| key.starts_with(prefix));
        let keys = from.filter(|(_, entry)| entry.is_live(now)).map(|(key, _)| key.clone()).collect();
        ready(Ok(keys)).boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_full_queue_shows_as_a_gap() {
        let bus = MemoryBus::new();
        let mut events = bus.subscribe("a").await.unwrap();
        for _ in 0..READER_EVENTS + 10 {
            bus.publish("s", "a.b", Bytes::new()).await.unwrap();
        }
        for sequence in 1..=READER_EVENTS as u64 {
            assert_eq!(events.next().await.unwrap().sequence, sequence);
        }
        bus.publish("s", "a.b", Bytes::new()).await.unwrap();
        assert_eq!(events.next().await.unwrap().sequence, READER_EVENTS as u64 + 11);
    }

    #[tokio::test]
    async fn readers_that_went_are_forgotten() {
        let bus = MemoryBus::new();
        drop(bus.subscribe("a").await.unwrap());
        bus.publish("s", "other", Bytes::new()).await.unwrap();
        assert!(bus.state().readers.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn expired_keys_do_not_pile_up() {
        let store = MemoryMetadata::new();
        for key in 0..10 * WRITES_PER_SWEEP {
            let expires = Some(Duration::from_millis(10));
            store.compare_and_set(&key.to_string(), None, Bytes::new(), expires).await.unwrap();
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        assert!(store.state().values.len() <= WRITES_PER_SWEEP as usize + 10);
    }
}
