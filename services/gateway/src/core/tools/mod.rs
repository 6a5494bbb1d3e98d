//! Tools: what a request says of them, the grammar that makes a call certain, and calls found in an answer.
//!
//! Calls are read in the forms that models are trained on: [`format`] has the table. A required call is held by a grammar
//! to a JSON list of `{"name": ..., "arguments": ...}`, a named one to the arguments alone.
mod channels;
mod format;
mod reply;

pub use reply::{Said, Splitter, Style};

use super::grammar::{closed, compact, moved};
use moesaic_types::{Error, FinishReason, Grammar, Result};
use serde_json::{Value, json};

const MAX_TOOLS: usize = 128;
/// Calls in one answer at most, where a grammar holds it to calls: a model that has no end would go on for ever.
const MAX_FORCED: usize = 16;

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

impl Call {
    /// An id for a client to answer a call by.
    pub fn new_id() -> String {
        format!("call_{}", uuid::Uuid::new_v4().simple())
    }
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
            // an answer that was cut off may have ended in the middle of another call
            _ if called && reason == FinishReason::Stop => FinishReason::ToolCalls,
            _ => reason,
        }
    }

    /// What holds the model to a call, where one must be.
    pub fn grammar(&self) -> Option<Grammar> {
        // arguments are an object; a tool without parameters gets an empty one
        let parameters = |tool: &Value| match &tool["function"]["parameters"] {
            Value::Object(schema) if !schema.is_empty() => {
                let mut schema = schema.clone();
                schema.entry("type").or_insert_with(|| json!("object"));
                closed(Value::Object(schema))
            }
            _ => json!({"type": "object", "properties": {}, "additionalProperties": false}),
        };
        let schema = match &self.choice {
            Choice::None | Choice::Auto => return None,
            Choice::Named(name) => {
                parameters(self.list.iter().find(|tool| tool["function"]["name"] == *name.as_str())?)
            }
            Choice::Required => {
                let above = if self.single { "#" } else { "#/items" };
                let call = |(index, tool): (usize, &Value)| {
                    let place = format!("{above}/anyOf/{index}/properties/arguments");
                    let arguments = moved(parameters(tool), &place);
                    json!({
                        "type": "object",
                        "properties": {"name": {"const": tool["function"]["name"]}, "arguments": arguments},
                        "required": ["name", "arguments"],
                        "additionalProperties": false,
                    })
                };
                let any = json!({"anyOf": self.list.iter().enumerate().map(call).collect::<Vec<_>>()});
                match self.single {
                    true => any,
                    false => json!({"type": "array", "items": any, "minItems": 1, "maxItems": MAX_FORCED}),
                }
            }
        };
        Some(Grammar::JsonSchema(compact(schema).to_string().into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_required_call_is_held_to_the_tools_without_free_white_space() {
        let list = vec![json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}})];
        let schema = |choice: Choice, single: bool| {
            let tools = Tools { list: list.clone(), choice, single };
            match tools.grammar() {
                Some(Grammar::JsonSchema(text)) => serde_json::from_str::<Value>(&text).unwrap(),
                other => panic!("{other:?}"),
            }
        };
        let several = schema(Choice::Required, false);
        assert_eq!((&several["type"], &several["minItems"]), (&json!("array"), &json!(1)));
        let one = schema(Choice::Required, true);
        assert_eq!(one["anyOf"], several["items"]["anyOf"]);
        for schema in [several, one, schema(Choice::Named("f".into()), false)] {
            assert_eq!(schema["x-guidance"]["whitespace_flexible"], false, "{schema}");
        }
    }

    #[test]
    fn forced_arguments_are_closed_objects_whose_references_go_with_them() {
        let node = json!({"properties": {"x": {"$ref": "#/$defs/X"}, "kids": {"items": {"$ref": "#"}}},
            "$defs": {"X": {"type": "object", "properties": {"a": {"type": "integer"}}}}});
        let tool = |parameters: Value| json!({"type": "function", "function": {"name": "f", "parameters": parameters}});
        let list = vec![tool(json!({})), tool(node)];
        let schema = |choice: Choice, single: bool| match (Tools { list: list.clone(), choice, single }).grammar() {
            Some(Grammar::JsonSchema(text)) => serde_json::from_str::<Value>(&text).unwrap(),
            other => panic!("{other:?}"),
        };
        for (single, above) in [(true, ""), (false, "/items")] {
            let all = schema(Choice::Required, single);
            let arguments = |index: usize| {
                let place = format!("{above}/anyOf/{index}/properties/arguments");
                (all.pointer(&place).unwrap().clone(), format!("#{place}"))
            };
            let (empty, _) = arguments(0);
            assert_eq!((&empty["type"], &empty["additionalProperties"]), (&json!("object"), &json!(false)));
            let (node, place) = arguments(1);
            assert_eq!((&node["type"], &node["additionalProperties"]), (&json!("object"), &json!(false)));
            assert_eq!(node["properties"]["x"]["$ref"], format!("{place}/$defs/X"));
            assert_eq!(node["properties"]["kids"]["items"]["$ref"], place);
            assert!(
                all.pointer(&format!("{}/$defs/X/additionalProperties", &place[1..])).is_some_and(|open| open == false)
            );
        }
        assert_eq!(schema(Choice::Named("f".into()), false)["additionalProperties"], false);
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
