//! A replica of which only the load matters.
#![allow(dead_code, reason = "each test uses what it needs")]
use futures::FutureExt;
use futures::future::BoxFuture;
use moesaic_config::HumanDuration;
use moesaic_router::Config;
use moesaic_types::boundary::{DeltaStream, PlaceRequest, Replica, ReplicaLoad};
use moesaic_types::{BLOCK_TOKENS, BlockHash, Error, GenerateRequest, ReplicaId, RequestId, Result};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// A replica of which only the load matters.
pub struct Fake {
    load: Mutex<Result<ReplicaLoad>>,
    /// How often it was asked.
    pub polls: AtomicUsize,
    /// How often it panics from now on.
    pub panics: AtomicUsize,
}

impl Fake {
    /// One with so many running, and no limit.
    pub fn new(running: usize) -> Arc<Self> {
        Self::with(Ok(ReplicaLoad { running, max_context: 1000, ..ReplicaLoad::default() }))
    }

    /// One that says this.
    pub fn with(load: Result<ReplicaLoad>) -> Arc<Self> {
        Arc::new(Self { load: Mutex::new(load), polls: AtomicUsize::new(0), panics: AtomicUsize::new(0) })
    }

    /// It says this from now on.
    pub fn set(&self, load: Result<ReplicaLoad>) {
        *self.load.lock().unwrap() = load;
    }
}

impl Replica for Fake {
    fn generate(&self, _: GenerateRequest) -> BoxFuture<'_, Result<DeltaStream>> {
        async { Err(Error::internal("no test generates")) }.boxed()
    }

    fn load(&self) -> BoxFuture<'_, Result<ReplicaLoad>> {
        async {
            self.polls.fetch_add(1, Ordering::SeqCst);
            let panics = self.panics.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
            assert!(panics.is_err(), "asked to panic");
            self.load.lock().unwrap().clone()
        }
        .boxed()
    }
}

/// Polls often, and sends no canaries.
pub fn config() -> Config {
    let canary_interval = HumanDuration::default();
    Config { poll_interval: HumanDuration::from_millis(10), canary_interval, ..Config::default() }
}

/// A replica's id.
pub fn id(name: &str) -> ReplicaId {
    ReplicaId::new(name)
}

/// A request for a prompt of these blocks.
pub fn request(blocks: &[u8]) -> PlaceRequest {
    PlaceRequest {
        blocks: blocks.iter().map(|number| BlockHash([*number; 16])).collect(),
        ..PlaceRequest::new(RequestId::new("r"), (blocks.len() * BLOCK_TOKENS).max(1), 16)
    }
}
