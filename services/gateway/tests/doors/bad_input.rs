//! Bad input: each mistake gets a status, a type, the field's name and its limit, and the server serves on.
use crate::client::{self, Answer};
use crate::scripted::Act;
use crate::server::{CONTEXT, Doors, MODEL, config, model};
use moesaic_config::ByteSize;
use moesaic_gateway::core::{Core, SamplingInput};
use moesaic_gateway::{Config, ServedModel};
use moesaic_proto::inference::v1 as wire;
use moesaic_types::RequestId;
use serde_json::{Value, json};
use std::sync::Arc;
use tonic::Code;
use tonic_types::StatusExt;

/// A mistake: what is set, the field that the error must name, and words that its message must have.
type Mistake = (Value, &'static str, &'static [&'static str]);

fn both_routes() -> Vec<Mistake> {
    let many: Vec<_> = (0..17).map(|i| i.to_string()).collect();
    vec![
        (json!({"model": 7}), "model", &["text"]),
        (json!({"temperature": -0.1}), "temperature", &["-0.1", "0 to 2"]),
        (json!({"temperature": 2.5}), "temperature", &["2.5", "0 to 2"]),
        (json!({"temperature": "hot"}), "temperature", &["number", "hot"]),
        (json!({"temperature": [1]}), "temperature", &["number"]),
        (json!({"top_p": 0}), "top_p", &["0", "1"]),
        (json!({"top_p": 1.5}), "top_p", &["1.5"]),
        (json!({"top_k": -2}), "top_k", &["-2"]),
        (json!({"min_p": 1}), "min_p", &["1"]),
        (json!({"repetition_penalty": 0}), "repetition_penalty", &["0", "10"]),
        (json!({"presence_penalty": 3}), "presence_penalty", &["3", "2"]),
        (json!({"frequency_penalty": -3}), "frequency_penalty", &["-3", "2"]),
        (json!({"n": 0}), "n", &["0", "1", "16"]),
        (json!({"n": 17}), "n", &["17", "16"]),
        (json!({"n": 1.5}), "n", &["whole number"]),
        (json!({"max_tokens": -1}), "max_tokens", &["whole number", "-1"]),
        (json!({"max_tokens": 0}), "max_tokens", &["0", "1"]),
        (json!({"max_tokens": 100_000}), "max_tokens", &["100000", "256"]),
        (json!({"max_completion_tokens": 100_000}), "max_completion_tokens", &["100000", "256"]),
        (json!({"min_tokens": 99, "max_tokens": 9}), "min_tokens", &["99", "9"]),
        (json!({"seed": "x"}), "seed", &["whole number"]),
        (json!({"stop": many}), "stop", &["17", "16"]),
        (json!({"stop": ["a", ""]}), "stop[1]", &["0 bytes", "256"]),
        (json!({"stop": ["x".repeat(257)]}), "stop[0]", &["257", "256"]),
        (json!({"stop": ["a", 7]}), "stop[1]", &["text"]),
        (json!({"stop_token_ids": [99_999_999]}), "stop_token_ids", &["99999999"]),
        (json!({"stop_token_ids": vec![1; 65]}), "stop_token_ids", &["65", "64"]),
        (json!({"logit_bias": {"5": 101}}), "logit_bias[5]", &["101", "100"]),
        (json!({"logit_bias": {"five": 1}}), "logit_bias", &["five"]),
        (json!({"logit_bias": {"99999999": 1}}), "logit_bias", &["99999999"]),
        (json!({"stream": "yes"}), "stream", &["true or false"]),
        (json!({"stream_options": {"include_usage": true}}), "stream_options", &["stream"]),
        (json!({"stream": true, "stream_options": 1}), "stream_options", &["object"]),
        (json!({"response_format": {"type": "xml"}}), "response_format.type", &["json_object"]),
        (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema.schema", &["object"]),
        (
            json!({"response_format": {"type": "json_object"}, "guided_regex": "a"}),
            "guided_regex",
            &["response_format"],
        ),
        (json!({"guided_choice": []}), "guided_choice", &["1", "256"]),
        (json!({"priority": 101}), "priority", &["101", "100"]),
        (json!({"deadline_ms": 86_400_001}), "deadline_ms", &["86400001", "86400000"]),
        (json!({"temprature": 1}), "temprature", &["temperature"]),
        (json!({"use_beam_search": true}), "use_beam_search", &["not"]),
    ]
}

/// A conversation with such calls in it.
fn call(calls: Value) -> Value {
    json!({"messages": [{"role": "assistant", "content": null, "tool_calls": calls}]})
}

fn chat_only() -> Vec<Mistake> {
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}});
    vec![
        (json!({"messages": []}), "messages", &["at least one"]),
        (json!({"messages": "hi"}), "messages", &["list"]),
        (json!({"messages": [{"role": "wizard", "content": "x"}]}), "messages[0].role", &["system", "user"]),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content", &["text"]),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages[0].content[0]",
            &["text"],
        ),
        (json!({"messages": [{"role": "user", "content": "word ".repeat(2 * CONTEXT)}]}), "messages", &["256"]),
        (json!({"top_logprobs": 5}), "top_logprobs", &["logprobs"]),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs", &["21", "20"]),
        (
            json!({"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "g"}}}),
            "tool_choice",
            &["g"],
        ),
        (json!({"tools": [{"type": "hammer"}]}), "tools[0]", &["function"]),
        (json!({"modalities": ["audio"]}), "modalities", &["audio"]),
        (call(json!(["x", 5])), "messages[0].tool_calls[0]", &["function", "name"]),
        (call(json!([{"function": {"name": "f"}}, 5])), "messages[0].tool_calls[1]", &["function"]),
        (call(json!([{"function": {"name": "f", "arguments": 5}}])), "messages[0].tool_calls[0].function", &["text"]),
        (call(json!("f()")), "messages[0].tool_calls", &["list"]),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "No."}]}]}),
            "messages[0].content[0]",
            &["text"],
        ),
        (
            json!({"continue_final_message": true, "add_generation_prompt": true}),
            "continue_final_message",
            &["add_generation_prompt"],
        ),
        (
            json!({"continue_final_message": true, "messages": [{"role": "assistant", "content": ""}]}),
            "messages[0].content",
            &["continued", "empty"],
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}}),
            "response_format.json_schema.strict",
            &["true or false"],
        ),
        (json!({"functions": []}), "functions", &["tools"]),
    ]
}

fn completions_only() -> Vec<Mistake> {
    vec![
        (json!({"prompt": ""}), "prompt", &["at least one token"]),
        (json!({"prompt": []}), "prompt", &["at least one token"]),
        (json!({"prompt": null}), "prompt", &["missing"]),
        (json!({"prompt": {"text": "x"}}), "prompt", &["text"]),
        (json!({"prompt": [1, "two"]}), "prompt[1]", &["token's number"]),
        (json!({"prompt": [99_999_999]}), "prompt", &["99999999"]),
        (json!({"prompt": "word ".repeat(2 * CONTEXT)}), "prompt", &["256"]),
        (json!({"prompt": vec![5; CONTEXT]}), "prompt", &["256"]),
        (json!({"prompt": vec!["x"; 65]}), "prompt", &["65", "64"]),
        (json!({"prompt": vec!["x"; 64], "n": 3}), "n", &["3", "64", "128"]),
        (json!({"logprobs": 21}), "logprobs", &["21", "20"]),
        (json!({"best_of": 3}), "best_of", &["n"]),
        (json!({"suffix": "x"}), "suffix", &["not"]),
    ]
}

fn check(answer: &Answer, what: &str, status: u16, field: &str, words: &[&str]) {
    assert_eq!(answer.status, status, "{what}: {}", answer.text());
    let error = &answer.json()["error"];
    let message = error["message"].as_str().unwrap_or_else(|| panic!("{what}: {error}"));
    assert_eq!(error["type"], "invalid_request_error", "{what}: {error}");
    let param = error["param"].as_str().unwrap_or_default();
    assert!(param.starts_with(field), "{what}: {error} does not name {field}");
    assert!(error["code"].is_string(), "{what}: {error}");
    for word in words {
        assert!(message.contains(word), "{what}: '{message}' does not say '{word}'");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_mistake_over_http_names_its_field_and_limit_and_the_server_serves_on() {
    let doors = Doors::open([vec![Act::Answer]]).await;
    let chat = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4});
    let completion = json!({"model": MODEL, "prompt": "Hi", "max_tokens": 4});
    let routes = [
        ("/v1/chat/completions", chat, [both_routes(), chat_only()].concat()),
        ("/v1/completions", completion, [both_routes(), completions_only()].concat()),
    ];
    for (path, good, mistakes) in routes {
        for (mistake, field, words) in mistakes {
            let mut body = good.clone();
            if mistake.get("max_completion_tokens").is_some() {
                body.as_object_mut().unwrap().remove("max_tokens");
            }
            body.as_object_mut().unwrap().extend(mistake.as_object().unwrap().clone());
            let answer = doors.post(path, &body).await;
            check(&answer, &format!("{path} {mistake}").chars().take(120).collect::<String>(), 400, field, words);
        }
        assert_eq!(doors.post(path, &good).await.status, 200, "{path} serves on");
    }
    let asked = doors.replicas[0].requests().len();
    assert_eq!(asked, 2, "no mistake reached the replica");
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_are_no_requests_are_refused() {
    let doors = Doors::with(Config { body_limit: ByteSize::kib(4), ..config() }, model(), [vec![Act::Answer]]).await;
    for path in ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"] {
        let send = |body: Vec<u8>| client::send_owned(doors.http, path, body);
        check(&send(b"{\"prompt\": ".to_vec()).await, path, 400, "body", &["JSON", "line 1"]);
        check(&send(b"[1, 2]".to_vec()).await, path, 400, "body", &["object"]);
        check(&send(b"{\"prompt\": \"\xff\xfe\"}".to_vec()).await, path, 400, "body", &["UTF-8", "12"]);
        check(&send(b"".to_vec()).await, path, 400, "body", &["JSON"]);
        check(&send(b"{\"temperature\": NaN}".to_vec()).await, path, 400, "body", &["JSON", "NaN"]);
        check(&send(vec![b' '; 5 << 10]).await, path, 413, "body", &["4096", "gateway.body_limit"]);
    }
    let unknown = doors.post("/v1/completions", &json!({"model": "gpt-9", "prompt": "x"})).await;
    check(&unknown, "unknown model", 404, "model", &["gpt-9", MODEL]);
    assert_eq!(unknown.json()["error"]["code"], "model_not_found");
    let long = doors.post("/v1/completions", &json!({"prompt": "word ".repeat(300)})).await;
    assert_eq!(long.json()["error"]["code"], "context_length_exceeded");
    let broken = doors.get("/v1/models/%ff").await;
    check(&broken, "a path that is no UTF-8", 400, "model", &["UTF-8"]);
    assert!(broken.header("x-request-id").is_some());
    assert_eq!(doors.get("/v1/completions").await.status, 405);
    assert_eq!(doors.get("/v1/nothing").await.status, 404);
    assert_eq!(doors.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 1})).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_mistake_over_grpc_names_its_field_in_the_details() {
    let doors = Doors::open([vec![Act::Answer]]).await;
    let mut client = doors.client().await;
    let good = || wire::GenerateRequest {
        text: "Count:".into(),
        sampling: Some(wire::SamplingParams { max_tokens: Some(2), ..Default::default() }),
        ..Default::default()
    };
    let sampling = |set: fn(&mut wire::SamplingParams)| {
        let mut request = good();
        set(request.sampling.as_mut().unwrap());
        request
    };
    let mistakes = [
        (wire::GenerateRequest { text: String::new(), ..good() }, "text"),
        (wire::GenerateRequest { tokens: vec![1], ..good() }, "text"),
        (wire::GenerateRequest { text: "word ".repeat(2 * CONTEXT), ..good() }, "text"),
        (wire::GenerateRequest { text: String::new(), tokens: vec![u32::MAX], ..good() }, "tokens"),
        (wire::GenerateRequest { priority: 101, ..good() }, "priority"),
        (sampling(|s| s.temperature = Some(f32::NAN)), "sampling.temperature"),
        (sampling(|s| s.temperature = Some(-1.0)), "sampling.temperature"),
        (sampling(|s| s.temperature = Some(f32::INFINITY)), "sampling.temperature"),
        (sampling(|s| s.top_p = Some(0.0)), "sampling.top_p"),
        (sampling(|s| s.n = Some(0)), "sampling.n"),
        (sampling(|s| s.n = Some(17)), "sampling.n"),
        (sampling(|s| s.max_tokens = Some(0)), "sampling.max_tokens"),
        (sampling(|s| s.top_logprobs = Some(21)), "sampling.top_logprobs"),
        (sampling(|s| s.stop = vec![String::new()]), "sampling.stop[0]"),
        (sampling(|s| s.stop_token_ids = vec![1; 65]), "sampling.stop_token_ids"),
        (sampling(|s| s.logit_bias = [(1, f32::NAN)].into()), "sampling.logit_bias[1]"),
    ];
    for (request, field) in mistakes {
        let status = client.generate(request).await.map(|_| ()).expect_err(field);
        assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status:?}");
        let details = status.get_details_bad_request().unwrap_or_else(|| panic!("{field}: no details"));
        assert_eq!(details.field_violations[0].field, field, "{}", status.message());
    }
    let unknown = wire::GenerateRequest { model: "gpt-9".into(), ..good() };
    assert_eq!(client.generate(unknown).await.map(|_| ()).expect_err("unknown").code(), Code::NotFound);
    let chat = wire::ChatRequest { messages: Vec::new(), ..Default::default() };
    assert_eq!(client.chat(chat).await.map(|_| ()).expect_err("empty").code(), Code::InvalidArgument);
    let role = wire::ChatMessage { role: "wizard".into(), content: "x".into(), ..Default::default() };
    let chat = wire::ChatRequest { messages: vec![role], ..Default::default() };
    let status = client.chat(chat).await.map(|_| ()).expect_err("role");
    assert_eq!(status.get_details_bad_request().unwrap().field_violations[0].field, "messages[0].role");
    let user = wire::ChatMessage { role: "user".into(), content: "x".into(), ..Default::default() };
    let chat = || wire::ChatRequest { messages: vec![user.clone()], ..Default::default() };
    let tool = |parameters: &str| wire::Tool { name: "f".into(), parameters: parameters.into(), ..Default::default() };
    let format = |format| Some(wire::ResponseFormat { format: Some(format), strict: true });
    let named = wire::tool_choice::Choice::Name("g".into());
    let schema = wire::response_format::Format::JsonSchema("{".into());
    let choice = wire::response_format::Format::Choice(wire::Choice { texts: vec![] });
    let mistakes = [
        (wire::ChatRequest { tools: vec![tool("{")], ..chat() }, "tools[0].parameters"),
        (wire::ChatRequest { tools: vec![wire::Tool::default()], ..chat() }, "tools[0]"),
        (
            wire::ChatRequest {
                tools: vec![tool("")],
                tool_choice: Some(wire::ToolChoice { choice: Some(named) }),
                ..chat()
            },
            "tool_choice",
        ),
        (wire::ChatRequest { template_kwargs: "[]".into(), ..chat() }, "template_kwargs"),
        (wire::ChatRequest { response_format: format(schema), ..chat() }, "response_format.json_schema"),
        (wire::ChatRequest { response_format: format(choice), ..chat() }, "response_format.choice.texts"),
    ];
    for (request, field) in mistakes {
        let status = client.chat(request).await.map(|_| ()).expect_err(field);
        assert_eq!(status.get_details_bad_request().unwrap().field_violations[0].field, field, "{status:?}");
    }
    let mut stream = client.generate(good()).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some(), "it serves on");
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_grpc_itself_refuses_are_told_as_all_others() {
    let small = Config { body_limit: ByteSize::kib(4), ..config() };
    let doors = Doors::with(small, model(), [vec![Act::Answer]]).await;
    let mut client = doors.client().await;
    let mut long = tonic::Request::new(wire::GenerateRequest { text: "x".repeat(5000), ..Default::default() });
    long.metadata_mut().insert("x-request-id", "grpc-7".parse().unwrap());
    let status = client.generate(long).await.map(|_| ()).expect_err("too long");
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert!(status.message().contains("4096") && status.message().contains("gateway.body_limit"), "{status:?}");
    assert_eq!(status.get_details_bad_request().unwrap().field_violations[0].field, "body");
    assert_eq!(status.metadata().get("x-request-id").unwrap(), "grpc-7");
    let long = wire::TokenizeRequest { text: "x".repeat(5000), ..Default::default() };
    let status = client.tokenize(long).await.map(|_| ()).expect_err("too long");
    assert_eq!(status.get_details_error_info().unwrap().reason, "payload_too_large");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_nothing_is_no_mistake() {
    let doors = Doors::open([vec![Act::Answer]]).await;
    let refused = json!({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]});
    let called = json!({"role": "assistant", "content": null, "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}]});
    let none = json!({"role": "assistant", "content": "Well.", "tool_calls": null});
    let asked = json!({"role": "user", "content": "Hi"});
    let body = json!({"messages": [asked, refused, called, none, asked], "max_tokens": 2, "top_logprobs": 0, "logprobs": false});
    let answer = doors.post("/v1/chat/completions", &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let prompt = doors.core.models()[0].tokenizer.decode(&doors.replicas[0].requests()[0].prompt, false).unwrap();
    assert!(prompt.contains("No."), "{prompt}");
}

#[test]
fn tokens_that_only_the_tokenizer_has_are_refused_before_the_model_sees_them() {
    let small = Arc::new(ServedModel { vocab: 100, ..model() });
    let core = Core::new(config());
    let input = SamplingInput::default();
    let job = input.into_job(RequestId::new("r"), small, vec![5, 100, 7], &core.limits(), core.tenant(None));
    let error = job.err().expect("token 100 is outside a vocabulary of 100");
    assert_eq!(error.field.as_deref(), Some("prompt"));
    assert!(error.message.contains("token 100") && error.message.contains("vocabulary of 100"), "{}", error.message);
}
