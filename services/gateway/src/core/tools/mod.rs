//! Tools: what a request says of them, the grammar that makes a call certain, and calls found in an answer.
//!
//! Calls are read in the two forms that open models are trained on: `<tool_call>{"name": ..., "arguments": ...}
//! </tool_call>` (Hermes, Qwen) and `[TOOL_CALLS][{"name": ..., "arguments": ...}]` (Mistral). A required call is held
//! by a grammar to one JSON object of that form, a named one to the arguments alone.
use moesaic_types::{Error, FinishReason, Grammar, Result};
use serde_json::{Map, Value, json};

const HERMES: &str = "<tool_call>";
const HERMES_END: &str = "</tool_call>";
const MISTRAL: &str = "[TOOL_CALLS]";
const MAX_TOOLS: usize = 128;

/// Which tools may, or must, be called.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Choice {
    /// None: tools are not shown to the model.
    #[default]
    None,
    /// The model decides.
    Auto,
    /// Some tool must be called.
    Required,
    /// This tool must be called.
    Named(String),
}

/// A call of a tool.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// The tool's name.
    pub name: String,
    /// Its arguments as JSON text.
    pub arguments: String,
}

/// The tools of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tools {
    /// As the client sent them.
    pub list: Vec<Value>,
    /// Which may or must be called.
    pub choice: Choice,
    /// At most one call in an answer.
    pub single: bool,
}

impl Tools {
    /// Reads `tools` and `tool_choice`.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field.
    pub fn parse(tools: Option<&Value>, choice: Option<&Value>) -> Result<Self> {
        let list = match tools {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(list)) => list.clone(),
            Some(_) => return Err(Error::invalid("tools", "tools must be a list")),
        };
        if list.len() > MAX_TOOLS {
            return Err(Error::invalid("tools", format!("tools has {} entries; the limit is {MAX_TOOLS}", list.len())));
        }
        for (i, tool) in list.iter().enumerate() {
            let name = tool["function"]["name"].as_str().filter(|name| !name.is_empty());
            if tool["type"] != "function" || name.is_none() {
                let field = format!("tools[{i}]");
                let message = format!("{field} must be {{\"type\": \"function\", \"function\": {{\"name\": ...}}}}");
                return Err(Error::invalid(field, message));
            }
        }
        let has = |name: &str| list.iter().any(|tool| tool["function"]["name"] == name);
        let choice = match choice {
            None | Some(Value::Null) if list.is_empty() => Choice::None,
            None | Some(Value::Null) => Choice::Auto,
            Some(Value::String(word)) => match word.as_str() {
                "none" => Choice::None,
                "auto" => Choice::Auto,
                "required" => Choice::Required,
                _ => {
                    let message = format!("tool_choice is '{word}'; use none, auto, required or a function");
                    return Err(Error::invalid("tool_choice", message));
                }
            },
            Some(object) => match object["function"]["name"].as_str() {
                Some(name) if has(name) => Choice::Named(name.to_owned()),
                Some(name) => {
                    return Err(Error::invalid(
                        "tool_choice",
                        format!("tool_choice names '{name}', which is not in tools"),
                    ));
                }
                None => return Err(Error::invalid("tool_choice", "tool_choice must name a function")),
            },
        };
        if choice == Choice::Required && list.is_empty() {
            return Err(Error::invalid("tool_choice", "tool_choice is 'required', but tools is empty"));
        }
        Ok(Self { list, choice, single: false })
    }

    /// The tools that the template shows.
    pub fn shown(&self) -> Option<&[Value]> {
        (self.choice != Choice::None && !self.list.is_empty()).then_some(self.list.as_slice())
    }

    /// Whether the answer's text may hold calls.
    pub fn may_call(&self) -> bool {
        self.shown().is_some()
    }

    /// Why an answer ended, as a client expects to read it.
    pub fn reason(&self, reason: FinishReason, called: bool) -> FinishReason {
        match self.choice {
            // OpenAI tells of a call only where the model had a choice
            Choice::Named(_) => reason,
            _ if called => FinishReason::ToolCalls,
            _ => reason,
        }
    }

    /// What holds the model to a call, where one must be.
    pub fn grammar(&self) -> Option<Grammar> {
        let parameters = |tool: &Value| match &tool["function"]["parameters"] {
            Value::Object(schema) => Value::Object(schema.clone()),
            _ => json!({"type": "object"}),
        };
        let schema = match &self.choice {
            Choice::None | Choice::Auto => return None,
            Choice::Named(name) => {
                parameters(self.list.iter().find(|tool| tool["function"]["name"] == *name.as_str())?)
            }
            Choice::Required => {
                let call = |tool: &Value| {
                    json!({
                        "type": "object",
                        "properties": {"name": {"const": tool["function"]["name"]}, "arguments": parameters(tool)},
                        "required": ["name", "arguments"],
                        "additionalProperties": false,
                    })
                };
                json!({"anyOf": self.list.iter().map(call).collect::<Vec<_>>()})
            }
        };
        Some(Grammar::JsonSchema(schema.to_string().into()))
    }
}

/// Splits an answer, as it comes, into text to show and calls.
#[derive(Debug)]
pub struct Splitter {
    tools: Tools,
    held: String,
    collecting: bool,
}

impl Splitter {
    /// A splitter for a request's tools.
    pub fn new(tools: Tools) -> Self {
        let collecting = matches!(tools.choice, Choice::Required | Choice::Named(_));
        Self { tools, held: String::new(), collecting }
    }

    /// Takes text; what can be shown.
    pub fn push(&mut self, text: &str) -> String {
        if !self.tools.may_call() {
            return text.to_owned();
        }
        self.held.push_str(text);
        if self.collecting {
            return String::new();
        }
        if let Some(at) = [HERMES, MISTRAL].iter().filter_map(|mark| self.held.find(mark)).min() {
            self.collecting = true;
            let calls = self.held.split_off(at);
            return std::mem::replace(&mut self.held, calls);
        }
        let keep = [HERMES, MISTRAL].iter().map(|mark| begun(&self.held, mark)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// The end: the calls, or what was held back and is none.
    pub fn finish(&mut self) -> (String, Vec<Call>) {
        let held = std::mem::take(&mut self.held);
        let calls = match &self.tools.choice {
            _ if !self.collecting => None,
            Choice::Named(name) => Some(vec![Call { name: name.clone(), arguments: held.trim().to_owned() }])
                .filter(|calls| serde_json::from_str::<Value>(&calls[0].arguments).is_ok()),
            Choice::Required => serde_json::from_str(&held).ok().and_then(|value| call(&value)).map(|call| vec![call]),
            Choice::Auto | Choice::None => calls(&held),
        };
        match calls {
            Some(mut calls) => {
                calls.truncate(if self.tools.single { 1 } else { calls.len() });
                (String::new(), calls)
            }
            None => (held, Vec::new()),
        }
    }
}

/// Bytes of the longest end of `text` with which `mark` (ASCII) begins.
fn begun(text: &str, mark: &str) -> usize {
    (1..mark.len()).rev().find(|len| text.ends_with(&mark[..*len])).unwrap_or(0)
}

fn calls(text: &str) -> Option<Vec<Call>> {
    if let Some(list) = text.strip_prefix(MISTRAL) {
        let list: Vec<Value> = serde_json::from_str(list.trim()).ok()?;
        return list.iter().map(call).collect();
    }
    let mut found = Vec::new();
    for part in text.split(HERMES).skip(1) {
        let body = part.split(HERMES_END).next().unwrap_or(part);
        found.push(call(&serde_json::from_str(body.trim()).ok()?)?);
    }
    Some(found).filter(|found| !found.is_empty())
}

fn call(value: &Value) -> Option<Call> {
    let name = value["name"].as_str()?.to_owned();
    let arguments = match value.get("arguments").or_else(|| value.get("parameters")) {
        None => Value::Object(Map::new()),
        Some(arguments) => arguments.clone(),
    };
    let arguments = arguments.as_str().map_or_else(|| arguments.to_string(), str::to_owned);
    Some(Call { name, arguments })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools(choice: Choice) -> Tools {
        Tools { list: vec![json!({"type": "function", "function": {"name": "f"}})], choice, single: false }
    }

    fn split(choice: Choice, pieces: &[&str]) -> (String, Vec<Call>) {
        let mut splitter = Splitter::new(tools(choice));
        let mut shown: String = pieces.iter().map(|piece| splitter.push(piece)).collect();
        let (rest, calls) = splitter.finish();
        shown += &rest;
        (shown, calls)
    }

    #[test]
    fn calls_are_found_over_pieces_and_text_stays_text() {
        let f = |arguments: &str| Call { name: "f".into(), arguments: arguments.into() };
        let hermes = ["I call. <tool", "_call>{\"name\": \"f\", \"arguments\": {\"a\":1}}</tool", "_call>"];
        assert_eq!(split(Choice::Auto, &hermes), ("I call. ".into(), vec![f("{\"a\":1}")]));
        let mistral = ["[TOOL_CALLS][{\"name\":\"f\",\"arguments\":{}},{\"name\":\"f\",\"arguments\":{}}]"];
        assert_eq!(split(Choice::Auto, &mistral), (String::new(), vec![f("{}"), f("{}")]));
        assert_eq!(split(Choice::Auto, &["a <tool", " b"]), ("a <tool b".into(), vec![]));
        assert_eq!(split(Choice::Auto, &["<tool_call>{broken"]), ("<tool_call>{broken".into(), vec![]));
        assert_eq!(split(Choice::Named("f".into()), &["{\"a\"", ":1}"]), (String::new(), vec![f("{\"a\":1}")]));
        assert_eq!(split(Choice::Required, &["{\"name\":\"f\",\"arguments\":{}}"]), (String::new(), vec![f("{}")]));
    }

    #[test]
    fn wrong_tools_name_the_field() {
        let field = |tools: Value, choice: Value| Tools::parse(Some(&tools), Some(&choice)).unwrap_err().field;
        assert_eq!(field(json!({}), Value::Null).as_deref(), Some("tools"));
        assert_eq!(field(json!([{"type": "x"}]), Value::Null).as_deref(), Some("tools[0]"));
        assert_eq!(field(json!([]), json!("required")).as_deref(), Some("tool_choice"));
        assert_eq!(field(json!([]), json!({"function": {"name": "g"}})).as_deref(), Some("tool_choice"));
    }
}
