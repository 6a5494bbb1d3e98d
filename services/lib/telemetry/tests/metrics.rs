//! What Prometheus reads. One test: the recorder is the process's.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)] // A test fails by panicking, in its helpers too.
use moesaic_telemetry::metrics::{self as names, install, render};
use std::time::{SystemTime, UNIX_EPOCH};

#[test]
fn names_appear_verbatim_with_help_type_and_buckets() {
    assert_eq!(render(), "");
    install().unwrap();
    install().unwrap();
    for (name, kind, _) in names::ALL {
        match *kind {
            "counter" => metrics::counter!(*name).increment(3),
            "gauge" => metrics::gauge!(*name).set(0.5),
            _ => metrics::histogram!(*name).record(0.03),
        }
    }
    metrics::counter!(names::ACTOR_RESTARTS_TOTAL, "actor" => "prefix-index").increment(1);
    let text = render();
    let has = |line: &str| assert!(text.lines().any(|l| l == line), "no line '{line}' in\n{text}");
    for (name, kind, help) in names::ALL {
        has(&format!("# TYPE {name} {kind}"));
        has(&format!("# HELP {name} {help}"));
        match *kind {
            "counter" => has(&format!("{name} 3")),
            "gauge" => has(&format!("{name} 0.5")),
            _ => {
                has(&format!("{name}_count 1"));
                has(&format!("{name}_sum 0.03"));
                has(&format!("{name}_bucket{{le=\"+Inf\"}} 1"));
            }
        }
    }
    has("vllm:num_requests_running 0.5");
    has("vllm:time_to_first_token_seconds_bucket{le=\"0.02\"} 0");
    has("vllm:time_to_first_token_seconds_bucket{le=\"0.04\"} 1");
    has("moesaic_step_tokens_bucket{le=\"1\"} 1");
    has("moesaic_actor_restarts_total{actor=\"prefix-index\"} 1");
    // Dashboards read these with the suffix that Prometheus clients add.
    has("vllm:prefix_cache_queries_total 3");
    has("# TYPE vllm:prefix_cache_hits_total counter");
    assert!(text.contains("moesaic_build_info{version=\"") && text.contains("commit=\""), "{text}");
    let value = |name: &str| -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in\n{text}")).parse().unwrap()
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    let started = value("process_start_time_seconds");
    // The kernel counts it in ticks since a boot whose time it rounds.
    assert!((now - 3600.0..=now + 2.0).contains(&started), "started at {started}, now is {now}");
    assert!(value("process_resident_memory_bytes") > 1e6);
    has("# TYPE process_cpu_seconds_total counter");
}
