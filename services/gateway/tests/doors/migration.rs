//! A replica fails in the middle of an answer: another goes on, and the client sees one answer.
use crate::scripted::Act;
use crate::server::{Doors, config, model};
use moesaic_config::HumanDuration;
use moesaic_gateway::Config;
use moesaic_proto::inference::v1 as wire;
use moesaic_types::Error;
use serde_json::{Value, json};

const MAX: usize = 12;

fn lost() -> Error {
    Error::unavailable("the engine restarted; send the request again")
}

fn ask(extra: Value) -> Value {
    let mut body = json!({"prompt": "Count:", "max_tokens": MAX, "temperature": 0, "seed": 3});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

/// The text of each choice of a streamed completion.
fn texts(events: &[Value], n: usize) -> Vec<String> {
    let mut texts = vec![String::new(); n];
    for event in events {
        assert!(event.get("error").is_none(), "{event}");
        for choice in event["choices"].as_array().unwrap() {
            texts[choice["index"].as_u64().unwrap() as usize] += choice["text"].as_str().unwrap();
        }
    }
    texts
}

/// What an answer that no replica interrupts looks like.
async fn undisturbed(body: &Value, n: usize) -> Vec<String> {
    let doors = Doors::open([vec![Act::Answer]]).await;
    let answer = doors.post("/v1/completions", body).await;
    texts(&answer.events(), n)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_goes_on_at_another_replica_without_a_token_twice_or_missing() {
    let body = ask(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let expected = undisturbed(&body, 1).await;
    for tokens_before in [0, 1, 5, MAX - 1] {
        for act in [Act::Fail(tokens_before, lost()), Act::BreakOff(tokens_before)] {
            let doors = Doors::open([vec![act.clone()], vec![Act::Answer]]).await;
            let events = doors.post("/v1/completions", &body).await.events();
            assert_eq!(texts(&events, 1), expected, "{act:?}");
            let usage = &events.last().unwrap()["usage"];
            assert_eq!(usage["completion_tokens"], MAX, "{usage}");
            let [first, second] = [0, 1].map(|i| doors.replicas[i].requests().remove(0));
            assert_eq!(usage["prompt_tokens"], first.prompt.len());
            assert_eq!(second.resumed_tokens, tokens_before);
            assert_eq!(second.prompt.len(), first.prompt.len() + tokens_before);
            assert_eq!(second.prompt[..first.prompt.len()], first.prompt[..]);
            assert_eq!(second.stop.max_tokens, MAX - tokens_before);
            assert_eq!((second.sampling, second.salt), (first.sampling, first.salt));
            doors.close().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_choice_goes_on_where_it_was() {
    let body = ask(json!({"n": 3, "stream": true}));
    let expected = undisturbed(&body, 3).await;
    assert_ne!(expected[0], expected[1], "choices draw with seeds of their own");
    let fails = vec![Act::Fail(2, lost()), Act::Answer, Act::Fail(7, lost())];
    let doors = Doors::open([fails, vec![Act::Answer]]).await;
    let events = doors.post("/v1/completions", &body).await.events();
    assert_eq!(texts(&events, 3), expected);
    let mut resumed: Vec<_> = doors.replicas[1].requests().iter().map(|request| request.resumed_tokens).collect();
    resumed.sort_unstable();
    assert_eq!(resumed, [2, 7]);
    // not streamed, too
    let doors = Doors::open([vec![Act::Fail(4, lost())], vec![Act::Answer]]).await;
    let whole = doors.post("/v1/completions", &ask(json!({"n": 3}))).await.json();
    let whole: Vec<_> = whole["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
    assert_eq!(whole, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grpc_stream_goes_on_at_another_replica() {
    let request = || wire::GenerateRequest {
        text: "Count:".into(),
        sampling: Some(wire::SamplingParams { max_tokens: Some(MAX as u32), seed: Some(3), ..Default::default() }),
        ..Default::default()
    };
    let mut answers = Vec::new();
    for acts in [vec![Act::Answer], vec![Act::Fail(5, lost())]] {
        let doors = Doors::open([acts, vec![Act::Answer]]).await;
        let mut stream = doors.client().await.generate(request()).await.unwrap().into_inner();
        let (mut text, mut ids, mut finish) = (String::new(), Vec::new(), None);
        while let Some(piece) = stream.message().await.unwrap() {
            text += &piece.text;
            ids.extend(piece.tokens.iter().map(|token| token.id));
            finish = piece.finish.or(finish);
        }
        let usage = finish.unwrap().usage.unwrap();
        assert_eq!((usage.completion_tokens, ids.len()), (MAX as u32, MAX));
        answers.push((text, ids, usage));
        drop(stream);
        doors.close().await;
    }
    assert_eq!(answers[0], answers[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_has_sent_all_is_not_missed() {
    // its last tokens came, its last piece did not: there is nothing left to ask of another
    let body = ask(json!({"stream": true}));
    let expected = undisturbed(&body, 1).await;
    let doors = Doors::open([vec![Act::Fail(MAX, lost())], vec![Act::Answer]]).await;
    let events = doors.post("/v1/completions", &body).await.events();
    assert_eq!(texts(&events, 1), expected);
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
    assert!(doors.replicas[1].requests().is_empty());
}

/// Doors where nobody waits for a replica to come back.
async fn impatient<const N: usize>(replicas: [Vec<Act>; N]) -> Doors {
    let config = Config { migration_patience: HumanDuration::default(), ..config() };
    Doors::with(config, model(), replicas).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_failed_is_asked_again_once_another_has_sent_a_token() {
    let body = ask(json!({"stream": true}));
    let expected = undisturbed(&body, 1).await;
    // as in a rolling restart: each is lost in turn, more often than a request is tried without a token
    let one = vec![Act::Fail(3, lost()), Act::Fail(1, lost()), Act::Answer];
    let doors = impatient([one, vec![Act::Fail(1, lost()), Act::Fail(2, lost())]]).await;
    let events = doors.post("/v1/completions", &body).await.events();
    assert_eq!(texts(&events, 1), expected);
    let resumed = |i: usize| -> Vec<usize> { doors.replicas[i].requests().iter().map(|r| r.resumed_tokens).collect() };
    assert_eq!((resumed(0), resumed(1)), (vec![0, 4, 7], vec![3, 5]));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_waits_for_a_replica_to_come_back() {
    let body = ask(json!({"stream": true}));
    let expected = undisturbed(&body, 1).await;
    let starting = || Act::Refuse(Error::unavailable("the engine is starting"));
    let doors = Doors::open([vec![Act::Fail(3, lost()), starting(), starting(), Act::Answer]]).await;
    let events = doors.post("/v1/completions", &body).await.events();
    assert_eq!(texts(&events, 1), expected);
    // not beyond its deadline
    let mut body = ask(json!({"stream": true}));
    body["deadline_ms"] = 300.into();
    let doors = Doors::open([vec![Act::Fail(3, lost()), starting()]]).await;
    let events = doors.post("/v1/completions", &body).await.events();
    assert_eq!(events.last().unwrap()["error"]["code"], "deadline_exceeded", "{events:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_takes_replicas_down_is_given_up() {
    let doors = Doors::open([vec![Act::Fail(0, lost())], vec![Act::Fail(0, lost())]]).await;
    assert_eq!(doors.post("/v1/completions", &ask(json!({}))).await.status, 503);
    let asked: usize = doors.replicas.iter().map(|replica| replica.requests().len()).sum();
    assert_eq!(asked, config().attempts);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_all_replicas_gone_the_failure_is_told() {
    let gone = || Act::Refuse(Error::unavailable("the engine is starting"));
    let both = || [vec![Act::Fail(3, lost()), gone()], vec![Act::Fail(1, lost()), gone()]];
    let doors = impatient([vec![Act::Fail(0, lost()), Act::Answer], vec![Act::Fail(0, lost()), Act::Answer]]).await;
    let whole = doors.post("/v1/completions", &ask(json!({}))).await;
    assert_eq!(whole.status, 503, "{}", whole.text());
    let error = &whole.json()["error"];
    assert_eq!((&error["type"], &error["code"]), (&json!("server_error"), &json!("unavailable")));
    assert_eq!(error["message"], lost().message);
    assert_eq!(whole.header("retry-after"), Some("1"));
    assert_eq!(doors.post("/v1/completions", &ask(json!({}))).await.status, 200, "the next one is served");

    let doors = impatient(both()).await;
    let events = doors.post("/v1/completions", &ask(json!({"stream": true}))).await.events();
    let (last, before) = events.split_last().unwrap();
    assert_eq!(last["error"]["code"], "unavailable", "{last}");
    assert_eq!(before.len(), 4, "the tokens of both replicas came first");

    let doors = Doors::open([vec![Act::Refuse(lost())], vec![Act::Refuse(lost())]]).await;
    assert_eq!(doors.post("/v1/completions", &ask(json!({"stream": true}))).await.status, 503, "before the first byte");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grammar_that_fails_in_the_middle_is_the_clients_field_in_a_stream_too() {
    let complex = || Error::invalid("regex", "regex is too complex to follow");
    let doors = Doors::open([vec![Act::Fail(2, complex())]]).await;
    let mut body = ask(json!({"guided_regex": "a+", "stream": true}));
    let events = doors.post("/v1/completions", &body).await.events();
    let error = &events.last().unwrap()["error"];
    assert_eq!((&error["param"], &error["code"]), (&json!("guided_regex"), &json!("invalid_argument")));
    body["stream"] = false.into();
    let whole = doors.post("/v1/completions", &body).await;
    assert_eq!((whole.status, &whole.json()["error"]["param"]), (400, &json!("guided_regex")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_replica_sends_the_request_on_and_all_full_is_told() {
    let full = || Error::exhausted("the queue is full: 2 requests wait already", std::time::Duration::from_secs(3));
    let doors = Doors::open([vec![Act::Refuse(full())], vec![Act::Answer]]).await;
    assert_eq!(doors.post("/v1/completions", &ask(json!({}))).await.status, 200);
    let doors = Doors::open([vec![Act::Refuse(full())], vec![Act::Refuse(full())]]).await;
    let answer = doors.post("/v1/completions", &ask(json!({}))).await;
    assert_eq!(answer.status, 429, "{}", answer.text());
    assert_eq!(answer.header("retry-after"), Some("3"));
    assert_eq!(answer.json()["error"]["type"], "rate_limit_error");
    // a request that lost its replica finds the other full
    let doors = impatient([vec![Act::Fail(2, lost())], vec![Act::Refuse(full())]]).await;
    assert_eq!(doors.post("/v1/completions", &ask(json!({}))).await.status, 503);
}
