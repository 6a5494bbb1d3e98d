//! Stages that fail, panic, hang, are slow or away.
use crate::common::{generate, prompt, request};
use crate::stages::{StageProcess, later_stages, owner, ranges, replica, replica_at, start};
use crate::{answers, assert_equal};
use moesaic_scheduler::Scheduler;
use moesaic_scheduler::pipeline::StageOptions;
use moesaic_testkit::{soon, until};
use moesaic_types::{Error, ErrorCode};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

const SILENCE: Duration = Duration::from_millis(600);

fn options() -> StageOptions {
    StageOptions { silence: SILENCE, ..StageOptions::default() }
}

fn asked(scheduler: &Arc<Scheduler>) -> JoinHandle<Result<Vec<u32>, Error>> {
    let scheduler = Arc::clone(scheduler);
    tokio::spawn(async move { generate(&scheduler, request(prompt(1, 40), 5)).await.map(|answer| answer.ids()) })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_micro_batch_that_fails_ends_its_requests_and_nothing_else() {
    let later = later_stages(3).await;
    let scheduler = start(&later).await;
    let expected = answers(&scheduler).await;
    for stage in &later {
        stage.levers.fail.store(true, Ordering::SeqCst);
        let error = asked(&scheduler).await.unwrap().unwrap_err();
        assert_eq!(error.code, ErrorCode::Internal, "{error}");
        assert!(error.message.contains("told to fail"), "{error}");
        assert_equal(&expected, &answers(&scheduler).await);
    }
    assert_eq!(scheduler.snapshot().restarts, 0, "no stage was lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_that_panics_is_lost_and_must_be_restarted() {
    let mut later = later_stages(2).await;
    let scheduler = start(&later).await;
    let expected = answers(&scheduler).await;
    later[0].server.live().unwrap();
    later[0].levers.panic.store(true, Ordering::SeqCst);
    let error = asked(&scheduler).await.unwrap().unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable, "another replica can go on: {error}");
    let dead = later[0].server.live().unwrap_err();
    assert_eq!(dead.code, ErrorCode::Unavailable, "{dead}");
    let says_why = || later[0].server.ready().is_err_and(|error| error.message.contains("panicked"));
    until("it says why", || async { says_why() }).await;
    later[0].kill().await;
    later[0] = StageProcess::start(ranges(2)[1].clone(), &later[0].address).await;
    until("the replica serves again", || async { scheduler.info().is_ok() }).await;
    assert_equal(&expected, &answers(&scheduler).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_whose_thread_hangs_is_lost_soon_and_used_again() {
    let later = later_stages(2).await;
    let scheduler = replica(&later, owner(1), options()).await;
    let expected = answers(&scheduler).await;
    let levers = &later[0].levers;
    levers.gate.hold();
    let hangs = asked(&scheduler);
    levers.held().await;
    let begun = Instant::now();
    let error = soon("it ends", hangs).await.unwrap().unwrap_err();
    assert!(begun.elapsed() < 10 * SILENCE, "it was waited for: {:?}", begun.elapsed());
    assert_eq!(error.code, ErrorCode::Unavailable, "another replica can go on: {error}");
    assert!(error.message.contains("neither computed nor answered for 0.6 s"), "{error}");
    until("nothing is served without it", || async { scheduler.info().is_err() }).await;
    levers.gate.release();
    until("the replica serves again", || async { scheduler.info().is_ok() }).await;
    assert_equal(&expected, &answers(&scheduler).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_that_gets_on_is_waited_for() {
    let later = later_stages(2).await;
    let patient = StageOptions { silence: 3 * SILENCE, ..options() };
    let scheduler = replica(&later, owner(1), patient).await;
    let expected = asked(&scheduler).await.unwrap().unwrap();
    let levers = &later[0].levers;
    levers.gate.hold();
    let slow = asked(&scheduler);
    levers.held().await;
    let begun = Instant::now();
    let mut ticks = tokio::time::interval(Duration::from_millis(50));
    while begun.elapsed() < 2 * patient.silence {
        ticks.tick().await;
        levers.advanced.fetch_add(1, Ordering::SeqCst);
    }
    assert!(!slow.is_finished(), "it was given up");
    levers.gate.release();
    assert_eq!(slow.await.unwrap().unwrap(), expected);
    assert_eq!(scheduler.snapshot().restarts, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_starts_waits_for_a_stage_that_is_away() {
    let expected = answers(&*start(&[]).await).await;
    let unused = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let mut starting = tokio::spawn(replica_at(vec![unused.clone()], owner(1), StageOptions::default()));
    let early = tokio::time::timeout(Duration::from_secs(1), &mut starting).await;
    assert!(early.is_err(), "it ended with what would have come back");
    let _stage = StageProcess::start(ranges(2)[1].clone(), &unused).await;
    let scheduler = soon("it starts", starting).await.unwrap();
    assert_equal(&expected, &answers(&scheduler).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_that_an_idle_replica_loses_is_missed_without_a_request() {
    for lost in [1, 2] {
        let mut later = later_stages(3).await;
        let scheduler = start(&later).await;
        let expected = answers(&scheduler).await;
        scheduler.ready().unwrap();
        later[lost - 1].kill().await;
        until("it is not ready", || async { scheduler.ready().is_err() }).await;
        later[lost - 1] = StageProcess::start(ranges(3)[lost].clone(), &later[lost - 1].address).await;
        until("it is ready again", || async { scheduler.ready().is_ok() }).await;
        assert_equal(&expected, &answers(&scheduler).await);
    }
}
