//! What a replica tells on the bus: its load when that changes, and its blocks anew when somebody asks.
#![allow(clippy::unwrap_used)]

mod common;

use bytes::Bytes;
use common::*;
use futures::StreamExt;
use moesaic_scheduler::{Config, Scheduler};
use moesaic_telemetry::metrics::{PROMPT_TOKENS_TOTAL, REQUEST_SUCCESS_TOTAL, install, render};
use moesaic_transport::MemoryBus;
use moesaic_transport::subjects::{Plane, Subject};
use moesaic_types::boundary::{EventBus, KvEvent, ReplicaLoad};
use moesaic_types::cluster::Service;
use moesaic_types::{BlockHash, TenantSalt};
use std::collections::BTreeSet;
use std::sync::Arc;

async fn start_on(bus: &Arc<MemoryBus>, config: Config) -> Arc<Scheduler> {
    Scheduler::start(config, factory(&Arc::default()), vocabulary(), hasher(), None, Some(bus.clone())).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_load_is_told_when_it_changes() {
    let bus = Arc::new(MemoryBus::new());
    let mut events = bus.subscribe(&Plane::Load.prefix()).await.unwrap();
    let scheduler = start_on(&bus, Config { max_running: 3, ..config() }).await;
    // one request after another: between two tellings some come and go
    let asking = Arc::clone(&scheduler);
    let busy = tokio::spawn(async move {
        loop {
            generate(&asking, request(prompt(1, 100), 200)).await.unwrap();
        }
    });
    let mut told: Vec<ReplicaLoad> = Vec::new();
    for running in [1, 0] {
        while told.last().is_none_or(|load| load.running != running) {
            let event = tokio::time::timeout(PATIENCE, events.next()).await.unwrap().unwrap();
            assert_eq!(&*event.subject, Subject::load("0").to_string());
            told.push(serde_json::from_slice(&event.payload).unwrap());
        }
        busy.abort();
    }
    assert!(told.iter().all(|load| load.max_running == 3 && load.kv_blocks_total > 0), "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_are_told_anew_when_somebody_asks() {
    let bus = Arc::new(MemoryBus::new());
    let scheduler = start_on(&bus, config()).await;
    let asked = request(prompt(3, 200), 10);
    generate(&scheduler, asked.clone()).await.unwrap();
    let chain: BTreeSet<BlockHash> = hasher().chain(&asked.salt, &asked.prompt).into_iter().collect();
    // from here on, as a router that comes late
    let mut events = bus.subscribe(&Subject::kv("0").to_string()).await.unwrap();
    let question = Subject::kv_anew(Service::Scheduler, "0").to_string();
    let (mut known, mut is_anew) = (BTreeSet::new(), false);
    while !(is_anew && known.is_superset(&chain)) {
        // a question that comes before the replica listens is lost; a router asks again as well
        if !is_anew {
            bus.publish("router", &question, Bytes::new()).await.unwrap();
        }
        let event = tokio::time::timeout(PATIENCE, events.next()).await.unwrap().unwrap();
        match serde_json::from_slice(&event.payload).unwrap() {
            KvEvent::Cleared => (known, is_anew) = (BTreeSet::new(), true),
            KvEvent::Stored { blocks } => known.extend(blocks),
            KvEvent::Evicted { blocks } => known.retain(|block| !blocks.contains(block)),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canary_is_answered_and_not_counted() {
    install().unwrap();
    let bus = Arc::new(MemoryBus::new());
    let scheduler = start_on(&bus, Config { replica: "canaries".into(), ..config() }).await;
    let counted = || {
        let text = render();
        let is_ours = |line: &&str| line.contains("replica=\"canaries\"");
        let counts = text.lines().filter(is_ours).filter(|line| {
            let name = line.split('{').next().unwrap_or_default();
            name == PROMPT_TOKENS_TOTAL || name == REQUEST_SUCCESS_TOTAL || name.ends_with("_seconds_count")
        });
        // steps are the engine's, whosever they are
        counts.filter(|line| !line.starts_with("moesaic_step")).map(str::to_owned).collect::<BTreeSet<_>>()
    };
    generate(&scheduler, request(vec![1, 2, 3], 2)).await.unwrap();
    let before = counted();
    assert!(before.iter().any(|line| line.starts_with(PROMPT_TOKENS_TOTAL) && line.ends_with(" 3")), "{before:?}");
    let mut canary = request(vec![1, 2, 3], 1);
    canary.salt = TenantSalt::CANARY;
    assert_eq!(generate(&scheduler, canary).await.unwrap().tokens.len(), 1);
    assert_eq!(counted(), before);
}
