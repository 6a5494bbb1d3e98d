//! Readiness and liveness: what the outside sees while an engine loads, crashes or is stuck.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use futures::StreamExt;
use moesaic_scheduler::health::Health;
use moesaic_scheduler::{Config, Scheduler};
use moesaic_types::ErrorCode;
use moesaic_types::boundary::Replica;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Not ready, whoever asks.
async fn assert_not_ready(scheduler: &Scheduler, reason: &str) {
    let errors = [
        scheduler.ready().unwrap_err(),
        scheduler.load().await.unwrap_err(),
        scheduler.generate(request([1], 1)).await.err().unwrap(),
    ];
    for error in errors {
        assert!(error.code == ErrorCode::Unavailable && error.message.contains(reason), "{error}");
    }
    assert!(!scheduler.snapshot().ready);
}

async fn until_ready(scheduler: &Scheduler) {
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = scheduler.ready() {
        assert!(Instant::now() < deadline, "{error}");
        tokio::task::yield_now().await;
    }
    until(scheduler, |s| s.ready).await;
    assert_eq!(generate(scheduler, request(prompt(1, 9), 5)).await.unwrap().tokens.len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn not_ready_while_a_fresh_engine_loads_after_the_actor_panicked() {
    let levers: Arc<Levers> = Arc::default();
    let scheduler = start(config(), &levers).await;
    until_ready(&scheduler).await;
    levers.load.hold();
    scheduler.panic_control().await;
    levers.load_held().await;
    assert_not_ready(&scheduler, "starting").await;
    levers.load.release();
    until_ready(&scheduler).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn not_ready_while_a_fresh_engine_loads_after_the_engine_panicked() {
    let levers: Arc<Levers> = Arc::default();
    let scheduler = start(config(), &levers).await;
    levers.load.hold();
    scheduler.panic_engine();
    levers.load_held().await;
    assert_not_ready(&scheduler, "panicked").await;
    levers.load.release();
    until_ready(&scheduler).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_is_stopped_while_it_loads_never_counts_as_ready() {
    let levers: Arc<Levers> = Arc::default();
    let scheduler = start(config(), &levers).await;
    levers.load.hold();
    scheduler.panic_control().await;
    levers.load_held().await;
    // The engine that loads is told to stop; the next one may only load after it.
    scheduler.panic_control().await;
    assert_not_ready(&scheduler, "starting").await;
    levers.load.release();
    until_ready(&scheduler).await;
    assert_eq!(scheduler.control_restarts(), 2);
}

/// Bounds that a held step passes soon, and no other step does.
fn impatient(dead_after_ms: u64) -> Config {
    Config { step_stalled_after_ms: 500, step_dead_after_ms: dead_after_ms, ..config() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_does_not_end_makes_the_replica_not_ready_until_it_does() {
    let levers: Arc<Levers> = Arc::default();
    let scheduler = start(impatient(600_000), &levers).await;
    levers.hold();
    let mut stream = scheduler.generate(request(prompt(1, 9), 20)).await.unwrap();
    levers.held().await;
    until(&scheduler, |s| !s.ready).await;
    assert_not_ready(&scheduler, "stuck").await;
    assert!(matches!(scheduler.health(), Health::Stalled(time) if time >= Duration::from_millis(500)));
    assert_eq!(scheduler.live(), Ok(()), "it may come back");
    assert!(futures::poll!(stream.next()).is_pending(), "who was accepted waits");
    levers.release();
    assert_eq!(read(stream).await.unwrap().tokens.len(), 20);
    until_ready(&scheduler).await;
    assert_eq!(scheduler.health(), Health::Working);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_never_ends_makes_the_replica_not_live_and_lets_its_requests_go() {
    let levers: Arc<Levers> = Arc::default();
    let scheduler = start(impatient(500), &levers).await;
    levers.hold();
    let running = scheduler.generate(request(prompt(1, 9), 20)).await.unwrap();
    levers.held().await;
    let error = read(running).await.unwrap_err();
    assert!(error.code == ErrorCode::Unavailable && error.message.contains("must be restarted"), "{error}");
    assert_eq!(scheduler.live().unwrap_err().code, ErrorCode::Unavailable);
    assert_not_ready(&scheduler, "must be restarted").await;
    levers.release();
    until_idle(&scheduler).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_does_not_get_on_lets_its_requests_go_and_one_that_does_keeps_them() {
    let levers: Arc<Levers> = Arc::default();
    let bounds = Config { step_silence_ms: 1_500, step_stalled_after_ms: 3_000, ..config() };
    let scheduler = start(bounds, &levers).await;
    levers.hold();
    let mut running = scheduler.generate(request(prompt(1, 9), 20)).await.unwrap();
    levers.held().await;
    let mut waiting = scheduler.generate(request(prompt(2, 9), 20)).await.unwrap();
    while !matches!(scheduler.health(), Health::Stalled(_)) {
        levers.advanced.fetch_add(1, Ordering::SeqCst);
        let ends = [futures::poll!(running.next()), futures::poll!(waiting.next())];
        assert!(ends.iter().all(|end| end.is_pending()), "a long step that gets on is no reason to end");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    for stream in [running, waiting] {
        let error = read(stream).await.unwrap_err();
        assert!(error.code == ErrorCode::Unavailable && error.message.contains("hangs"), "{error}");
    }
    assert_not_ready(&scheduler, "hangs").await;
    assert_eq!(scheduler.live(), Ok(()), "it may come back");
    levers.release();
    until_idle(&scheduler).await;
    until_ready(&scheduler).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_hold_while_a_step_is_stuck() {
    let levers: Arc<Levers> = Arc::default();
    let scheduler = start(Config { max_running: 1, ..config() }, &levers).await;
    let mut first = request(prompt(0, 10), 1000);
    first.deadline = Some(Instant::now() + Duration::from_millis(200));
    let mut running = scheduler.generate(first).await.unwrap();
    running.next().await.unwrap().unwrap();
    levers.hold();
    levers.held().await;
    let mut waiting = request(prompt(1, 10), 10);
    waiting.deadline = Some(Instant::now() + Duration::from_millis(200));
    let waiting = scheduler.generate(waiting).await.unwrap();
    for stream in [waiting, running] {
        let mut errors = stream.filter_map(|delta| futures::future::ready(delta.err())).collect::<Vec<_>>().await;
        let error = errors.pop().unwrap();
        assert_eq!((error.code, errors.len()), (ErrorCode::DeadlineExceeded, 0), "{error}");
    }
    levers.release();
    until_idle(&scheduler).await;
    assert_eq!(generate(&scheduler, request(prompt(1, 9), 5)).await.unwrap().tokens.len(), 5);
}
