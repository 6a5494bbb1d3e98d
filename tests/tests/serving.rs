//! `moesaic up` as a process: the reference's answers, bit-stable sampling, and a stop that loses nothing.
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use moesaic_tests::process::Server;
use moesaic_tests::{http, root};
use serde_json::{Value, json};

fn chats() -> Vec<(Value, String)> {
    let text = std::fs::read_to_string(root().join("deploy/models/demo-moe/chat_golden.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&text).unwrap();
    let case = |case: Value| (case["messages"].clone(), case["greedy_text"].as_str().unwrap().to_owned());
    cases.into_iter().map(case).collect()
}

#[test]
fn greedy_answers_equal_the_reference_on_both_backends_with_little_memory_for_blocks() {
    for flags in [
        &["--weights", "f32", "--kv", "f32"][..],
        &["--backend", "candle"],
        // so few blocks and so small steps that requests are chunked, wait and are preempted
        &["--weights", "f32", "--set", "scheduler.kv_blocks=8", "--set", "scheduler.token_budget=72"],
    ] {
        let mut server = Server::start(flags).unwrap();
        let address = server.http;
        std::thread::scope(|scope| {
            for (messages, want) in chats() {
                scope.spawn(move || {
                    let body = json!({"messages": messages, "temperature": 0, "max_tokens": 96});
                    let (status, answer) = http::post(address, "/v1/chat/completions", &body).unwrap();
                    assert_eq!(status, 200, "{answer}");
                    assert_eq!(answer["choices"][0]["message"]["content"], want.as_str(), "{flags:?}");
                });
            }
        });
        assert!(server.terminate().unwrap().success());
    }
}

#[test]
fn a_stop_lets_a_running_stream_finish() {
    let mut server = Server::start(&[]).unwrap();
    let body = json!({"prompt": "Once", "max_tokens": 2000, "temperature": 1, "ignore_eos": true, "stream": true});
    let mut answer = http::send(server.http, "POST", "/v1/completions", Some(body.to_string().as_bytes())).unwrap();
    answer.event().unwrap().unwrap();
    server.signal("TERM").unwrap();
    let mut last = String::new();
    let mut before_last = String::new();
    while let Some(event) = answer.event().unwrap() {
        before_last = std::mem::replace(&mut last, event);
    }
    assert_eq!(last, "[DONE]");
    let end: Value = serde_json::from_str(&before_last).unwrap();
    assert_eq!(end["choices"][0]["finish_reason"], "length");
    assert!(server.ended().unwrap().success());
}
