//! Calls of tools that a model writes into its answer.
use crate::scripted::Act;
use crate::server::{Doors, tokenizer};
use serde_json::{Value, json};

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
