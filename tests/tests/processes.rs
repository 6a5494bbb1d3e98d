//! The services as processes of a cluster: the same answers as in one process, and no token lost when one of them, or
//! Redis or NATS, goes.
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use moesaic_tests::cluster::{Cluster, Streaming};
use moesaic_tests::process::{Server, program};
use moesaic_tests::steady::Steady;
use moesaic_tests::{http, until};
use serde_json::{Value, json};
use std::process::Command;

const PROMPT: &str = "Once upon a time";
/// Tokens of an answer.
const LONG: usize = 400;
/// As many as a sequence has.
const LONGEST: usize = 4000;
/// Clients whose answers are disturbed: at any time several of them are in one.
const CLIENTS: usize = 4;
const GENERATED: &str = "vllm:generation_tokens_total";
const MIGRATIONS: &str = "moesaic_migrations_total";

fn chat(address: std::net::SocketAddr) -> Value {
    let body = json!({"model": "demo-moe", "temperature": 0, "max_tokens": 64, "logprobs": true,
        "messages": [{"role": "user", "content": "What is the currency of Japan?"}]});
    let (status, mut answer) = http::post(address, "/v1/chat/completions", &body).unwrap();
    assert_eq!(status, 200, "{answer}");
    for own in ["id", "created"] {
        answer.as_object_mut().unwrap().remove(own).unwrap();
    }
    // what is cached depends on what was asked before
    answer["usage"].as_object_mut().unwrap().remove("prompt_tokens_details");
    answer
}

#[test]
fn answers_equal_those_of_one_process() {
    let mut cluster = Cluster::start(2, "weights = \"f32\"\nkv = \"f32\"").unwrap();
    let server = Server::start(&["--weights", "f32", "--kv", "f32", "--threads", "1"]).unwrap();
    let want = chat(server.http);
    // each scheduler has a turn
    for _ in 0..4 {
        assert_eq!(chat(cluster.http), want);
    }
    let models = |address| serde_json::from_str::<Value>(&http::get(address, "/v1/models").unwrap()).unwrap();
    assert_eq!(models(cluster.http)["data"][0]["max_model_len"], models(server.http)["data"][0]["max_model_len"]);

    // a replica that serves the model in another way takes none of this gateway's requests, nor breaks them
    let mut other = cluster.add("moesaic-scheduler", "other", &["model.weights=q8".to_owned()]).unwrap();
    other.is_ready().unwrap();
    for _ in 0..4 {
        assert_eq!(chat(cluster.http), want);
    }
    assert_eq!(other.metric(GENERATED).unwrap(), 0.0);
    for member in [&mut other, &mut cluster.gateway, &mut cluster.router, &mut cluster.schedulers[0]] {
        member.terminate().unwrap();
        assert!(member.ended().unwrap().success(), "{}", member.log());
    }
}

#[test]
fn streams_go_on_when_their_scheduler_is_killed_and_the_scheduler_comes_back() {
    let mut cluster = Cluster::start(2, "").unwrap();
    let want = cluster.complete(PROMPT, LONG).unwrap();
    let mut clients = Steady::start(&cluster, CLIENTS, PROMPT, LONG, &want).unwrap();
    let busy = cluster.becomes_busy().unwrap();
    cluster.schedulers[busy].kill().unwrap();
    until("answers go on at the other", || Ok(cluster.gateway.metric(MIGRATIONS)? > 0.0)).unwrap();
    clients.go_on().unwrap();

    cluster.schedulers[busy].restart().unwrap();
    cluster.schedulers[busy].is_ready().unwrap();
    until("the scheduler is used again", || {
        // another prompt: the other has what the clients ask
        cluster.complete("again", 1)?;
        Ok(cluster.schedulers[busy].metric(GENERATED)? > 0.0)
    })
    .unwrap();
    clients.finish().unwrap();
}

#[test]
fn a_scheduler_that_is_told_to_stop_ends_its_answers_and_takes_no_new_ones() {
    let mut cluster = Cluster::start(2, "").unwrap();
    let want = cluster.complete(PROMPT, LONG).unwrap();
    let mut clients = Steady::start(&cluster, CLIENTS, PROMPT, LONG, &want).unwrap();
    let busy = cluster.becomes_busy().unwrap();
    let other = 1 - busy;
    cluster.schedulers[busy].terminate().unwrap();
    assert!(cluster.schedulers[busy].ended().unwrap().success(), "{}", cluster.schedulers[busy].log());
    let before = cluster.schedulers[other].metric(GENERATED).unwrap();
    clients.go_on().unwrap();
    assert_eq!(cluster.gateway.metric(MIGRATIONS).unwrap(), 0.0, "answers were ended where they began");
    assert!(cluster.schedulers[other].metric(GENERATED).unwrap() > before, "new requests go to the other");
    clients.finish().unwrap();
}

#[test]
fn requests_go_on_without_redis_and_nats() {
    let mut cluster = Cluster::start(2, "").unwrap();
    let want = cluster.complete(PROMPT, 50).unwrap();
    cluster.redis.kill();
    cluster.nats.kill();
    let is_missed = |cluster: &Cluster| -> anyhow::Result<bool> {
        let (status, body) = cluster.schedulers[0].readiness()?;
        assert_eq!(status, 200, "{body}");
        assert_eq!(cluster.complete(PROMPT, 50)?, want);
        Ok(body["degraded"].as_array().is_some_and(|missing| missing.len() == 2))
    };
    until("redis and nats are missed", || is_missed(&cluster)).unwrap();
    // one is lost meanwhile, of which nobody is told
    cluster.schedulers[0].kill().unwrap();
    assert_eq!(cluster.complete(PROMPT, 50).unwrap(), want);
    cluster.redis.restart_empty();
    cluster.nats.restart();
    let nothing_is_missed = |cluster: &Cluster| -> anyhow::Result<bool> {
        assert_eq!(cluster.complete(PROMPT, 50)?, want);
        let (status, body) = cluster.schedulers[1].readiness()?;
        assert_eq!(status, 200, "{body}");
        Ok(body["degraded"].as_array().is_some_and(Vec::is_empty))
    };
    until("nothing is missed", || nothing_is_missed(&cluster)).unwrap();
    cluster.schedulers[0].restart().unwrap();
    cluster.schedulers[0].is_ready().unwrap();
    let is_used = || {
        assert_eq!(cluster.complete(PROMPT, 50)?, want);
        Ok(cluster.schedulers[0].metric(GENERATED)? > 0.0)
    };
    until("the one that came back is used", is_used).unwrap();
}

#[test]
fn processes_wait_for_redis_and_nats_and_say_so() {
    let (mut redis, mut nats) = (moesaic_testkit::servers::redis(), moesaic_testkit::servers::nats());
    redis.kill();
    nats.kill();
    let mut cluster = Cluster::launch(1, "", redis, nats).unwrap();
    let says = |cluster: &Cluster| -> anyhow::Result<bool> {
        for member in [&cluster.gateway, &cluster.router, &cluster.schedulers[0]] {
            let Ok((status, body)) = member.readiness() else { return Ok(false) };
            let reason = body["reason"].as_str().unwrap_or_default();
            assert_eq!(status, 503, "{body}");
            if !reason.contains("redis") {
                return Ok(false);
            }
            assert!(http::get(member.admin, "/live").is_ok());
        }
        Ok(true)
    };
    until("all say that redis is missing", || says(&cluster)).unwrap();
    let early = http::post(cluster.http, "/v1/completions", &json!({"prompt": "x"})).unwrap();
    assert_eq!(early.0, 503, "{}", early.1);
    cluster.redis.restart_empty();
    cluster.nats.restart();
    cluster.is_ready().unwrap();
    cluster.complete(PROMPT, 5).unwrap();
}

#[test]
fn a_kv_store_is_a_process_too_and_a_later_one_takes_its_name() {
    let cluster = Cluster::start(1, "").unwrap();
    let mut store = cluster.add("moesaic-kv-store", "k0", &[]).unwrap();
    store.is_ready().unwrap();
    let mut later = cluster.add("moesaic-kv-store", "k0", &[]).unwrap();
    later.is_ready().unwrap();
    assert_eq!(store.ended().unwrap().code(), Some(1), "{}", store.log());
    assert!(store.log().contains("cluster.id"), "{}", store.log());
    later.terminate().unwrap();
    assert!(later.ended().unwrap().success(), "{}", later.log());
}

#[test]
fn wrong_settings_are_refused_by_name_and_others_sections_are_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("moesaic.toml");
    std::fs::write(&file, "[expert_shard]\nnot_ours = 1\n[router]\nmailbox = 7\n").unwrap();
    for name in ["moesaic-gateway", "moesaic-router", "moesaic-scheduler", "moesaic-kv-store"] {
        let section = name.trim_start_matches("moesaic-").replace('-', "_");
        let run = |arguments: &[&str]| {
            Command::new(program(name).unwrap()).args(arguments).current_dir(folder.path()).output().unwrap()
        };
        let refuses = |set: &str, expected: &str| {
            let output = run(&["--set", set]);
            let error = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{error}");
            assert!(error.contains(expected) && error.starts_with(name), "{error}");
        };
        let dumped = String::from_utf8(run(&["--dump-config"]).stdout).unwrap();
        assert!(dumped.contains(&format!("[{section}]")) && !dumped.contains("not_ours"), "{dumped}");
        refuses(&format!("{section}.gprc=x"), &format!("{section}.grpc"));
        refuses(&format!("{section}.grpc=nowhere"), &format!("{section}.grpc"));
        refuses(&format!("{section}.drain_timeout=25h"), &format!("{section}.drain_timeout"));
        refuses("cluster.lease=1h", "cluster.lease");
        refuses("cluster.redis_url=http://x", "cluster.redis_url");
        refuses("sections.key=1", "sections.key");
    }
}

#[test]
fn a_second_signal_cuts_answers_off() {
    let mut cluster = Cluster::start(1, "").unwrap();
    let mut streams: Vec<_> = (0..CLIENTS).map(|_| cluster.stream(PROMPT, LONGEST).unwrap()).collect();
    streams.iter_mut().for_each(|stream| stream.read(5).unwrap());
    cluster.gateway.terminate().unwrap();
    until("it drains", || Ok(cluster.gateway.readiness()?.1["reason"] == "it is stopping")).unwrap();
    cluster.gateway.terminate().unwrap();
    assert_eq!(cluster.gateway.ended().unwrap().code(), Some(1), "{}", cluster.gateway.log());
    let is_cut = |stream: &mut Streaming| stream.finish().is_err() || stream.completion_tokens.is_none();
    assert!(streams.iter_mut().any(is_cut), "all were answered to the end");
}
