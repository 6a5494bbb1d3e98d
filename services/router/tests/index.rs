//! Whose events are in the router's prefix index.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)] // A test fails by panicking, in its helpers too.
mod fake;

use bytes::Bytes;
use fake::{Fake, config, id, request};
use moesaic_router::Router;
use moesaic_testkit::until;
use moesaic_transport::MemoryBus;
use moesaic_transport::subjects::Subject;
use moesaic_types::BlockHash;
use moesaic_types::boundary::{EventBus, KvEvent, Placer};
use std::sync::Arc;

async fn publish(bus: &MemoryBus, replica: &str, event: KvEvent) {
    let payload = Bytes::from(serde_json::to_vec(&event).unwrap());
    bus.publish("life", &Subject::kv(replica).to_string(), payload).await.unwrap();
}

fn stored(blocks: &[u8]) -> KvEvent {
    KvEvent::Stored { blocks: blocks.iter().map(|number| BlockHash([*number; 16])).collect() }
}

#[tokio::test]
async fn a_replica_that_drains_does_not_come_back_as_a_ghost() {
    let bus = Arc::new(MemoryBus::new());
    let router = Router::start(&config(), bus.clone()).unwrap();
    router.register(id("a"), Fake::new(0));
    router.register(id("b"), Fake::new(50));
    until("the index knows a's blocks", || async {
        publish(&bus, "a", stored(&[1, 2, 3])).await;
        router.place(request(&[1, 2, 3])).await.unwrap().overlap_blocks == 3
    })
    .await;
    assert!(router.deregister(&id("a")));
    // it goes on with what it has begun
    for block in 4..20 {
        publish(&bus, "a", stored(&[block])).await;
    }
    // the events are read in the order in which they came
    publish(&bus, "b", stored(&[90])).await;
    until("the index knows b's block", || async { router.place(request(&[90])).await.unwrap().overlap_blocks == 1 })
        .await;
    assert_eq!(router.indexed().await, Ok(1), "b's block, and nothing of a");

    // one that comes back is heard again
    router.register(id("a"), Fake::new(0));
    until("the index knows a's block", || async {
        publish(&bus, "a", stored(&[7])).await;
        router.place(request(&[7])).await.unwrap().overlap_blocks == 1
    })
    .await;
}
