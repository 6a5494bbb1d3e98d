//! The in-process implementations keep the boundaries' promises.
#![forbid(unsafe_code)]
use moesaic_testkit::conformance;
use moesaic_transport::{MemoryBus, MemoryMetadata};
use std::sync::Arc;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn memory_bus() {
    conformance::event_bus(Arc::new(MemoryBus::new())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn memory_metadata() {
    conformance::metadata(Arc::new(MemoryMetadata::new())).await;
}
