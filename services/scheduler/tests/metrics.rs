//! Metrics as Prometheus reads them: the names that others' dashboards rely on, and how each request's end counts.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use futures::StreamExt;
use moesaic_scheduler::{Config, Scheduler};
use moesaic_telemetry::metrics::{
    E2E_REQUEST_LATENCY_SECONDS, REQUEST_FAILURES_TOTAL, REQUEST_SUCCESS_TOTAL, REQUESTS_CANCELLED_TOTAL, install,
    render,
};
use moesaic_types::boundary::Replica;
use moesaic_types::{ErrorCode, GenerateRequest};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// The metrics that vLLM's dashboards and autoscalers read (section 7 of the design); histograms by their count.
const VLLM: [&str; 13] = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:time_to_first_token_seconds_count",
    "vllm:inter_token_latency_seconds_count",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:request_queue_time_seconds_count",
    "vllm:request_prefill_time_seconds_count",
    "vllm:request_decode_time_seconds_count",
];

/// The value of a replica's metric with this label (`name="value"`, or nothing), if it was told.
fn told(replica: &str, metric: &str, label: &str) -> Option<f64> {
    let text = render();
    let replica = format!("replica=\"{replica}\"");
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(metric)?.strip_prefix('{'));
    let line = lines.find(|line| line.contains(&replica) && line.contains(label))?;
    Some(line.rsplit(' ').next().unwrap().parse().unwrap())
}

fn count(replica: &str, metric: &str, label: &str) -> f64 {
    told(replica, metric, label).unwrap_or(0.0)
}

fn failures(replica: &str, code: ErrorCode) -> f64 {
    count(replica, REQUEST_FAILURES_TOTAL, &format!("reason=\"{}\"", code.name()))
}

async fn start_as(replica: &str, config: Config, levers: &Arc<Levers>) -> Arc<Scheduler> {
    install().unwrap();
    start(Config { replica: replica.into(), ..config }, levers).await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_name_that_vllms_dashboards_read_has_a_value_after_one_request() {
    let scheduler = start_as("names", config(), &Arc::default()).await;
    generate(&scheduler, request(prompt(1, 130), 5)).await.unwrap();
    generate(&scheduler, request(prompt(1, 130), 5)).await.unwrap();
    until_idle(&scheduler).await;
    let value =
        |metric| told("names", metric, "model_name=\"moesaic\"").unwrap_or_else(|| panic!("{metric} is missing"));
    let values = VLLM.map(value);
    // Queries and hits count tokens: two prompts of 130, of which the second has two blocks in the cache.
    assert_eq!(values, [0.0, 0.0, 0.0, 260.0, 128.0, 260.0, 10.0, 2.0, 8.0, 2.0, 2.0, 2.0, 2.0], "{VLLM:?}");
    let phases = ["plan", "forward", "collect"]
        .map(|phase| told("names", "moesaic_step_phase_seconds_count", &format!("phase=\"{phase}\"")).unwrap());
    assert!(phases[0] > 0.0 && phases.iter().all(|count| *count == phases[0]), "{phases:?}");
    assert_eq!(value("vllm:prefix_cache_queries_total"), 260.0, "the name with Prometheus' suffix");
}

#[tokio::test(flavor = "multi_thread")]
async fn gauges_follow_the_batch() {
    let levers = Arc::default();
    let scheduler = start_as("gauges", Config { max_running: 1, kv_blocks: Some(10), ..config() }, &levers).await;
    levers.hold();
    let streams = futures::future::join_all((0..3).map(|n| scheduler.generate(request(prompt(n, 130), 400)))).await;
    levers.held().await;
    let told_all = |s: &moesaic_scheduler::Snapshot| s.running == 1 && s.waiting == 2 && s.kv_blocks_used >= 3;
    while !told_all(&scheduler.snapshot()) {
        levers.release();
        levers.hold();
        levers.held().await;
    }
    let gauge = |metric| told("gauges", metric, "").unwrap();
    assert_eq!((gauge(VLLM[0]), gauge(VLLM[1])), (1.0, 2.0));
    assert!((0.3..=1.0).contains(&gauge(VLLM[2])), "{}", gauge(VLLM[2]));
    drop(streams);
    levers.release();
    until_idle(&scheduler).await;
    assert_eq!((gauge(VLLM[0]), gauge(VLLM[1]), gauge(VLLM[2])), (0.0, 0.0, 0.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_a_stop_text_ends_is_no_cancellation() {
    let scheduler = start_as("left", config(), &Arc::default()).await;
    let leave = async |wanted: GenerateRequest, enough: bool| {
        let id = wanted.id.clone();
        let mut stream = scheduler.generate(wanted).await.unwrap();
        stream.next().await.unwrap().unwrap();
        if enough {
            scheduler.enough(&id);
        }
        drop(stream);
        let deadline = Instant::now() + PATIENCE;
        while scheduler.in_flight() > 0 {
            assert!(Instant::now() < deadline, "the engine did not see that the reader left");
            tokio::task::yield_now().await;
        }
    };
    let counts = || {
        let stopped = count("left", REQUEST_SUCCESS_TOTAL, "finished_reason=\"stop\"");
        let timed = count("left", &format!("{E2E_REQUEST_LATENCY_SECONDS}_count"), "");
        (stopped, timed, count("left", REQUESTS_CANCELLED_TOTAL, ""))
    };
    leave(request(prompt(1, 20), 1900), true).await;
    assert_eq!(counts(), (1.0, 1.0, 0.0));
    leave(request(prompt(1, 20), 1900), false).await;
    assert_eq!(counts(), (1.0, 1.0, 1.0));
    generate(&scheduler, request(prompt(1, 20), 3)).await.unwrap();
    assert_eq!(count("left", REQUEST_SUCCESS_TOTAL, "finished_reason=\"length\""), 1.0);
    assert_eq!(counts(), (1.0, 2.0, 1.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_failure_counts_once_under_its_reason() {
    let levers: Arc<Levers> = Arc::default();
    let scheduler = start_as("failures", Config { max_running: 1, max_waiting: 1, ..config() }, &levers).await;
    let refused = generate(&scheduler, request([], 1)).await.unwrap_err();
    assert_eq!(failures("failures", refused.code), 1.0);
    levers.fail.store(1, Ordering::SeqCst);
    generate(&scheduler, request([1], 1)).await.unwrap_err();
    levers.nan.store(1, Ordering::SeqCst);
    generate(&scheduler, request([1], 1)).await.unwrap_err();
    assert_eq!(failures("failures", ErrorCode::Internal), 2.0);
    // A deadline that passes while the engine is stuck: the reader is told at once, the engine finds it out later.
    levers.hold();
    let blocker = scheduler.generate(request([1], 2000)).await.unwrap();
    levers.held().await;
    let mut soon = request([2], 1);
    soon.deadline = Some(Instant::now() + Duration::from_millis(20));
    let overdue = scheduler.generate(soon).await.unwrap();
    let full = scheduler.generate(request([3], 1)).await.err().unwrap();
    assert_eq!((full.code, failures("failures", full.code)), (ErrorCode::ResourceExhausted, 1.0));
    let error = read(overdue).await.unwrap_err();
    assert_eq!((error.code, failures("failures", error.code)), (ErrorCode::DeadlineExceeded, 1.0));
    scheduler.panic_engine();
    levers.release();
    let error = read(blocker).await.unwrap_err();
    assert_eq!((error.code, failures("failures", error.code)), (ErrorCode::Unavailable, 1.0));
    until(&scheduler, |s| s.ready && s.restarts == 1).await;
    assert_eq!(failures("failures", ErrorCode::DeadlineExceeded), 1.0, "not counted again by the engine");
    assert_eq!(count("failures", REQUESTS_CANCELLED_TOTAL, ""), 0.0);
}
