//! Requests that wait in the line of a router's process, and what becomes of them when it is lost.
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use moesaic_tests::cluster::{Cluster, Member};
use moesaic_tests::until;
use std::thread;

const WAITING: &str = "moesaic_router_queue_waiting";
const RUNNING: &str = "vllm:num_requests_running";
/// So many tokens that others wait for long enough to be disturbed.
const LONG: usize = 4000;
const OTHERS: usize = 8;

/// One request runs, and as many as `OTHERS` wait: one at the scheduler, the others in the lines of two routers, of which
/// one is lost.
fn a_router_is_lost(lose: fn(&mut Member)) {
    let limits = "\n[scheduler]\nmax_running = 1\n[router]\nqueue_ahead = 1\n";
    let cluster = Cluster::start(1, limits).unwrap();
    let mut other = cluster.add("moesaic-router", "r1", &[]).unwrap();
    other.is_ready().unwrap();
    let want = cluster.complete("Others", 8).unwrap();
    let mut stream = cluster.stream("Once upon a time", LONG).unwrap();
    stream.read(5).unwrap();
    assert_eq!(cluster.schedulers[0].metric(RUNNING).unwrap(), 1.0);
    let cluster_ref = &cluster;
    thread::scope(|scope| {
        let others: Vec<_> = (0..OTHERS).map(|_| scope.spawn(|| cluster_ref.complete("Others", 8).unwrap())).collect();
        until("they wait at both routers", || {
            let (here, there) = (cluster_ref.router.metric(WAITING)?, other.metric(WAITING)?);
            Ok(here >= 2.0 && there >= 2.0 && here + there >= (OTHERS - 1) as f64)
        })
        .unwrap();
        lose(&mut other);
        until("all wait at the one that is left", || Ok(cluster_ref.router.metric(WAITING)? >= (OTHERS - 1) as f64))
            .unwrap();
        assert!(others.iter().all(|other| !other.is_finished()), "the first request runs still");
        stream.finish().unwrap();
        assert_eq!(stream.completion_tokens, Some(LONG as u64));
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
