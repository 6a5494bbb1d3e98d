//! The router's own process, told to stop.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use moesaic_testkit::{servers, until};
use moesaic_transport::RedisMetadata;
use moesaic_types::boundary::Metadata;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

/// A process that does not outlive the test.
struct Running(Mutex<Child>);

impl Running {
    fn has_ended_well(&self) -> bool {
        let ended = self.0.lock().unwrap().try_wait().unwrap();
        ended.is_some_and(|status| {
            assert!(status.success(), "{status}");
            true
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let child = self.0.get_mut().unwrap();
        // it may have ended already
        let _ = child.kill();
        let _ = child.wait();
    }
}

#[tokio::test]
async fn a_router_that_is_told_to_stop_leaves_the_lead_to_another_at_once() {
    let redis = servers::redis();
    let metadata = RedisMetadata::connect(&redis.url(), "drain").unwrap();
    let holder = || async { metadata.get("placement/leader").await.unwrap() };
    let port = servers::ports::free_with(&[1000]);
    let child = Command::new(env!("CARGO_BIN_EXE_moesaic-router"))
        .env("MOESAIC__CLUSTER__REDIS_URL", redis.url())
        // nobody is there: it goes on without events
        .env("MOESAIC__CLUSTER__NATS_URL", format!("nats://127.0.0.1:{}", servers::ports::free()))
        .env("MOESAIC__CLUSTER__KEY_PREFIX", "drain")
        .env("MOESAIC__ROUTER__GRPC", format!("127.0.0.1:{port}"))
        // longer than this test takes: it is not by its time that the lease ends
        .env("MOESAIC__ROUTER__PLACEMENT__LEASE", "1m")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let id = child.id();
    let router = Running(Mutex::new(child));
    until("it leads", || async { holder().await.is_some() }).await;
    assert!(Command::new("sh").args(["-c", &format!("kill -TERM {id}")]).status().unwrap().success());
    until("it has ended", || async { router.has_ended_well() }).await;
    assert_eq!(holder().await, None);
}
