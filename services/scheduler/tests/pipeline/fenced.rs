//! A stage goes from one life of its replica's engine to a later one, and to nobody else.
use crate::common::{generate, prompt, request};
use crate::stages::{later_stages, owner, remote, replica, start};
use crate::{answers, assert_equal};
use moesaic_scheduler::pipeline::{StageOptions, StageOwner};
use moesaic_testkit::{soon, until};
use moesaic_types::ErrorCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;

#[tokio::test(flavor = "multi_thread")]
async fn a_later_life_takes_a_stage_over_and_an_older_one_does_not_get_it_back() {
    let later = later_stages(2).await;
    let older = start(&later).await;
    let expected = answers(&older).await;
    let newer = replica(&later, owner(2), StageOptions::default()).await;
    assert_equal(&expected, &answers(&newer).await);
    let error = generate(&older, request(prompt(1, 40), 5)).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
    let refused = || {
        let error = older.info().err().map(|error| error.message).unwrap_or_default();
        // not its old stream's end, but the answer to a new one
        error.contains("a later life of replica s0") && error.starts_with("allocate the KV pool")
    };
    until("its engine is refused", || async { refused() }).await;
    assert_equal(&expected, &answers(&newer).await);
    assert_eq!(newer.snapshot().restarts, 0, "the older one disturbs nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_older_life_asked_for_is_not_computed() {
    let later = later_stages(2).await;
    let older = start(&later).await;
    let levers = &later[0].levers;
    levers.gate.hold();
    // two micro-batches: one is held, the other behind it
    let asked = tokio::spawn({
        let older = Arc::clone(&older);
        async move { generate(&older, request(prompt(1, 40), 5)).await }
    });
    levers.held().await;
    let newer = tokio::spawn({
        let mut stages = remote(&later, owner(2), StageOptions::default());
        async move { tokio::task::spawn_blocking(move || stages.allocate_kv(4).map(|()| stages)).await.unwrap() }
    });
    // its stream ends while the thread is still held
    let error = soon("the older life ends", asked).await.unwrap().unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
    levers.gate.release();
    let _newer = soon("it has the stage", newer).await.unwrap().unwrap();
    assert_eq!(levers.runs.load(Ordering::SeqCst), 1, "a job of the older life was computed for nobody");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_the_replica_takes_nothing() {
    let later = later_stages(2).await;
    let scheduler = start(&later).await;
    let expected = answers(&scheduler).await;
    let strange = StageOwner { replica: "s9".into(), ..owner(9) };
    for (owner, reason) in [(strange, "replica s0, not of s9"), (owner(0), "a later life")] {
        let mut stages = remote(&later, owner, StageOptions::default());
        let refused = tokio::task::spawn_blocking(move || stages.allocate_kv(4)).await.unwrap().unwrap_err();
        assert!(refused.to_string().contains(reason), "{refused}");
    }
    assert_equal(&expected, &answers(&scheduler).await);
    assert_eq!(scheduler.snapshot().restarts, 0);
}
