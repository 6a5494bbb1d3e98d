//! A replica in stages over real gRPC streams: the bits of the whole one, and what happens when a stage is lost.
#![allow(clippy::unwrap_used, reason = "a test fails there")]

#[path = "../common/mod.rs"]
mod common;
mod faults;
mod fenced;
mod stages;

use common::{Answer, generate, prompt, request, until_idle};
use moesaic_scheduler::Scheduler;
use moesaic_scheduler::pipeline::StageOptions;
use stages::{StageProcess, later_stages, owner, ranges, replica, start};
use std::sync::Arc;
use std::sync::atomic::Ordering;

async fn answers(scheduler: &Scheduler) -> Vec<Answer> {
    let requests = (0..5u64).map(|n| {
        let mut request = request(prompt(n % 3, 30 + 25 * n as usize), 8);
        request.top_logprobs = Some(2);
        request.prompt_logprobs = n == 2;
        request
    });
    let answers = futures::future::try_join_all(requests.map(|request| generate(scheduler, request))).await.unwrap();
    until_idle(scheduler).await;
    answers
}

fn assert_equal(expected: &[Answer], found: &[Answer]) {
    for (n, (expected, found)) in expected.iter().zip(found).enumerate() {
        assert_eq!(expected.tokens, found.tokens, "request {n}");
        assert_eq!(expected.prompt_logprobs, found.prompt_logprobs, "prompt of request {n}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stages_in_other_processes_give_the_same_bits() {
    let whole = start(&[]).await;
    let expected = answers(&whole).await;
    for stages in [2, 3] {
        let later = later_stages(stages).await;
        let split = start(&later).await;
        assert_equal(&expected, &answers(&split).await);
        assert_equal(&expected, &answers(&split).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_above_the_limit_are_cut_and_give_the_same_bits() {
    let whole = start(&[]).await;
    let expected = answers(&whole).await;
    let later = later_stages(3).await;
    let options = StageOptions { max_message: 10 * stages::hidden() * size_of::<f32>(), ..StageOptions::default() };
    assert_equal(&expected, &answers(&*replica(&later, owner(1), options).await).await);

    // blocks too
    let mut stages = stages::remote(&later, owner(2), options);
    tokio::task::spawn_blocking(move || {
        stages.allocate_kv(3).unwrap();
        let bytes: Vec<u8> = (0..stages.export_block(0).unwrap().len()).map(|at| (at % 64) as u8).collect();
        assert!(bytes.len() > 4 * options.max_message, "a block takes several messages");
        stages.import_block(2, &bytes).unwrap();
        assert!(stages.export_block(2).unwrap() == bytes, "a block comes back as it was");
        assert!(stages.import_block(1, &bytes[1..]).is_err(), "one that is too short is refused");
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_stage_ends_its_requests_and_a_new_one_serves() {
    for lost in [1, 2] {
        let mut later = later_stages(3).await;
        let scheduler = start(&later).await;
        let expected = answers(&scheduler).await;
        let long = tokio::spawn({
            let scheduler = Arc::clone(&scheduler);
            async move { generate(&scheduler, request(prompt(1, 40), 800)).await }
        });
        let mut snapshots = scheduler.watch();
        moesaic_testkit::soon("it runs", snapshots.wait_for(|snapshot| snapshot.running == 1)).await.unwrap();
        later[lost - 1].kill().await;
        let error = long.await.unwrap().unwrap_err();
        assert_eq!(error.code, moesaic_types::ErrorCode::Unavailable, "another replica can go on: {error}");
        later[lost - 1] = StageProcess::start(ranges(3)[lost].clone(), &later[lost - 1].address).await;
        moesaic_testkit::until("the replica serves again", || async { scheduler.info().is_ok() }).await;
        assert_equal(&expected, &answers(&scheduler).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn micro_batches_of_a_step_are_in_different_stages_at_once() {
    let later = later_stages(3).await;
    let scheduler = start(&later).await;
    let expected = generate(&scheduler, request(prompt(1, 40), 1)).await.unwrap();
    until_idle(&scheduler).await;
    let [first, second] = [&later[0].levers, &later[1].levers];
    let before = first.runs.load(Ordering::SeqCst);
    second.gate.hold();
    let answer = tokio::spawn(async move { generate(&scheduler, request(prompt(2, 40), 1)).await });
    second.held().await;
    // the later stage has not ended the step's first micro-batch
    let begun = || async { first.runs.load(Ordering::SeqCst) >= before + 2 };
    moesaic_testkit::until("the stage before it begins the second", begun).await;
    assert!(!answer.is_finished());
    second.gate.release();
    assert_eq!(answer.await.unwrap().unwrap().tokens.len(), expected.tokens.len());
}
