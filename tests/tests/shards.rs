//! Experts in processes of their own: expert parallel x tensor parallel, placed by the router, lost and back again.
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use moesaic_testkit::servers;
use moesaic_tests::cluster::Cluster;
use moesaic_tests::process::Server;
use moesaic_tests::steady::Steady;
use moesaic_tests::{http, until};
use serde_json::json;

const PROMPT: &str = "Once upon a time";
/// Tokens of an answer.
const LONG: usize = 400;
/// As many as a sequence has.
const LONGEST: usize = 4000;
/// Clients whose answers are disturbed: at any time several of them are in one.
const CLIENTS: usize = 3;
const EPOCH: &str = "moesaic_placement_epoch";
const EXPERT_TOKENS: &str = "moesaic_expert_tokens_total";
const STEP_RETRIES: &str = "moesaic_step_retries_total";
const MIGRATIONS: &str = "moesaic_migrations_total";

/// What one process answers.
fn undisturbed(tokens: usize) -> String {
    let server = Server::start(&["--weights", "f32", "--kv", "f32", "--threads", "1"]).unwrap();
    let body = json!({"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": true});
    let (status, answer) = http::post(server.http, "/v1/completions", &body).unwrap();
    assert_eq!(status, 200, "{answer}");
    answer["choices"][0]["text"].as_str().unwrap().to_owned()
}

#[test]
fn every_grid_answers_as_one_process_does() {
    let want = undisturbed(LONG);
    for (groups, ranks) in [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)] {
        let mut cluster = Cluster::start_with_shards(2, groups, ranks, "").unwrap();
        assert_eq!(cluster.complete(PROMPT, LONG).unwrap(), want, "{groups} groups of {ranks}");
        for shard in &cluster.shards {
            assert!(shard.metric(EXPERT_TOKENS).unwrap() > 0.0, "a shard without work: {}", shard.log());
        }
        let shard = &mut cluster.shards[0];
        shard.terminate().unwrap();
        assert!(shard.ended().unwrap().success(), "{}", shard.log());
    }
}

fn steady(cluster: &Cluster, want: &str) -> Steady {
    Steady::start(cluster, CLIENTS, PROMPT, LONG, want).unwrap()
}

#[test]
fn a_killed_shard_s_copies_answer_and_it_comes_back() {
    let mut cluster = Cluster::start_with_shards(1, 2, 1, "min_copies = 2").unwrap();
    let want = undisturbed(LONG);
    let mut clients = steady(&cluster, &want);
    cluster.shards[0].kill().unwrap();
    // everything goes to the other meanwhile
    clients.go_on().unwrap();
    cluster.shards[0].restart().unwrap();
    cluster.shards[0].is_ready().unwrap();
    until("the shard that came back works", || Ok(cluster.shards[0].metric(EXPERT_TOKENS)? > 0.0)).unwrap();
    clients.go_on().unwrap();
    clients.finish().unwrap();
}

#[test]
fn frozen_processes_are_passed_over_and_used_again() {
    let cluster = Cluster::start_with_shards(2, 2, 1, "min_copies = 2").unwrap();
    let want = undisturbed(LONG);
    let mut clients = steady(&cluster, &want);
    cluster.shards[0].freeze().unwrap();
    clients.go_on().unwrap();
    cluster.shards[0].thaw().unwrap();
    let before = cluster.shards[0].metric(EXPERT_TOKENS).unwrap();
    until("the shard works again", || Ok(cluster.shards[0].metric(EXPERT_TOKENS)? > before)).unwrap();

    let busy = cluster.becomes_busy().unwrap();
    cluster.schedulers[busy].freeze().unwrap();
    until("answers go on at the other", || Ok(cluster.gateway.metric(MIGRATIONS)? > 0.0)).unwrap();
    clients.go_on().unwrap();
    cluster.schedulers[busy].thaw().unwrap();
    clients.finish().unwrap();

    // who is placed already goes on, and who comes waits until it is back
    let mut stream = cluster.stream(PROMPT, LONG).unwrap();
    stream.read(20).unwrap();
    cluster.router.freeze().unwrap();
    stream.finish().unwrap();
    assert_eq!(stream.text, want, "a frozen router");
    cluster.router.thaw().unwrap();
    until("requests are placed again", || Ok(cluster.complete(PROMPT, LONG).is_ok_and(|text| text == want))).unwrap();
}

#[test]
fn a_stream_waits_for_a_shard_that_nobody_replaces() {
    let mut cluster = Cluster::start_with_shards(1, 2, 1, "").unwrap();
    let want = undisturbed(LONG);
    let mut clients = steady(&cluster, &want);
    cluster.shards[1].kill().unwrap();
    until("steps wait for the lost experts", || Ok(cluster.schedulers[0].metric(STEP_RETRIES)? > 0.0)).unwrap();
    cluster.shards[1].restart().unwrap();
    clients.go_on().unwrap();
    clients.finish().unwrap();
}

#[test]
fn a_lost_group_s_experts_go_to_the_others() {
    let mut cluster = Cluster::start_with_shards(1, 2, 1, "lost_after = \"500ms\"").unwrap();
    let want = undisturbed(LONG);
    let before = cluster.router.metric(EPOCH).unwrap();
    let mut clients = steady(&cluster, &want);
    cluster.shards[1].kill().unwrap();
    until("experts are placed anew", || Ok(cluster.router.metric(EPOCH)? > before)).unwrap();
    clients.go_on().unwrap();
    clients.finish().unwrap();
}

#[test]
fn a_second_shard_of_a_place_takes_over_once_it_has_the_experts() {
    let mut cluster = Cluster::start_with_shards(1, 2, 1, "").unwrap();
    let want = undisturbed(LONG);
    let mut clients = steady(&cluster, &want);
    let place = ["group=0", "rank=0", "ranks=1"].map(|setting| format!("expert_shard.{setting}"));
    let mut second = cluster.add("moesaic-expert-shard", "e0-0-again", &place).unwrap();
    clients.go_on().unwrap();
    second.is_ready().unwrap();
    until("the later one works", || Ok(second.metric(EXPERT_TOKENS)? > 0.0)).unwrap();
    let first = &mut cluster.shards[0];
    first.terminate().unwrap();
    assert!(first.ended().unwrap().success(), "{}", first.log());
    clients.go_on().unwrap();
    clients.finish().unwrap();
    let retries = cluster.schedulers[0].metric(STEP_RETRIES).unwrap();
    assert_eq!(retries, 0.0, "experts were missing for a while: {}", cluster.schedulers[0].log());
}

#[test]
fn experts_are_placed_anew_by_their_load_without_a_trace_in_the_answers() {
    let by_load = "rebalance_interval = \"300ms\"\nmin_load = 1\nmin_gain = 0.01\nredundant_experts = 2";
    let cluster = Cluster::start_with_shards(2, 2, 1, by_load).unwrap();
    let want = undisturbed(LONG);
    let before = cluster.router.metric(EPOCH).unwrap();
    let mut clients = steady(&cluster, &want);
    until("experts are placed anew", || Ok(cluster.router.metric(EPOCH)? > before)).unwrap();
    clients.go_on().unwrap();
    clients.finish().unwrap();
    assert_eq!(cluster.complete(PROMPT, LONG).unwrap(), want);
}

#[test]
fn a_shard_that_is_told_to_stop_hands_its_experts_over_first() {
    let mut cluster = Cluster::start_with_shards(1, 2, 1, "").unwrap();
    let want = undisturbed(LONG);
    let before = cluster.router.metric(EPOCH).unwrap();
    let mut clients = steady(&cluster, &want);
    let leaving = &mut cluster.shards[1];
    leaving.terminate().unwrap();
    assert!(leaving.ended().unwrap().success(), "{}", leaving.log());
    assert!(!leaving.log().contains("nobody took the experts"), "{}", leaving.log());
    until("its experts went to the other", || Ok(cluster.router.metric(EPOCH)? > before)).unwrap();
    clients.go_on().unwrap();
    clients.finish().unwrap();
    let retries = cluster.schedulers[0].metric(STEP_RETRIES).unwrap();
    assert_eq!(retries, 0.0, "its experts were missing for a while: {}", cluster.schedulers[0].log());
}

#[test]
fn a_replica_in_two_stages_answers_as_one_process_does_and_outlives_a_lost_stage() {
    let model = "weights = \"f32\"\nkv = \"f32\"\n[scheduler]\nstages = 2";
    let mut cluster = Cluster::launch(1, model, servers::redis(), servers::nats()).unwrap();
    let own = ["scheduler.stage=1", "scheduler.stage_of=s0"].map(str::to_owned);
    let mut stage = cluster.add("moesaic-scheduler", "s0-1", &own).unwrap();
    cluster.is_ready().unwrap();
    stage.is_ready().unwrap();
    let want = undisturbed(LONG);
    assert_eq!(cluster.complete(PROMPT, LONG).unwrap(), want);
    // its keys and values go with it: what runs ends, and what comes later is served when it is back
    let mut streams: Vec<_> = (0..CLIENTS).map(|_| cluster.stream(PROMPT, LONGEST).unwrap()).collect();
    streams.iter_mut().for_each(|stream| stream.read(5).unwrap());
    stage.kill().unwrap();
    let mut lost = 0;
    for stream in &mut streams {
        let Err(error) = stream.finish() else {
            assert_eq!(stream.completion_tokens, Some(LONGEST as u64), "a part of an answer looks whole");
            continue;
        };
        let code = stream.error.as_ref().map(|error| &error["code"]);
        assert_eq!(code, Some(&json!("unavailable")), "{error:#}");
        lost += 1;
    }
    assert!(lost > 0, "all were over before the stage was lost");
    stage.restart().unwrap();
    stage.is_ready().unwrap();
    let answers = || Ok(cluster.complete(PROMPT, LONG).is_ok_and(|text| text == want));
    until("the replica serves again", answers).unwrap();
    stage.terminate().unwrap();
    assert!(stage.ended().unwrap().success(), "{}", stage.log());
}
