//! `EventBus`: numbered, ordered, from now on; a slow reader sees a gap and holds nobody up.
use super::unique;
use crate::soon;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use moesaic_types::boundary::{Event, EventBus};
use std::sync::Arc;

/// Checks an event bus.
pub async fn event_bus(bus: Arc<dyn EventBus>) {
    let root = format!("moesaic.v1.test.{}", unique());
    numbers_and_filters(&*bus, &root).await;
    everyone_gets_everything(&*bus, &root).await;
    order_holds_with_many_publishers(&bus, &root).await;
    a_slow_reader_loses_events_and_sees_it(&*bus, &root).await;
}

async fn publish(bus: &dyn EventBus, source: &str, subject: &str, payload: &str) {
    let sent = bus.publish(source, subject, Bytes::copy_from_slice(payload.as_bytes()));
    soon("publish", sent).await.expect("publish works");
}

async fn next(stream: &mut BoxStream<'static, Event>) -> Event {
    soon("an event", stream.next()).await.expect("the stream goes on")
}

async fn subscribe(bus: &dyn EventBus, prefix: &str) -> BoxStream<'static, Event> {
    soon("subscribe", bus.subscribe(prefix)).await.expect("subscribe works")
}

async fn numbers_and_filters(bus: &dyn EventBus, root: &str) {
    let (kv, load) = (format!("{root}.kv.a"), format!("{root}.load.a"));
    publish(bus, "life-1", &kv, "before anyone listens").await;
    let mut events = subscribe(bus, &format!("{root}.kv.")).await;
    publish(bus, "life-1", &kv, "2").await;
    publish(bus, "life-1", &load, "other subject").await;
    publish(bus, "life-2", &kv, "1").await;
    publish(bus, "life-1", &kv, "3").await;
    for (source, sequence, payload) in [("life-1", 2, "2"), ("life-2", 1, "1"), ("life-1", 3, "3")] {
        let event = next(&mut events).await;
        assert_eq!(event.subject.as_ref(), kv, "only subjects with the prefix come");
        assert_eq!((event.source.as_ref(), event.sequence), (source, sequence), "numbered for each source and subject");
        assert_eq!(event.payload, payload.as_bytes());
    }
}

async fn everyone_gets_everything(bus: &dyn EventBus, root: &str) {
    let subject = format!("{root}.all.a");
    let mut readers = [subscribe(bus, &subject).await, subscribe(bus, root).await];
    let gone = subscribe(bus, &subject).await;
    drop(gone);
    publish(bus, "s", &subject, "x").await;
    for reader in &mut readers {
        assert_eq!(next(reader).await.payload, "x");
    }
}

async fn order_holds_with_many_publishers(bus: &Arc<dyn EventBus>, root: &str) {
    let subject = format!("{root}.many.a");
    let mut events = subscribe(&**bus, &subject).await;
    let publishers: Vec<_> = (0..4)
        .map(|_| {
            let (bus, subject) = (Arc::clone(bus), subject.clone());
            tokio::spawn(async move {
                for _ in 0..10 {
                    publish(&*bus, "s", &subject, "").await;
                }
            })
        })
        .collect();
    for sequence in 1..=40 {
        assert_eq!(
            next(&mut events).await.sequence,
            sequence,
            "one source's events come in the order of their numbers"
        );
    }
    for publisher in publishers {
        publisher.await.expect("no publisher panics");
    }
}

async fn a_slow_reader_loses_events_and_sees_it(bus: &dyn EventBus, root: &str) {
    const MANY: u64 = 100_000;
    let subject = format!("{root}.slow.a");
    let mut events = subscribe(bus, &subject).await;
    soon("publishing to a reader that does not read", async {
        for _ in 0..MANY {
            publish(bus, "s", &subject, "payload").await;
        }
    })
    .await;
    // The marker is published until it gets through: the reader's queue may be full when it first comes.
    let (mut last, mut received) = (0, 0);
    soon("the reader catches up", async {
        loop {
            publish(bus, "s", &subject, "marker").await;
            let event = next(&mut events).await;
            assert!(event.sequence > last, "numbers only grow");
            (last, received) = (event.sequence, received + 1);
            if last > MANY {
                break;
            }
        }
    })
    .await;
    assert!(received <= last, "no event comes twice");
}
