//! Chat templates: the constructs that published templates use, rendered as Hugging Face's libraries render them.
#![allow(clippy::unwrap_used)]

use moesaic_model::chat::ChatTemplate;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../..")
}

fn render(text: &str, messages: &[Value], tools: Option<&[Value]>, extra: Value) -> moesaic_model::Result<String> {
    let special = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}}).as_object().unwrap().clone();
    let extra: Map<String, Value> = serde_json::from_value(extra).unwrap();
    ChatTemplate::new(text.into(), special)?.render(messages, tools, true, &extra)
}

fn user(content: &str) -> Value {
    json!({"role": "user", "content": content})
}

#[test]
fn the_demo_models_prompts_equal_the_reference() {
    let folder = root().join("deploy/models/demo-moe");
    let cases: Value = serde_json::from_slice(&std::fs::read(folder.join("chat_golden.json")).unwrap()).unwrap();
    let template = ChatTemplate::open(&folder).unwrap();
    let cases = cases.as_array().unwrap();
    assert_eq!(cases.len(), 8);
    for case in cases {
        let messages = case["messages"].as_array().unwrap();
        assert_eq!(template.render(messages, None, true, &Map::new()).unwrap(), case["rendered"].as_str().unwrap());
    }
}

#[test]
fn tools_and_reasoning_as_chatml_models_write_them() {
    let text = r#"{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "system" %}{% continue %}{% endif %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content or '' %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' + content }}
        {%- if message.tool_calls %}
            {%- for call in message.tool_calls %}
                {%- if call.function %}{%- set call = call.function %}{%- endif %}
                {{- '<tool_call>{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}
                {%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | tojson }}{%- endif %}
                {{- '}</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"#;
    let messages = [
        json!({"role": "system", "content": "Be brief."}),
        user("Is 3 < 5 & \"a\"?"),
        json!({"role": "assistant", "content": "<think>hm</think>\n\nLet me see.", "tool_calls": [
            {"type": "function", "function": {"name": "less", "arguments": {"a": 3, "b": [5, null, true]}}}]}),
        json!({"role": "tool", "content": "yes"}),
    ];
    let tools = [json!({"type": "function", "function": {"name": "less", "description": "a < b, l'été"}})];
    let expected = concat!(
        "<|im_start|>system\nBe brief.\n\n<tools>\n",
        "{\"type\": \"function\", \"function\": {\"name\": \"less\", \"description\": \"a < b, l'été\"}}",
        "\n</tools><|im_end|>\n",
        "<|im_start|>user\nIs 3 < 5 & \"a\"?<|im_end|>\n",
        "<|im_start|>assistant\nLet me see.<tool_call>{\"name\": \"less\", \"arguments\": ",
        "{\"a\": 3, \"b\": [5, null, true]}}</tool_call><|im_end|>\n",
        "<|im_start|>tool\nyes<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    );
    let rendered = render(text, &messages, Some(&tools), json!({"enable_thinking": false})).unwrap();
    assert_eq!(rendered, expected);
    let plain = render(text, &[user("hi")], None, json!({})).unwrap();
    assert_eq!(plain, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
}

#[test]
fn alternating_roles_as_instruction_models_demand_them() {
    let text = "{{ bos_token }}{% for message in messages %}\
        {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
        {{ raise_exception('roles must alternate user/assistant/...') }}{% endif %}\
        {% if message['role'] == 'user' %}{{ ' [INST] ' + message['content'].strip() + ' [/INST]' }}\
        {% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}";
    let messages = [user(" hi "), json!({"role": "assistant", "content": "ho"}), user("x")];
    let rendered = render(text, &messages, None, json!({})).unwrap();
    assert_eq!(rendered, "<s> [INST] hi [/INST] ho</s> [INST] x [/INST]");
    let error = render(text, &[user("a"), user("b")], None, json!({})).unwrap_err();
    assert!(error.to_string().contains("roles must alternate"), "{error}");
}

#[test]
fn dates_defaults_and_indented_tools_as_header_models_write_them() {
    let text = r#"{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if tools is not none %}{{- "Environment: ipython\n" }}{%- endif %}
{{- "Today: " + date_string + "\n" }}
{%- for t in tools or [] %}{{- t | tojson(indent=4) }}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'stop' %}{%- break %}{%- endif %}
{{- m['role'].upper() ~ ':' ~ m['content'] | trim ~ ';' }}
{%- endfor %}"#;
    let messages = [user(" a "), json!({"role": "stop", "content": ""}), user("never")];
    let rendered = render(text, &messages, None, json!({"date_string": "26 Jul 2024"})).unwrap();
    assert_eq!(rendered, "Today: 26 Jul 2024\nUSER:a;");
    let tools = [json!({"name": "f", "parameters": {"a": [1, 2], "b": {}, "c": []}})];
    let rendered = render(text, &messages, Some(&tools), json!({"date_string": "x"})).unwrap();
    // python3: json.dumps(tool, indent=4)
    let tool = "{\n    \"name\": \"f\",\n    \"parameters\": {\n        \"a\": [\n            1,\n            2\n        ],\n        \"b\": {},\n        \"c\": []\n    }\n}";
    assert_eq!(rendered, format!("Environment: ipython\nToday: x\n{tool}USER:a;"));
    let today = render("{{ strftime_now('%Y-%m-%d') }}", &messages, None, json!({})).unwrap();
    assert!(today.len() == 10 && today.as_str() > "2025-01-01", "{today}");
}

#[test]
fn json_options_are_pythons() {
    let messages = [json!({"role": "user", "content": {"b": "é🙂", "a": 1.5}})];
    let one = |filter: &str| render(&format!("{{{{ messages[0].content | {filter} }}}}"), &messages, None, json!({}));
    assert_eq!(one("tojson").unwrap(), r#"{"b": "é🙂", "a": 1.5}"#);
    assert_eq!(one("tojson(sort_keys=true)").unwrap(), r#"{"a": 1.5, "b": "é🙂"}"#);
    assert_eq!(one("tojson(ensure_ascii=true)").unwrap(), r#"{"b": "\u00e9\ud83d\ude42", "a": 1.5}"#);
    assert_eq!(one("tojson(separators=(',', ':'))").unwrap(), r#"{"b":"é🙂","a":1.5}"#);
    assert_eq!(one("tojson(indent=none)").unwrap(), r#"{"b": "é🙂", "a": 1.5}"#);
    assert!(one("tojson(other=1)").is_err());
}

#[test]
fn named_templates_and_broken_ones() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("tokenizer_config.json");
    let named = json!({"chat_template": [
        {"name": "tool_use", "template": "with {{ tools | length }}"}, {"name": "default", "template": "without"}]});
    std::fs::write(&config, named.to_string()).unwrap();
    let template = ChatTemplate::from_dir(folder.path()).unwrap();
    let tools = [json!({})];
    assert_eq!(template.render(&[user("a")], None, true, &Map::new()).unwrap(), "without");
    assert_eq!(template.render(&[user("a")], Some(&tools), true, &Map::new()).unwrap(), "with 1");
    let problem = || {
        let template = ChatTemplate::from_dir(folder.path()).unwrap();
        let problem = template.problem().unwrap().to_owned();
        let error = template.render(&[user("a")], None, true, &Map::new()).unwrap_err();
        assert_eq!(error.to_string(), problem, "who renders learns why");
        problem
    };
    std::fs::write(&config, json!({"chat_template": "{% if %}"}).to_string()).unwrap();
    assert!(problem().contains("tokenizer_config.json") && problem().contains("syntax error"), "{}", problem());
    std::fs::write(folder.path().join("chat_template.jinja"), "{{ messages").unwrap();
    assert!(problem().contains("chat_template.jinja") && !problem().contains('\n'), "{}", problem());
    std::fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
    std::fs::write(&config, "{").unwrap();
    assert!(ChatTemplate::from_dir(folder.path()).err().unwrap().to_string().contains("tokenizer_config.json"));
    std::fs::write(&config, "{}").unwrap();
    let error = ChatTemplate::from_dir(folder.path()).err().unwrap().to_string();
    assert!(error.contains("no chat template"), "{error}");
}

#[test]
fn templates_in_a_folder_of_their_own_are_found_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let additional = folder.path().join("additional_chat_templates");
    std::fs::create_dir(&additional).unwrap();
    std::fs::write(additional.join("tool_use.jinja"), "with {{ tools | length }}").unwrap();
    let render = |tools: Option<&[Value]>| {
        ChatTemplate::from_dir(folder.path()).and_then(|t| t.render(&[user("a")], tools, true, &Map::new()))
    };
    assert!(render(None).unwrap_err().to_string().contains("no chat template"), "there is none for ordinary messages");
    std::fs::write(folder.path().join("chat_template.jinja"), "without").unwrap();
    assert_eq!(render(None).unwrap(), "without");
    assert_eq!(render(Some(&[json!({})])).unwrap(), "with 1");
    std::fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
    std::fs::write(additional.join("default.jinja"), "default").unwrap();
    assert_eq!(render(None).unwrap(), "default");
    assert_eq!(render(Some(&[json!({})])).unwrap(), "with 1");
    std::fs::write(additional.join("tool_use.jinja"), "{% if").unwrap();
    assert!(render(None).unwrap_err().to_string().contains("additional_chat_templates"));
}

#[test]
fn marks_of_what_is_trained_on_are_not_seen() {
    let text =
        "{% for m in messages %}\n    {%- generation -%}  \n{{ m.content }}  {%- endgeneration %}\n!{% endfor %}";
    assert_eq!(render(text, &[user("a"), user("b")], None, json!({})).unwrap(), "a!b!");
    // trim_blocks takes the line break after a tag, lstrip_blocks what stands before it
    let text = "  {% generation %}\nx\n  {%generation%}y{% endgeneration %}\n{% endgeneration %}\nz";
    assert_eq!(render(text, &[user("a")], None, json!({})).unwrap(), "x\nyz");
}

#[test]
fn what_cannot_be_rendered_is_one_line_that_names_the_templates_line() {
    let text = "{% set x = 1 %}\n\n{{ '%s' % messages }}";
    let error = render(text, &[user("a\nb")], None, json!({})).unwrap_err().to_string();
    assert!(error.starts_with("messages cannot be rendered: ") && error.contains("chat:3"), "{error}");
    assert!(!error.contains('\n') && error.len() < 200, "{error}");
    let error = render("{{ raise_exception('a\nb') }}", &[user("a")], None, json!({})).unwrap_err().to_string();
    assert!(error.contains("a b") && !error.contains('\n'), "{error}");
    assert_eq!(render("{{ '%s-%03d' | format('a', 7) }}", &[user("a")], None, json!({})).unwrap(), "a-007");
}
