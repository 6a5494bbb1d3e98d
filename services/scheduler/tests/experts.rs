//! Experts that are lost and come back: requests wait for them, and their answers are what they would have been.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use moesaic_scheduler::health::Health;
use moesaic_scheduler::{Config, Scheduler};
use moesaic_types::boundary::Replica;
use moesaic_types::{ErrorCode, GenerateRequest};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

fn requests() -> Vec<GenerateRequest> {
    let mut requests: Vec<_> = (0..6).map(|n| request(prompt(n % 3, 60 + 30 * n as usize), 20)).collect();
    requests[1].prompt_logprobs = true;
    requests[2].top_logprobs = Some(2);
    requests
}

async fn all(scheduler: &Scheduler) -> Vec<Answer> {
    let answers = requests().into_iter().map(|request| generate(scheduler, request));
    futures::future::try_join_all(answers).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_lost_its_experts_is_run_again_and_changes_no_answer() {
    let small = Config { max_chunk: 50, token_budget: 64, kv_blocks: Some(16), ..config() };
    let expected = all(&*start(small.clone(), &Arc::default()).await).await;
    let levers: Arc<Levers> = Arc::default();
    let scheduler = start(small, &levers).await;
    // Every third step fails, twice in a row: prefills, decodes, with and without log-probabilities.
    levers.lose_experts_every.store(3, Ordering::SeqCst);
    let found = all(&scheduler).await;
    for (n, (expected, found)) in expected.iter().zip(&found).enumerate() {
        assert_eq!((&expected.tokens, &expected.prompt_logprobs), (&found.tokens, &found.prompt_logprobs), "{n}");
    }
    assert!(levers.lost.load(Ordering::SeqCst) > 5, "too few steps failed");
    until_idle(&scheduler).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_wait_for_lost_experts_as_long_as_they_can() {
    let levers: Arc<Levers> = Arc::default();
    let scheduler = start(Config { experts_patience_ms: 150, ..config() }, &levers).await;
    levers.lose_experts_every.store(1, Ordering::SeqCst);
    let started = Instant::now();
    let patient = scheduler.generate(request(prompt(1, 70), 5)).await.unwrap();
    let mut short = request(prompt(2, 70), 5);
    short.deadline = Some(started + Duration::from_millis(40));
    let short = scheduler.generate(short).await.unwrap();
    let mut long = request(prompt(3, 70), 5);
    long.deadline = Some(started + PATIENCE);
    let long = scheduler.generate(long).await.unwrap();
    let error = read(short).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::DeadlineExceeded, "{error}");
    let error = read(patient).await.unwrap_err();
    assert!(started.elapsed() >= Duration::from_millis(150));
    assert_eq!(error.code, ErrorCode::Unavailable);
    assert!(error.message.contains("layer 3") && error.message.contains("150 ms"), "{error}");
    // Whoever has a deadline still waits; nobody new is taken.
    until(&scheduler, |s| !s.ready).await;
    let refused = scheduler.load().await.unwrap_err();
    assert!(refused.message.contains("experts"), "{refused}");
    assert!(matches!(scheduler.health(), Health::WithoutExperts(_)));
    assert_eq!(scheduler.live(), Ok(()), "a restart would bring nothing");
    levers.lose_experts_every.store(0, Ordering::SeqCst);
    assert_eq!(read(long).await.unwrap().tokens.len(), 5);
    until(&scheduler, |s| s.ready).await;
    assert_eq!(generate(&scheduler, request(prompt(1, 70), 5)).await.unwrap().tokens.len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_nobody_left_who_waits_the_next_request_finds_out_anew() {
    let levers: Arc<Levers> = Arc::default();
    let scheduler = start(Config { experts_patience_ms: 30, ..config() }, &levers).await;
    levers.lose_experts_every.store(1, Ordering::SeqCst);
    assert_eq!(generate(&scheduler, request([1], 1)).await.unwrap_err().code, ErrorCode::Unavailable);
    until(&scheduler, |s| s.ready && s.running == 0 && s.kv_blocks_used == 0).await;
    levers.lose_experts_every.store(0, Ordering::SeqCst);
    assert_eq!(generate(&scheduler, request([1], 1)).await.unwrap().tokens.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_leaves_is_seen_while_experts_are_lost() {
    let levers: Arc<Levers> = Arc::default();
    let scheduler = start(config(), &levers).await;
    levers.lose_experts_every.store(1, Ordering::SeqCst);
    let stream = scheduler.generate(request(prompt(1, 70), 5)).await.unwrap();
    until(&scheduler, |s| s.running == 1).await;
    drop(stream);
    until_idle(&scheduler).await;
}
