//! Calls of tools that a model writes into its answer.
use crate::scripted::Act;
use crate::server::{Doors, config, model, tokenizer};
use moesaic_gateway::ServedModel;
use moesaic_model::chat::ChatTemplate;
use moesaic_proto::inference::v1 as wire;
use moesaic_types::Grammar;
use serde_json::{Value, json};

/// Doors of a model with a template that contains `text`, which says `said`.
async fn doors(text: &str, said: &str) -> Doors {
    let template = format!("{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}{text}");
    let template = Some(ChatTemplate::new(template, serde_json::Map::new()).unwrap().into());
    let said = tokenizer().encode(said, false).unwrap().into_iter().chain([2]).collect();
    Doors::with(config(), ServedModel { template, ..model() }, [vec![Act::Say(said)]]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn channels_are_told_apart_with_and_without_a_stream() {
    let text = "<|channel|>analysis<|message|>Think of Bern.<|end|><|start|>assistant<|channel|>commentary \
                to=functions.weather <|constrain|>json<|message|>{\"city\": \"Bern\"}<|end|><|start|>assistant\
                <|channel|>final<|message|>Soon.";
    let doors = doors("<|channel|>", text).await;
    let tool = json!({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}});
    let mut body = json!({"messages": [{"role": "user", "content": "Weather?"}], "tools": [tool]});
    let whole = doors.post("/v1/chat/completions", &body).await.json();
    let message = &whole["choices"][0]["message"];
    assert_eq!((&message["reasoning_content"], &message["content"]), (&json!("Think of Bern."), &json!("Soon.")));
    assert_eq!(message["tool_calls"][0]["function"]["name"], "weather", "{whole}");
    assert_eq!(message["tool_calls"][0]["function"]["arguments"], "{\"city\": \"Bern\"}");
    assert_eq!(whole["choices"][0]["finish_reason"], "tool_calls");
    body["stream"] = true.into();
    let events = doors.post("/v1/chat/completions", &body).await.events();
    let deltas: Vec<_> = events.iter().filter_map(|event| event["choices"][0].get("delta")).collect();
    let all = |key: &str| deltas.iter().filter_map(|delta| delta[key].as_str()).collect::<String>();
    assert_eq!((all("reasoning_content").as_str(), all("content").as_str()), ("Think of Bern.", "Soon."));
    assert_eq!(deltas.iter().filter(|delta| delta["tool_calls"].is_array()).count(), 1);
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_with_tools_goes_through_grpc_too() {
    let said = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f\
                <|message|>{\"a\":1}<|call|>";
    let doors = doors("<|channel|>{{ tools }} {{ messages[1].tool_calls }} {{ color }}", said).await;
    let user = wire::ChatMessage { role: "user".into(), content: "Go.".into(), ..Default::default() };
    let call = wire::ToolCall { id: "c1".into(), name: "f".into(), arguments: "{\"a\": 7}".into() };
    let made = wire::ChatMessage { role: "assistant".into(), tool_calls: vec![call], ..Default::default() };
    let answered = wire::ChatMessage {
        role: "tool".into(),
        content: "warm".into(),
        tool_call_id: "c1".into(),
        name: "f".into(),
        ..Default::default()
    };
    let parameters = "{\"type\": \"object\", \"title\": \"T8\"}".into();
    let request = wire::ChatRequest {
        messages: vec![user, made, answered],
        tools: vec![wire::Tool { name: "f".into(), description: "does".into(), parameters }],
        template_kwargs: "{\"color\": \"blue\"}".into(),
        ..Default::default()
    };
    let mut stream = doors.client().await.chat(request.clone()).await.unwrap().into_inner();
    let (mut reasoning, mut calls, mut finish) = (String::new(), Vec::new(), None);
    while let Some(piece) = stream.message().await.unwrap() {
        assert_eq!(piece.text, "");
        reasoning += &piece.reasoning;
        calls.extend(piece.tool_calls);
        finish = piece.finish.or(finish);
    }
    assert_eq!((reasoning.as_str(), calls.len()), ("Hm.", 1));
    assert_eq!((calls[0].name.as_str(), calls[0].arguments.as_str()), ("f", "{\"a\":1}"));
    assert!(calls[0].id.starts_with("call_"));
    assert_eq!(finish.unwrap().reason(), wire::FinishReason::ToolCalls);
    let prompt = tokenizer().decode(&doors.replicas[0].requests()[0].prompt, false).unwrap();
    for shown in ["warm", "T8", "'a': 7", "blue"] {
        assert!(prompt.contains(shown), "{shown}: {prompt}");
    }
    let must = wire::tool_choice::Choice::Mode(wire::ToolMode::Required.into());
    let must = wire::ChatRequest { tool_choice: Some(wire::ToolChoice { choice: Some(must) }), ..request };
    doors.client().await.chat(must).await.unwrap();
    assert!(matches!(doors.replicas[0].requests()[1].grammar, Some(Grammar::JsonSchema(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_shows_special_tokens_and_stop_texts_where_asked_for() {
    let doors = doors("", "one two three<|im_start|>").await;
    let ask = |sampling: wire::SamplingParams| {
        let request = wire::GenerateRequest { text: "x".into(), sampling: Some(sampling), ..Default::default() };
        let doors = &doors;
        async move {
            let mut stream = doors.client().await.generate(request).await.unwrap().into_inner();
            let mut text = String::new();
            while let Some(piece) = stream.message().await.unwrap() {
                text += &piece.text;
            }
            text
        }
    };
    let stop = || wire::SamplingParams { stop: vec!["two".into()], ..Default::default() };
    assert_eq!(ask(stop()).await, "one ");
    assert_eq!(ask(wire::SamplingParams { include_stop_str_in_output: true, ..stop() }).await, "one two");
    assert_eq!(ask(wire::SamplingParams::default()).await, "one two three");
    let all = wire::SamplingParams { skip_special_tokens: Some(false), ..Default::default() };
    assert_eq!(ask(all).await, "one two three<|im_start|>");
}

#[tokio::test(flavor = "multi_thread")]
async fn several_required_calls_reach_the_client_each_with_its_index() {
    let doors = doors("", r#"[{"name":"f","arguments":{"a":1}},{"name":"g","arguments":{}}]"#).await;
    let tools: Vec<_> = ["f", "g"].map(|name| json!({"type": "function", "function": {"name": name}})).into();
    let mut body = json!({"messages": [{"role": "user", "content": "Go"}], "tools": tools, "tool_choice": "required"});
    let whole = doors.post("/v1/chat/completions", &body).await.json();
    let names =
        |calls: &Value| calls.as_array().unwrap().iter().map(|c| c["function"]["name"].clone()).collect::<Vec<_>>();
    assert_eq!(names(&whole["choices"][0]["message"]["tool_calls"]), ["f", "g"], "{whole}");
    assert!(whole["choices"][0]["message"]["content"].is_null());
    body["stream"] = true.into();
    let events = doors.post("/v1/chat/completions", &body).await.events();
    let calls = events.iter().filter_map(|event| event["choices"][0]["delta"]["tool_calls"].get(0));
    assert_eq!(calls.map(|call| call["index"].clone()).collect::<Vec<_>>(), [0, 1]);
    body["stream"] = false.into();
    body["parallel_tool_calls"] = false.into();
    let one = doors.post("/v1/chat/completions", &body).await.json();
    assert_eq!(names(&one["choices"][0]["message"]["tool_calls"]), ["f"], "{one}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_in_the_answer_reaches_the_client_as_a_call() {
    let text = "Let me look. <tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"Bern\"}}</tool_call>";
    let said = tokenizer().encode(text, false).unwrap();
    let ended: Vec<_> = said.into_iter().chain([2]).collect();
    let doors = Doors::open([vec![Act::Say(ended)]]).await;
    let tool = json!({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}});
    let mut body = json!({"messages": [{"role": "user", "content": "Weather?"}], "tools": [tool]});
    let whole = doors.post("/v1/chat/completions", &body).await.json();
    let choice = &whole["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{whole}");
    assert_eq!(choice["message"]["content"].as_str().map(str::trim), Some("Let me look."));
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!((&call["type"], &call["function"]["name"]), (&json!("function"), &json!("weather")));
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    assert_eq!(arguments, json!({"city": "Bern"}));

    body["stream"] = true.into();
    let events = doors.post("/v1/chat/completions", &body).await.events();
    let deltas: Vec<_> = events.iter().filter_map(|event| event["choices"][0].get("delta")).collect();
    let text: String = deltas.iter().filter_map(|delta| delta["content"].as_str()).collect();
    assert_eq!(text.trim(), "Let me look.");
    let calls = deltas.iter().filter_map(|delta| delta["tool_calls"][0]["function"]["arguments"].as_str());
    assert_eq!(serde_json::from_str::<Value>(&calls.collect::<String>()).unwrap(), arguments);
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");

    body["tool_choice"] = "none".into();
    body["stream"] = false.into();
    let plain = doors.post("/v1/chat/completions", &body).await.json();
    assert_eq!(plain["choices"][0]["finish_reason"], "stop");
    assert!(plain["choices"][0]["message"]["content"].as_str().unwrap().contains("weather"), "{plain}");
}
