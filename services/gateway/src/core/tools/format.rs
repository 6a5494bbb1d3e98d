//! How families of models write calls of tools into their answers: a table, with a reader for each form.
use super::Call;
use moesaic_model::chat::ChatTemplate;
use serde_json::{Map, Value};

/// Calls, and how many bytes of a text they take.
pub(super) type Found = (Vec<Call>, usize);

/// A form of calls.
#[derive(Debug)]
pub struct Format {
    /// Chat templates of the models that write it contain one of these.
    templates: &'static [&'static str],
    /// Calls begin with this text wherever it stands.
    pub(super) mark: &'static str,
    /// Calls may also be an answer from its beginning, without the mark: the text that one begins with then.
    pub(super) bare: Option<&'static str>,
    /// Reads the calls that a text begins with, with the request's tools at hand. `None`: they are none.
    pub(super) read: fn(&str, &[Value]) -> Option<Found>,
}

/// All forms. The first whose template is found wins where two have the same mark.
const FORMATS: [Format; 7] = [
    // Qwen3-Coder
    Format { templates: &["<function="], mark: "<tool_call>", bare: None, read: function_tags },
    // GLM-4-MoE
    Format { templates: &["<arg_key>"], mark: "<tool_call>", bare: None, read: argument_tags },
    // Hermes, Qwen2, Qwen3, Granite
    Format { templates: &["<tool_call>"], mark: "<tool_call>", bare: None, read: hermes },
    // Granite
    Format { templates: &["<|tool_call|>"], mark: "<|tool_call|>", bare: None, read: granite },
    // Mistral, Mixtral
    Format { templates: &["[TOOL_CALLS]"], mark: "[TOOL_CALLS]", bare: None, read: mistral },
    // DeepSeek-V3, DeepSeek-R1
    Format { templates: &[DEEPSEEK_BEGIN], mark: DEEPSEEK_BEGIN, bare: None, read: deepseek },
    // Llama 3
    Format {
        templates: &["<|python_tag|>", "\"parameters\": dictionary"],
        mark: "<|python_tag|>",
        bare: Some("{"),
        read: llama,
    },
];

const DEEPSEEK_BEGIN: &str = "<｜tool▁calls▁begin｜>";
const DEEPSEEK_END: &str = "<｜tool▁calls▁end｜>";

/// The forms that a model with this template writes; where the template names none, those whose marks are no text that
/// a model would write otherwise.
pub(super) fn of(template: Option<&ChatTemplate>) -> Vec<&'static Format> {
    let named =
        |format: &&Format| template.is_some_and(|template| format.templates.iter().any(|text| template.mentions(text)));
    let mut found: Vec<&Format> = FORMATS.iter().filter(named).collect();
    if found.is_empty() {
        found = FORMATS.iter().filter(|format| format.bare.is_none()).collect();
        found.drain(..2);
    }
    let marks: Vec<_> = found.iter().map(|format| format.mark).collect();
    let mut at = 0..marks.len();
    found.retain(|format| at.next().is_some_and(|at| !marks[..at].contains(&format.mark)));
    found
}

/// The first JSON value of a text, white space before it aside, and the bytes that both take.
pub(super) fn json_at(text: &str) -> Option<(Value, usize)> {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    let value = values.next()?.ok()?;
    Some((value, values.byte_offset()))
}

/// A call as an object with `name` and `arguments`, or `parameters`.
pub(super) fn call(value: &Value) -> Option<Call> {
    let name = value["name"].as_str()?.to_owned();
    let arguments = match value.get("arguments").or_else(|| value.get("parameters")) {
        None | Some(Value::Null) => "{}".to_owned(),
        Some(Value::String(text)) if text.trim().is_empty() => "{}".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(arguments) => arguments.to_string(),
    };
    Some(Call { name, arguments })
}

/// One such object, or a list of them.
fn one_or_more(value: &Value) -> Option<Vec<Call>> {
    match value {
        Value::Array(list) => list.iter().map(call).collect::<Option<Vec<_>>>().filter(|calls| !calls.is_empty()),
        value => call(value).map(|call| vec![call]),
    }
}

/// What is left of a text, with the place in it.
struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    fn new(text: &'a str) -> Self {
        Self { text, at: 0 }
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn space(&mut self) {
        self.at = self.text.len() - self.rest().trim_start().len();
    }

    /// Goes on behind `mark`, if it is here.
    fn take(&mut self, mark: &str) -> Option<()> {
        self.rest().starts_with(mark).then(|| self.at += mark.len())
    }

    /// The same, with white space around it.
    fn skip(&mut self, mark: &str) -> Option<()> {
        let before = self.at;
        self.space();
        let taken = self.take(mark);
        match taken {
            Some(()) => self.space(),
            None => self.at = before,
        }
        taken
    }

    /// Goes on behind the mark at a call's end, which an answer that ends there may lack.
    fn close(&mut self, mark: &str) {
        let rest = self.rest().trim_start();
        if rest.starts_with(mark) {
            self.at = self.text.len() - rest.len() + mark.len();
        }
    }

    /// The text up to `mark`, and goes on behind it.
    fn until(&mut self, mark: &str) -> Option<&'a str> {
        let (text, _) = self.rest().split_once(mark)?;
        self.at += text.len() + mark.len();
        Some(text)
    }

    fn json(&mut self) -> Option<Value> {
        let (value, len) = json_at(self.rest())?;
        self.at += len;
        Some(value)
    }

    /// Letters, digits and what else stands in names of functions.
    fn name(&mut self) -> Option<&'a str> {
        let rest = self.rest();
        let end = rest.find(|c: char| !(c.is_alphanumeric() || "_-.".contains(c))).unwrap_or(rest.len());
        self.at += end;
        Some(&rest[..end]).filter(|name| !name.is_empty())
    }
}

/// `<tool_call>{...}</tool_call>`, or a list of calls in it. At an answer's end the closing mark may be missing.
fn hermes(text: &str, _: &[Value]) -> Option<Found> {
    let mut reader = Reader::new(text);
    reader.take("<tool_call>")?;
    let calls = one_or_more(&reader.json()?)?;
    reader.close("</tool_call>");
    Some((calls, reader.at))
}

/// `<|tool_call|>[{...}]`
fn granite(text: &str, _: &[Value]) -> Option<Found> {
    let mut reader = Reader::new(text);
    reader.take("<|tool_call|>")?;
    let calls = one_or_more(&reader.json()?)?;
    Some((calls, reader.at))
}

/// `[TOOL_CALLS][{...}]`, `[TOOL_CALLS]name{...}`, `[TOOL_CALLS]name[CALL_ID]id[ARGS]{...}`
fn mistral(text: &str, _: &[Value]) -> Option<Found> {
    let mut reader = Reader::new(text);
    reader.take("[TOOL_CALLS]")?;
    reader.space();
    if let Some(value) = reader.json() {
        return Some((one_or_more(&value)?, reader.at));
    }
    let name = reader.name()?.to_owned();
    if reader.skip("[CALL_ID]").is_some() {
        reader.name()?;
    }
    let _newer_alone = reader.skip("[ARGS]");
    let arguments = reader.json().filter(Value::is_object)?.to_string();
    Some((vec![Call { name, arguments }], reader.at))
}

/// `{"name": ..., "parameters": {...}}`, several with `;` between them.
fn llama(text: &str, _: &[Value]) -> Option<Found> {
    let mut reader = Reader::new(text);
    let _often_missing = reader.skip("<|python_tag|>");
    let mut calls = Vec::new();
    loop {
        let value = reader.json()?;
        // any other JSON is an answer
        let known = value.get("parameters").or_else(|| value.get("arguments"));
        known?;
        calls.push(call(&value)?);
        if reader.skip(";").is_none() || !reader.rest().starts_with('{') {
            return Some((calls, reader.at));
        }
    }
}

/// `<｜tool▁call▁begin｜>function<｜tool▁sep｜>name`, a line with JSON in a fence, `<｜tool▁call▁end｜>`; since V3.1
/// `<｜tool▁call▁begin｜>name<｜tool▁sep｜>{...}<｜tool▁call▁end｜>`.
fn deepseek(text: &str, _: &[Value]) -> Option<Found> {
    let mut reader = Reader::new(text);
    reader.take(DEEPSEEK_BEGIN)?;
    let mut calls = Vec::new();
    while reader.skip("<｜tool▁call▁begin｜>").is_some() {
        let head = reader.until("<｜tool▁sep｜>")?.trim();
        let name = match head {
            "function" if !reader.rest().trim_start().starts_with('{') => reader.until("\n")?.trim(),
            name => name,
        };
        let _older_alone = reader.skip("```json");
        let arguments = reader.json().filter(Value::is_object)?.to_string();
        calls.push(Call { name: name.to_owned(), arguments });
        let _older_alone = reader.skip("```");
        reader.close("<｜tool▁call▁end｜>");
    }
    reader.close(DEEPSEEK_END);
    Some((calls, reader.at)).filter(|(calls, _)| !calls.is_empty())
}

/// `<tool_call>name`, then `<arg_key>key</arg_key><arg_value>value</arg_value>` each, `</tool_call>`.
fn argument_tags(text: &str, tools: &[Value]) -> Option<Found> {
    let mut reader = Reader::new(text);
    reader.skip("<tool_call>")?;
    let name = reader.name()?.to_owned();
    let mut arguments = Map::new();
    while reader.skip("<arg_key>").is_some() {
        let key = reader.until("</arg_key>")?.trim();
        reader.skip("<arg_value>")?;
        let value = reader.until("</arg_value>")?;
        arguments.insert(key.to_owned(), typed(tools, &name, key, value));
    }
    reader.close("</tool_call>");
    let arguments = Value::Object(arguments).to_string();
    Some((vec![Call { name, arguments }], reader.at))
}

/// `<tool_call><function=name>`, then `<parameter=key>value</parameter>` each, `</function></tool_call>`.
fn function_tags(text: &str, tools: &[Value]) -> Option<Found> {
    let mut reader = Reader::new(text);
    reader.skip("<tool_call>")?;
    reader.take("<function=")?;
    let name = reader.until(">")?.trim().to_owned();
    let mut arguments = Map::new();
    while reader.skip("<parameter=").is_some() {
        let key = reader.until(">")?.trim();
        let value = reader.until("</parameter>")?;
        // the lines that the value stands between are not part of it
        let value = value.strip_prefix('\n').unwrap_or(value);
        let value = value.strip_suffix('\n').unwrap_or(value);
        arguments.insert(key.to_owned(), typed(tools, &name, key, value));
    }
    reader.skip("</function>")?;
    reader.close("</tool_call>");
    let arguments = Value::Object(arguments).to_string();
    Some((vec![Call { name, arguments }], reader.at))
}

/// A value that was written without quotes: a text where the tool says so or where it is no JSON.
fn typed(tools: &[Value], name: &str, key: &str, value: &str) -> Value {
    let tool = tools.iter().find(|tool| tool["function"]["name"] == name);
    let schema = tool.map(|tool| &tool["function"]["parameters"]["properties"][key]);
    let text = || Value::String(value.to_owned());
    match schema.and_then(|schema| schema["type"].as_str()) {
        Some("string") => text(),
        _ => serde_json::from_str(value.trim()).unwrap_or_else(|_| text()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// What a template says, a text, and the calls in it.
    type Case<'a> = (&'a str, &'a str, &'a [(&'a str, &'a Value)]);

    fn read(template: &str, text: &str) -> Option<(Vec<(String, Value)>, usize)> {
        let template = ChatTemplate::new(template.to_owned(), Map::new()).unwrap();
        let tools = [json!({"function": {"name": "f", "parameters": {"properties": {"s": {"type": "string"}}}}})];
        let formats = of(Some(&template));
        let begins =
            |format: &&&Format| text.starts_with(format.mark) || format.bare.is_some_and(|bare| text.starts_with(bare));
        let (calls, len) = (formats.iter().find(begins)?.read)(text, &tools)?;
        let parsed = |call: Call| (call.name, serde_json::from_str(&call.arguments).unwrap());
        Some((calls.into_iter().map(parsed).collect(), len))
    }

    #[test]
    fn each_familys_calls_are_read_up_to_their_end() {
        let one = json!({"a": 1});
        let two = json!({"s": "1</x>", "a": [2]});
        let deepseek = "<｜tool▁calls▁begin｜>";
        let cases: &[Case<'_>] = &[
            ("<tool_call>", r#"<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>"#, &[("f", &one)]),
            ("<tool_call>", "<tool_call>\n{\"name\":\"f\",\"parameters\":{\"a\":1}}", &[("f", &one)]),
            (
                "<tool_call>",
                r#"<tool_call>[{"name":"f","arguments":{"a":1}},{"name":"g","arguments":"{\"a\":1}"}]</tool_call>"#,
                &[("f", &one), ("g", &one)],
            ),
            ("<|tool_call|>", r#"<|tool_call|>[{"name":"f","arguments":{"a":1}}]"#, &[("f", &one)]),
            ("[TOOL_CALLS]", r#"[TOOL_CALLS] [{"name":"f","arguments":{"a":1}}]"#, &[("f", &one)]),
            ("[TOOL_CALLS]", r#"[TOOL_CALLS]f{"a":1}"#, &[("f", &one)]),
            ("[TOOL_CALLS]", r#"[TOOL_CALLS]f[ARGS]{"a":1}"#, &[("f", &one)]),
            ("[TOOL_CALLS]", r#"[TOOL_CALLS]f[CALL_ID]x1y2[ARGS]{"a":1}"#, &[("f", &one)]),
            ("<|python_tag|>", r#"<|python_tag|>{"name":"f","parameters":{"a":1}}"#, &[("f", &one)]),
            (
                r#"{{ '"parameters": dictionary' }}"#,
                r#"{"name":"f","parameters":{"a":1}}; {"name":"g","parameters":{"a":1}}"#,
                &[("f", &one), ("g", &one)],
            ),
            (
                deepseek,
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"a\":1}\n```<｜tool▁call▁end｜>\n\
                 <｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{\"a\": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
                &[("f", &one), ("g", &one)],
            ),
            (
                deepseek,
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"a\":1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
                &[("f", &one)],
            ),
            (
                "<tool_call> <arg_key>",
                "<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>1</x></arg_value>\n<arg_key>a</arg_key>\n<arg_value>[2]</arg_value>\n</tool_call>",
                &[("f", &two)],
            ),
            (
                "<tool_call> <function=",
                "<tool_call>\n<function=f>\n<parameter=s>\n1</x>\n</parameter>\n<parameter=a>\n[2]\n</parameter>\n</function>\n</tool_call>",
                &[("f", &two)],
            ),
            ("nothing is said of tools", r#"<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>"#, &[("f", &one)]),
            ("nothing is said of tools", r#"[TOOL_CALLS]f{"a":1}"#, &[("f", &one)]),
        ];
        for (template, text, wanted) in cases {
            let wanted = wanted.iter().map(|(name, value)| ((*name).to_owned(), (*value).clone())).collect();
            assert_eq!(read(template, text), Some((wanted, text.len())), "{text}");
            let (_, len) = read(template, &format!("{text} and more")).unwrap();
            assert_eq!(format!("{text} and more")[len..].trim_start(), "and more", "{text}");
        }
    }

    #[test]
    fn what_is_no_call_is_none() {
        for (template, text) in [
            ("<tool_call>", "<tool_call>{\"name\": \"f\""),
            ("<tool_call>", "<tool_call>{\"arguments\": {}}</tool_call>"),
            ("<|tool_call|>", "<|tool_call|>[]"),
            ("[TOOL_CALLS]", "[TOOL_CALLS]f and g"),
            ("<|python_tag|>", "{\"name\": \"Ann\"}"),
            ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>"),
            ("<tool_call> <function=", "<tool_call><function=f><parameter=a>1"),
            ("nothing is said of tools", "{\"name\": \"f\", \"parameters\": {}}"),
        ] {
            assert_eq!(read(template, text), None, "{text}");
        }
    }

    #[test]
    fn no_arguments_are_an_empty_object() {
        for arguments in ["", r#","arguments":null"#, r#","arguments":"""#, r#","arguments":{}"#] {
            let value: Value = serde_json::from_str(&format!(r#"{{"name":"f"{arguments}}}"#)).unwrap();
            assert_eq!(call(&value).unwrap().arguments, "{}", "{value}");
        }
    }
}
