//! Requests that wait in the line of a router's process, and what becomes of them when it is lost.
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use futures::StreamExt;
use moesaic_tests::cluster::{Cluster, Member};
use moesaic_tests::until;
use moesaic_transport::GrpcReplica;
use moesaic_transport::channel::to_address;
use moesaic_types::boundary::Replica;
use moesaic_types::{GenerateRequest, Priority, RequestId, SamplingParams, StopConditions, TenantSalt};
use std::thread;
use tokio::runtime::Runtime;

const WAITING: &str = "moesaic_router_queue_waiting";
const WAITING_THERE: &str = "vllm:num_requests_waiting";
/// Requests at the scheduler beside the one that runs, so that it is full also when one of them ends.
const HOLDERS: usize = 4;
/// Who waits in each router's line at least.
const EACH: f64 = 3.0;
/// Others at most: those that come before their router heard that the scheduler is full wait there.
const MOST: usize = 200;

/// Takes the scheduler's only place, past all routers, until what is returned is dropped: requests that go before all
/// others, one after the other.
fn hold(scheduler: &Member) -> Runtime {
    let runtime = Runtime::new().unwrap();
    let address = format!("http://{}", scheduler.grpc);
    let replica = runtime.block_on(async { GrpcReplica::new("s0", to_address(&address).unwrap()) });
    for holder in 0..=HOLDERS {
        let replica = replica.clone();
        runtime.spawn(async move {
            for number in 0.. {
                let mut deltas = replica.generate(held(&format!("{holder}-{number}"))).await.unwrap();
                while let Some(delta) = deltas.next().await {
                    delta.unwrap();
                }
            }
        });
    }
    runtime
}

fn held(id: &str) -> GenerateRequest {
    GenerateRequest {
        id: RequestId::new(id),
        prompt: (1..9).collect(),
        resumed_tokens: 0,
        sampling: SamplingParams::greedy(),
        stop: StopConditions { max_tokens: 4000, ignore_eos: true, ..Default::default() },
        top_logprobs: None,
        prompt_logprobs: false,
        grammar: None,
        priority: Priority(100),
        deadline: None,
        salt: TenantSalt::derive(b"secret", "holders"),
        traceparent: None,
    }
}

/// The scheduler's place is taken, and others wait in the lines of two routers, of which one is lost.
fn a_router_is_lost(lose: fn(&mut Member)) {
    // nobody is let in before a holder because it waited for long
    let limits = "\n[scheduler]\nmax_running = 1\npromote_after_ms = 3600000\n[router]\nqueue_ahead = 1\ncanary_interval = \"0s\"\n";
    let cluster = Cluster::start(1, limits).unwrap();
    let mut other = cluster.add("moesaic-router", "r1", &[]).unwrap();
    other.is_ready().unwrap();
    let want = cluster.complete("Others", 8).unwrap();
    let holders = hold(&cluster.schedulers[0]);
    until("the scheduler is full", || Ok(cluster.schedulers[0].metric(WAITING_THERE)? >= (HOLDERS - 1) as f64))
        .unwrap();
    let cluster_ref = &cluster;
    thread::scope(|scope| {
        let mut others = Vec::new();
        let mut waiting = 0.0;
        until("they wait at both routers", || {
            let (here, there) = (cluster_ref.router.metric(WAITING)?, other.metric(WAITING)?);
            waiting = here + there;
            let is_enough = here >= EACH && there >= EACH;
            if !is_enough && others.len() < MOST {
                others.push(scope.spawn(move || cluster_ref.complete("Others", 8).unwrap()));
            }
            Ok(is_enough)
        })
        .unwrap();
        lose(&mut other);
        until("all wait at the one that is left", || Ok(cluster_ref.router.metric(WAITING)? >= waiting)).unwrap();
        assert!(others.iter().all(|other| !other.is_finished()), "the scheduler's place is taken");
        holders.shutdown_background();
        for other in others {
            assert_eq!(other.join().unwrap(), want);
        }
    });
    assert_eq!(cluster.router.metric(WAITING).unwrap(), 0.0);
}

#[test]
fn requests_in_the_line_of_a_router_that_is_killed_stand_in_another_s() {
    a_router_is_lost(|router| router.kill().unwrap());
}

#[test]
fn requests_in_the_line_of_a_router_that_hangs_stand_in_another_s() {
    a_router_is_lost(|router| router.freeze().unwrap());
}
