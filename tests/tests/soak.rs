//! Many clients that stream, some of which hang up, for a minute: nothing leaks, nothing fails.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails there, and prints its seed")]
use moesaic_tests::process::Server;
use moesaic_tests::{http, until};
use serde_json::json;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const CLIENTS: u64 = 64;
/// Memory may differ by this much from a third of the time to the end (allocator, caches).
const MEMORY_SLACK: u64 = 24 << 20;

/// Seconds that the clients go on; the minute by default.
fn seconds() -> u64 {
    std::env::var("MOESAIC_SOAK_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(60)
}

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

#[test]
fn clients_that_stream_and_hang_up_leave_nothing_behind() {
    let seed = std::process::id() as u64;
    println!("seed {seed}");
    // small enough that blocks and stored prefixes fill up long before the first look at the memory
    let mut server = Server::start(&["--set", "scheduler.kv_blocks=256", "--set", "kv_store.capacity=8MiB"]).unwrap();
    let (finished, cut) = (AtomicU64::new(0), AtomicU64::new(0));
    let started = Instant::now();
    let length = Duration::from_secs(seconds());
    // on a slow machine they go on until there was enough of both
    let is_over = |finished: &AtomicU64, cut: &AtomicU64| {
        let (finished, cut) = (finished.load(Ordering::Relaxed), cut.load(Ordering::Relaxed));
        started.elapsed() >= length && finished > CLIENTS && cut > CLIENTS / 2
    };
    let mut settled = None;
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let (finished, cut, address) = (&finished, &cut, server.http);
                scope.spawn(move || {
                    let mut random = Random(seed * CLIENTS + client + 1);
                    while !is_over(finished, cut) {
                        let prompt = "blocks of keys and values ".repeat(1 + random.below(40) as usize);
                        let body = json!({
                            "prompt": format!("{} {prompt}", random.below(8)),
                            "max_tokens": 1 + random.below(120),
                            "temperature": 0.8,
                            "ignore_eos": true,
                            "stream": true,
                        });
                        let hang_up = random.below(3) == 0;
                        let pieces = if hang_up { random.below(20) } else { u64::MAX };
                        let body = body.to_string();
                        let mut answer = http::send(address, "POST", "/v1/completions", Some(body.as_bytes())).unwrap();
                        let status = answer.status;
                        assert!(status == 200, "{status} {:?}", answer.text());
                        let mut done = false;
                        for _ in 0..pieces {
                            let Some(event) = answer.event().unwrap() else { break };
                            assert!(!event.contains("\"error\""), "{event}");
                            done = event == "[DONE]";
                        }
                        assert!(done || hang_up, "a stream ends with [DONE]");
                        if done { finished } else { cut }.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        while !is_over(&finished, &cut) && !clients.iter().any(|client| client.is_finished()) {
            if settled.is_none() && started.elapsed() > length / 3 {
                settled = Some(server.resident_bytes().unwrap());
            }
            std::thread::sleep(Duration::from_millis(100)); // between two looks at the clock
        }
    });
    let end = server.resident_bytes().unwrap();
    let idle = |server: &Server| {
        ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
            .map(|name| server.metric(name).unwrap().unwrap_or(f64::NAN))
    };
    until("it is idle", || Ok(idle(&server) == [0.0; 3]))
        .unwrap_or_else(|error| panic!("{error}: {:?}\n{}", idle(&server), server.log()));
    let (finished, cut, settled) = (finished.into_inner(), cut.into_inner(), settled.unwrap());
    println!("{finished} finished, {cut} hung up; memory {settled} at a third, {end} at the end");
    assert!(end < settled + MEMORY_SLACK, "memory grew from {settled} to {end}");
    assert!(server.terminate().unwrap().success());
}
