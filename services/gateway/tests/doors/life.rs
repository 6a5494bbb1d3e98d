//! The life of a request at the door: let in or refused, cut off, given up, timed out; and readiness.
use crate::client;
use crate::scripted::Act;
use crate::server::{Doors, MODEL, config, model};
use moesaic_config::HumanDuration;
use moesaic_gateway::Config;
use moesaic_proto::inference::v1 as wire;
use moesaic_types::ErrorCode;
use serde_json::{Value, json};
use std::time::Duration;
use tonic::Code;
use tonic_types::StatusExt;

fn ask(extra: Value) -> Value {
    let mut body = json!({"prompt": "Count:", "max_tokens": 4, "temperature": 0, "seed": 3});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn grpc(text: &str, deadline_ms: u32) -> wire::GenerateRequest {
    let sampling = wire::SamplingParams { max_tokens: Some(200), ignore_eos: true, ..Default::default() };
    wire::GenerateRequest { text: text.into(), sampling: Some(sampling), deadline_ms, ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_cancels_what_runs_for_it() {
    let doors = Doors::open([vec![Act::Hang(2)]]).await;
    let body = ask(json!({"stream": true})).to_string();
    let mut live = client::open(doors.http, "POST", "/v1/completions", &[], body.as_bytes()).await;
    assert!(live.event().await.unwrap().is_some());
    doors.replicas[0].until_open(1).await;
    drop(live);
    doors.replicas[0].until_closed().await;
    // one that waits for a whole answer, too
    let live = tokio::spawn({
        let (http, body) = (doors.http, ask(json!({})).to_string());
        async move { client::send(http, "POST", "/v1/completions", &[], body.as_bytes()).await }
    });
    doors.replicas[0].until_open(1).await;
    live.abort();
    doors.replicas[0].until_closed().await;
    // and by gRPC
    let mut stream = doors.client().await.generate(grpc("Count:", 0)).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    drop(stream);
    doors.replicas[0].until_closed().await;
    let admission = doors.core.admission.clone();
    moesaic_testkit::until("all places are given back", || async { admission.in_flight() == 0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_string_is_an_answer_s_end_and_a_hang_up_is_not() {
    let doors = Doors::open([vec![Act::Endless, Act::Hang(2)]]).await;
    let replica = &doors.replicas[0];
    let stopped = doors.post("/v1/completions", &ask(json!({"stop": ["twelve"], "max_tokens": 100}))).await;
    assert_eq!(stopped.json()["choices"][0]["finish_reason"], "stop", "{stopped:?}");
    replica.until_closed().await;
    let told = replica.enough.lock().unwrap().clone();
    assert_eq!(told, [replica.requests()[0].id.clone()]);

    let body = ask(json!({"stream": true})).to_string();
    let mut live = client::open(doors.http, "POST", "/v1/completions", &[], body.as_bytes()).await;
    assert!(live.event().await.unwrap().is_some());
    drop(live);
    replica.until_closed().await;
    assert_eq!(replica.enough.lock().unwrap().len(), 1, "who hangs up was not served to the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stops_reading_is_cut_off_and_does_not_take_a_part_for_the_whole() {
    let impatient = Config { write_timeout: HumanDuration::from_millis(300), ..config() };
    let doors = Doors::with(impatient, model(), [vec![Act::Endless]]).await;
    let body = ask(json!({"stream": true})).to_string();
    let mut live = client::open(doors.http, "POST", "/v1/completions", &[], body.as_bytes()).await;
    doors.replicas[0].until_open(1).await;
    doors.replicas[0].until_closed().await;
    let mut events = Vec::new();
    // the connection breaks, or the stream says why it ends; it never ends as if all was well
    while let Ok(Some(event)) = live.event().await {
        events.push(event);
    }
    let ended_well = events.iter().any(|event| event == "[DONE]") && !events.iter().any(|e| e.contains("\"error\""));
    assert!(!ended_well, "a cut-off answer looks whole: {:?}", events.last());

    let mut stream = doors.client().await.generate(grpc("Count:", 0)).await.unwrap().into_inner();
    doors.replicas[0].until_open(1).await;
    doors.replicas[0].until_closed().await;
    // an error of ours, or of the connection where its buffers were full
    while stream.message().await.is_ok_and(|piece| {
        assert!(piece.is_some(), "a cut-off stream ended well");
        true
    }) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_house_is_told_and_its_places_come_back() {
    let doors = Doors::with(Config { max_in_flight: 1, ..config() }, model(), [vec![Act::Hang(1)]]).await;
    let body = ask(json!({"stream": true})).to_string();
    let mut first = client::open(doors.http, "POST", "/v1/completions", &[], body.as_bytes()).await;
    assert!(first.event().await.unwrap().is_some());
    let refused = doors.post("/v1/completions", &ask(json!({}))).await;
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("1")), "{}", refused.text());
    let error = &refused.json()["error"];
    assert_eq!(error["type"], "rate_limit_error");
    assert!(error["message"].as_str().unwrap().contains("gateway.max_in_flight"), "{error}");
    let status = doors.client().await.generate(grpc("Count:", 0)).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(status.get_details_retry_info().unwrap().retry_delay, Some(Duration::from_secs(1)));
    drop(first);
    doors.replicas[0].until_closed().await;
    let admission = doors.core.admission.clone();
    moesaic_testkit::until("the place is given back", || async { admission.in_flight() == 0 }).await;
    let next = client::open(doors.http, "POST", "/v1/completions", &[], body.as_bytes()).await;
    assert_eq!(next.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_of_requests_waits_to_be_read_and_is_not_refused() {
    let doors = Doors::with(Config { text_threads: 1, ..config() }, model(), [vec![Act::Answer]]).await;
    let body = ask(json!({"prompt": "word ".repeat(60), "user": "u".repeat(2700), "max_tokens": 1})).to_string();
    let asked = (0..600).map(|_| client::send(doors.http, "POST", "/v1/completions", &[], body.as_bytes()));
    let answers = futures::future::join_all(asked).await;
    let refused: Vec<_> = answers.iter().filter(|answer| answer.status != 200).collect();
    assert!(refused.is_empty(), "{} refused, first: {:?}", refused.len(), refused.first());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doors_keeper_comes_back_after_a_panic_and_keeps_count() {
    let doors = Doors::with(Config { max_in_flight: 2, ..config() }, model(), [vec![Act::Hang(1)]]).await;
    let body = ask(json!({"stream": true})).to_string();
    let open = || client::open(doors.http, "POST", "/v1/completions", &[], body.as_bytes());
    let mut before = open().await;
    assert!(before.event().await.unwrap().is_some());
    let error = doors.core.admission.inject_panic().await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable, "an ask in flight gets a clear error: {error}");
    assert_eq!(doors.core.admission.restarts(), 1);
    // a fresh keeper still knows who is inside
    let after = open().await;
    assert_eq!(after.status, 200);
    assert_eq!(open().await.status, 429);
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_hold_even_where_a_replica_does_not_keep_them() {
    for act in [Act::Silent, Act::Hang(0), Act::Hang(1)] {
        let doors = Doors::open([vec![act.clone()]]).await;
        let answer = doors.post("/v1/completions", &ask(json!({"deadline_ms": 50}))).await;
        assert_eq!(answer.status, 504, "{act:?}: {}", answer.text());
        assert_eq!(answer.json()["error"]["code"], "deadline_exceeded");
        let message = answer.json()["error"]["message"].to_string();
        assert!(message.contains("deadline_ms"), "{message}");
        let mut client = doors.client().await;
        let status = match client.generate(grpc("Count:", 50)).await {
            Err(status) => status,
            Ok(stream) => {
                let mut stream = stream.into_inner();
                loop {
                    match stream.message().await {
                        Ok(piece) => assert!(piece.is_some(), "it ended well"),
                        Err(status) => break status,
                    }
                }
            }
        };
        assert_eq!(status.code(), Code::DeadlineExceeded, "{act:?}: {status:?}");
        doors.replicas[0].until_closed().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cached_tokens_are_told_however_an_answer_ends() {
    let doors = Doors::open([vec![Act::Answer]]).await;
    let whole = doors.post("/v1/completions", &ask(json!({"max_tokens": 8}))).await.json();
    let text = whole["choices"][0]["text"].as_str().unwrap().to_owned();
    let stop = text.split_whitespace().nth(2).unwrap().to_owned();
    let stopped = doors.post("/v1/completions", &ask(json!({"max_tokens": 8, "stop": stop}))).await.json();
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop", "{stopped}");
    for answer in [&whole, &stopped] {
        assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 2, "{answer}");
    }
    let used = stopped["usage"]["completion_tokens"].as_u64().unwrap();
    assert!((1..8).contains(&used), "{stopped}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_text_does_not_end_an_answer_before_its_least_length() {
    let doors = Doors::open([vec![Act::Answer]]).await;
    let whole = doors.post("/v1/completions", &ask(json!({"max_tokens": 40}))).await.json();
    let text = whole["choices"][0]["text"].as_str().unwrap();
    // said again and again, as the script is
    let stop = text.split_whitespace().nth(1).unwrap();
    let all: Vec<_> = text.match_indices(stop).map(|(at, _)| at).collect();
    assert!(all.len() > 1, "{text}");
    let at_once = doors.post("/v1/completions", &ask(json!({"max_tokens": 40, "stop": stop}))).await.json();
    assert_eq!(at_once["choices"][0]["text"], text[..all[0]], "{at_once}");
    let first = at_once["usage"]["completion_tokens"].as_u64().unwrap();
    let later = ask(json!({"max_tokens": 40, "stop": stop, "min_tokens": first}));
    let later = doors.post("/v1/completions", &later).await.json();
    assert_eq!(later["choices"][0]["text"], text[..all[1]], "{later}");
    assert_eq!(later["choices"][0]["finish_reason"], "stop");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_text_that_only_the_end_completes_is_the_reason_of_the_end() {
    // the first byte of a character, at the answer's end: a replacement character
    let model = model();
    let start = (0..model.vocab as u32).find(|id| model.tokenizer.token_bytes(*id) == [0xc3]).unwrap();
    let said = [model.tokenizer.encode(" one", false).unwrap(), vec![start, 2]].concat();
    let doors = Doors::open([vec![Act::Say(said)]]).await;
    let mut client = doors.client().await;
    let sampling = wire::SamplingParams { stop: vec!["\u{fffd}".into()], ..Default::default() };
    let request = wire::GenerateRequest { text: "x".into(), sampling: Some(sampling), ..Default::default() };
    let mut stream = client.generate(request).await.unwrap().into_inner();
    let piece = stream.message().await.unwrap().unwrap();
    assert_eq!((piece.text.as_str(), piece.finish.unwrap().reason()), (" one", wire::FinishReason::Stop));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_prompt_alone_costs_no_token_of_an_answer() {
    let doors = Doors::open([vec![Act::Answer]]).await;
    let body = ask(json!({"echo": true, "max_tokens": 0, "logprobs": 1}));
    let whole = doors.post("/v1/completions", &body).await.json();
    assert_eq!((&whole["choices"][0]["text"], &whole["usage"]["completion_tokens"]), (&json!("Count:"), &json!(0)));
    let body = ask(json!({"echo": true, "max_tokens": 0, "stream": true, "stream_options": {"include_usage": true}}));
    let events = doors.post("/v1/completions", &body).await.events();
    assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_show_tokens_by_their_numbers_where_asked_for() {
    let doors = Doors::open([vec![Act::Answer]]).await;
    let body = ask(json!({"logprobs": 2, "return_tokens_as_token_ids": true}));
    let completion = doors.post("/v1/completions", &body).await.json();
    let logprobs = &completion["choices"][0]["logprobs"];
    let chat = json!({"messages": [{"role": "user", "content": "Count"}], "logprobs": true, "top_logprobs": 2,
        "max_tokens": 4, "seed": 3, "return_tokens_as_token_ids": true});
    let chat = doors.post("/v1/chat/completions", &chat).await.json();
    let content = &chat["choices"][0]["logprobs"]["content"][0];
    for token in [&logprobs["tokens"][0], &content["token"], &content["top_logprobs"][1]["token"]] {
        let id = token.as_str().and_then(|text| text.strip_prefix("token_id:")).unwrap_or_else(|| panic!("{token}"));
        assert!(id.parse::<u32>().is_ok(), "{token}");
    }
    assert!(logprobs["top_logprobs"][0].as_object().unwrap().keys().all(|key| key.starts_with("token_id:")));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unfinished_answer_is_gone_on_with() {
    let doors = Doors::open([vec![Act::Answer]]).await;
    let messages = json!([{"role": "user", "content": "Count."}, {"role": "assistant", "content": "one two "}]);
    let body = json!({"messages": messages, "max_tokens": 3, "continue_final_message": true});
    let answer = doors.post("/v1/chat/completions", &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let prompt = doors.core.models()[0].tokenizer.decode(&doors.replicas[0].requests()[0].prompt, false).unwrap();
    assert!(prompt.ends_with("assistant\none two"), "{prompt:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_comes_before_the_model_waits_for_it() {
    let mut doors = Doors::bare(config()).await;
    let early = tokio::spawn({
        let (http, body) = (doors.http, ask(json!({})).to_string());
        async move { client::send(http, "POST", "/v1/completions", &[], body.as_bytes()).await }
    });
    let counted = tokio::spawn({
        let mut client = doors.client().await;
        async move { client.tokenize(wire::TokenizeRequest { text: "Count:".into(), ..Default::default() }).await }
    });
    let hurried = tokio::spawn({
        let (http, body) = (doors.http, ask(json!({"deadline_ms": 5})).to_string());
        async move { client::send(http, "POST", "/v1/completions", &[], body.as_bytes()).await }
    });
    let admission = doors.core.admission.clone();
    moesaic_testkit::until("both were let in", || async { admission.in_flight() == 2 }).await;
    doors.core.wait_for("no replica serves the model");
    let too_long = vec![b' '; doors.core.config.body_limit.as_usize() + 1];
    let refused = client::send(doors.http, "POST", "/v1/completions", &[], &too_long).await;
    assert_eq!(refused.status, 413, "what no model would take does not wait");
    // the deadline of the one in a hurry passes
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(doors.get("/ready").await.status, 503, "readiness does not wait");
    assert!(!early.is_finished(), "it waits");
    doors.serve(model(), [vec![Act::Answer]]);
    let early = early.await.unwrap();
    assert_eq!(early.status, 200, "{}", early.text());
    let hurried = hurried.await.unwrap();
    assert_eq!(hurried.status, 504, "the wait counts: {}", hurried.text());
    assert!(!counted.await.unwrap().unwrap().into_inner().tokens.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_follows_the_model_and_its_replicas() {
    let impatient = Config { loading_patience: HumanDuration::default(), ..config() };
    let mut doors = Doors::bare(impatient).await;
    assert_eq!(doors.get("/live").await.status, 200);
    for path in ["/ready", "/health"] {
        assert_eq!(doors.get(path).await.status, 503, "{path} while the model loads");
    }
    let early = doors.post("/v1/completions", &ask(json!({}))).await;
    assert_eq!((early.status, early.header("retry-after")), (503, Some("1")));
    doors.serve(model(), [vec![Act::Answer]]);
    assert_eq!(doors.get("/ready").await.status, 200);
    *doors.replicas[0].ready.lock().unwrap() = false;
    let unready = doors.get("/ready").await;
    assert_eq!(unready.status, 503);
    assert!(unready.text().contains("the replica is starting"), "{}", unready.text());
    assert_eq!(doors.get("/live").await.status, 200, "nothing here must be restarted");
    *doors.replicas[0].ready.lock().unwrap() = true;
    assert_eq!(doors.get("/health").await.status, 200);
    doors.core.follow_life(std::sync::Arc::new(|| Err(moesaic_types::Error::unavailable("a step never ended"))));
    let dead = doors.get("/live").await;
    assert_eq!(dead.status, 503);
    assert!(dead.text().contains("a step never ended"), "{}", dead.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_id_is_kept_or_made_and_told_with_errors_too() {
    let doors = Doors::open([vec![Act::Answer]]).await;
    let body = ask(json!({})).to_string();
    let send = |headers: Vec<(&'static str, &'static str)>, path: &'static str| {
        let (http, body) = (doors.http, body.clone());
        async move { client::send(http, "POST", path, &headers, body.as_bytes()).await }
    };
    let kept = send(vec![("x-request-id", "client-7")], "/v1/completions").await;
    assert_eq!(kept.header("x-request-id"), Some("client-7"));
    let made = send(vec![("x-request-id", "not a good one")], "/v1/completions").await;
    assert_eq!(made.header("x-request-id").unwrap().len(), 36);
    assert_eq!(send(vec![("x-request-id", "e1")], "/nowhere").await.header("x-request-id"), Some("e1"));

    let mut client = doors.client().await;
    let mut request = tonic::Request::new(grpc("", 0));
    request.metadata_mut().insert("x-request-id", "grpc-9".parse().unwrap());
    let status = client.generate(request).await.unwrap_err();
    assert_eq!(status.metadata().get("x-request-id").unwrap(), "grpc-9");
    assert!(client.generate(grpc("Count:", 0)).await.unwrap().metadata().get("x-request-id").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_listed_and_named_one_by_one() {
    let doors = Doors::open([vec![Act::Answer]]).await;
    let list = doors.get("/v1/models").await.json();
    assert_eq!((&list["object"], &list["data"][0]["id"]), (&json!("list"), &json!(MODEL)));
    let one = doors.get(&format!("/v1/models/{MODEL}")).await;
    assert_eq!((one.status, &one.json()["id"]), (200, &json!(MODEL)), "a name may have a slash");
    let other = doors.get("/v1/models/other").await;
    assert_eq!((other.status, &other.json()["error"]["code"]), (404, &json!("model_not_found")));
}
