//! `/openapi.json`: what the routes take and return.
use axum::Json;
use serde_json::{Map, Value, json};

/// The document.
pub async fn document() -> Json<Value> {
    let mut paths = Map::new();
    let mut path = |name: &str, value: Value| paths.insert(name.to_owned(), value);
    path("/v1/chat/completions", post("Answer a conversation", "ChatRequest", "ChatCompletion", true));
    path("/v1/completions", post("Continue a text", "CompletionRequest", "Completion", true));
    path("/tokenize", post("The tokens of a text or a conversation", "TokenizeRequest", "Tokens", false));
    path("/detokenize", post("The text of tokens", "DetokenizeRequest", "Text", false));
    path("/v1/models", get("The models that are served", "Models"));
    let mut model = get("One model", "Model");
    model["get"]["parameters"] = json!([{"name": "id", "in": "path", "required": true, "schema": {"type": "string"}}]);
    path("/v1/models/{id}", model);
    path("/health", get("200 when a request would be answered, else 503", "Status"));
    path("/ready", get("200 when a request would be answered, else 503", "Status"));
    path("/live", get("200 while the process can answer at all", "Status"));
    path(
        "/metrics",
        json!({"get": {"summary": "Prometheus metrics", "responses": {"200": {
        "description": "text format 0.0.4", "content": {"text/plain": {"schema": {"type": "string"}}}}}}}),
    );
    path("/openapi.json", get("This document", "Object"));
    Json(json!({
        "openapi": "3.1.0",
        "info": {"title": "Moesaic", "version": env!("CARGO_PKG_VERSION")},
        "paths": paths,
        "components": {"schemas": schemas()},
    }))
}

fn reference(schema: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{schema}")})
}

fn answers(schema: &str, streams: bool) -> Value {
    let mut content = json!({"application/json": {"schema": reference(schema)}});
    if streams {
        content["text/event-stream"] = json!({"schema": {"type": "string"}});
    }
    let error = json!({"description": "error", "content": {"application/json": {"schema": reference("Error")}}});
    json!({"200": {"description": "ok", "content": content}, "4XX": error, "5XX": error})
}

fn post(summary: &str, request: &str, response: &str, streams: bool) -> Value {
    let body = json!({"required": true, "content": {"application/json": {"schema": reference(request)}}});
    json!({"post": {"summary": summary, "requestBody": body, "responses": answers(response, streams)}})
}

fn get(summary: &str, response: &str) -> Value {
    json!({"get": {"summary": summary, "responses": answers(response, false)}})
}

/// The fields that both generating routes share.
fn sampling() -> Map<String, Value> {
    let texts = json!({"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]});
    let fields = json!({
        "model": {"type": "string"},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
        "top_k": {"type": "integer", "minimum": -1},
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "min_p": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
        "repetition_penalty": {"type": "number", "exclusiveMinimum": 0, "maximum": 10},
        "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
        "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
        "logit_bias": {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
        "seed": {"type": "integer"},
        "max_tokens": {"type": "integer", "minimum": 1},
        "max_completion_tokens": {"type": "integer", "minimum": 1},
        "min_tokens": {"type": "integer", "minimum": 0},
        "stop": texts,
        "include_stop_str_in_output": {"type": "boolean"},
        "skip_special_tokens": {"type": "boolean"},
        "return_tokens_as_token_ids": {"type": "boolean"},
        "stop_token_ids": {"type": "array", "items": {"type": "integer"}, "maxItems": 64},
        "ignore_eos": {"type": "boolean"},
        "n": {"type": "integer", "minimum": 1},
        "stream": {"type": "boolean"},
        "stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}},
        "response_format": {"type": "object", "properties": {
            "type": {"enum": ["text", "json_object", "json_schema"]},
            "json_schema": {"type": "object", "properties": {"schema": {"type": "object"}, "strict": {"type": "boolean"}}},
        }, "required": ["type"]},
        "guided_json": {"oneOf": [{"type": "object"}, {"type": "string"}]},
        "guided_regex": {"type": "string"},
        "guided_grammar": {"type": "string"},
        "priority": {"type": "integer", "minimum": -100, "maximum": 100},
        "deadline_ms": {"type": "integer", "minimum": 0},
    });
    match fields {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

fn schemas() -> Value {
    let mut chat = sampling();
    chat.insert("messages".into(), json!({"type": "array", "minItems": 1, "items": reference("Message")}));
    chat.insert("tools".into(), json!({"type": "array", "items": {"type": "object"}, "maxItems": 128}));
    chat.insert(
        "tool_choice".into(),
        json!({"oneOf": [
        {"enum": ["none", "auto", "required"]}, {"type": "object"}]}),
    );
    chat.insert("logprobs".into(), json!({"type": "boolean"}));
    chat.insert("top_logprobs".into(), json!({"type": "integer", "minimum": 0, "maximum": 20}));
    chat.insert("parallel_tool_calls".into(), json!({"type": "boolean"}));
    chat.insert("add_generation_prompt".into(), json!({"type": "boolean"}));
    chat.insert("continue_final_message".into(), json!({"type": "boolean"}));
    chat.insert("chat_template_kwargs".into(), json!({"type": "object"}));
    let tokens = json!({"type": "array", "items": {"type": "integer", "minimum": 0}});
    let mut completion = sampling();
    completion.insert(
        "prompt".into(),
        json!({"oneOf": [
        {"type": "string"}, {"type": "array", "items": {"type": "string"}}, tokens,
        {"type": "array", "items": tokens}]}),
    );
    completion.insert("logprobs".into(), json!({"type": "integer", "minimum": 0, "maximum": 20}));
    completion.insert("echo".into(), json!({"type": "boolean"}));
    completion.insert("best_of".into(), json!({"type": "integer", "minimum": 1}));
    let answer = |kind: &str| {
        json!({"type": "object", "required": ["id", "object", "created", "model", "choices", "usage"], "properties": {
            "id": {"type": "string"}, "object": {"const": kind}, "created": {"type": "integer"},
            "model": {"type": "string"}, "choices": {"type": "array", "items": {"type": "object"}},
            "usage": reference("Usage")}})
    };
    let model = json!({"type": "object", "required": ["id", "object"], "properties": {
        "id": {"type": "string"}, "object": {"const": "model"}, "created": {"type": "integer"},
        "owned_by": {"type": "string"}, "max_model_len": {"type": "integer"}}});
    json!({
        "ChatRequest": {"type": "object", "required": ["messages"], "properties": chat},
        "CompletionRequest": {"type": "object", "required": ["prompt"], "properties": completion},
        "Message": {"type": "object", "required": ["role"], "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool", "function"]},
            "content": {"oneOf": [{"type": "string"}, {"type": "null"}, {"type": "array", "items": {"type": "object"}}]},
            "tool_calls": {"type": "array", "items": {"type": "object"}}}},
        "ChatCompletion": answer("chat.completion"),
        "Completion": answer("text_completion"),
        "Usage": {"type": "object", "properties": {
            "prompt_tokens": {"type": "integer"}, "completion_tokens": {"type": "integer"},
            "total_tokens": {"type": "integer"},
            "prompt_tokens_details": {"type": "object", "properties": {"cached_tokens": {"type": "integer"}}}}},
        "TokenizeRequest": {"type": "object", "properties": {
            "model": {"type": "string"}, "prompt": {"type": "string"},
            "messages": {"type": "array", "items": reference("Message")},
            "add_special_tokens": {"type": "boolean"}}},
        "Tokens": {"type": "object", "required": ["count", "tokens", "max_model_len"], "properties": {
            "count": {"type": "integer"}, "max_model_len": {"type": "integer"}, "tokens": tokens}},
        "DetokenizeRequest": {"type": "object", "required": ["tokens"], "properties": {
            "model": {"type": "string"}, "tokens": tokens}},
        "Text": {"type": "object", "required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
        "Model": model,
        "Models": {"type": "object", "properties": {
            "object": {"const": "list"}, "data": {"type": "array", "items": reference("Model")}}},
        "Status": {"type": "object", "properties": {"status": {"type": "string"}}},
        "Object": {"type": "object"},
        "Error": {"type": "object", "required": ["error"], "properties": {"error": {
            "type": "object", "required": ["message", "type", "code"], "properties": {
                "message": {"type": "string"}, "type": {"type": "string"},
                "param": {"type": ["string", "null"]}, "code": {"type": "string"}}}}},
    })
}
