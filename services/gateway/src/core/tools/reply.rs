//! Splits an answer, as it comes, into what is shown, reasoning, and calls of tools.
use super::channels::{self, Channels};
use super::format::{self, Format};
use super::{Call, Choice, Tools};
use crate::served::ServedModel;
use serde_json::Value;
use std::sync::Arc;

/// What a part of an answer says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Said {
    /// The answer's text.
    pub text: String,
    /// What the model said to itself before, where its format tells it apart.
    pub reasoning: String,
    /// Calls of tools.
    pub calls: Vec<Call>,
}

impl Said {
    /// Adds what was said next.
    pub fn add(&mut self, next: Self) {
        self.text += &next.text;
        self.reasoning += &next.reasoning;
        self.calls.extend(next.calls);
    }
}

/// How the answers of a request are read.
#[derive(Clone, Debug)]
pub struct Style {
    /// The request's tools.
    pub tools: Tools,
    formats: Arc<[&'static Format]>,
    channels: bool,
}

impl Style {
    /// Of a model's answers, by its chat template.
    pub fn new(model: &ServedModel, tools: Tools) -> Self {
        let template = model.template.as_deref();
        let channels = template.is_some_and(|template| template.mentions(channels::TEMPLATE));
        Self { formats: format::of(template).into(), channels, tools }
    }

    /// Whether special tokens may be marks of an answer's parts, so that the splitter must see them.
    pub fn has_marks(&self) -> bool {
        self.channels || self.tools.may_call()
    }

    /// For one answer.
    pub fn splitter(&self) -> Splitter {
        let reading = match &self.tools.choice {
            // a grammar holds the answer to these from its beginning
            Choice::Required | Choice::Named(_) => Reading::Forced,
            _ if self.channels => Reading::Channels(Channels::new(self.tools.may_call())),
            _ if self.tools.may_call() => Reading::Text { begun: false },
            _ => Reading::Plain,
        };
        Splitter { style: self.clone(), held: String::new(), reading, called: 0 }
    }
}

#[derive(Clone, Debug)]
enum Reading {
    /// All is shown.
    Plain,
    /// All is a call, or calls.
    Forced,
    /// Text is shown until a call may begin; `begun`: something was shown.
    Text {
        begun: bool,
    },
    /// From the first call on; what is text is known at the end.
    Calls,
    Channels(Channels),
}

/// Splits one answer.
#[derive(Clone, Debug)]
pub struct Splitter {
    style: Style,
    held: String,
    reading: Reading,
    called: usize,
}

impl Splitter {
    /// Takes text; what can be told of it now.
    pub fn push(&mut self, text: &str) -> Said {
        let shown = |text| Said { text, ..Said::default() };
        match &mut self.reading {
            Reading::Plain => shown(text.to_owned()),
            Reading::Channels(channels) => {
                let said = channels.push(text);
                self.limited(said)
            }
            Reading::Forced | Reading::Calls => {
                self.held.push_str(text);
                Said::default()
            }
            Reading::Text { begun } => {
                self.held.push_str(text);
                let formats = &self.style.formats;
                if !*begun && may_be_bare(formats, &self.held) {
                    if !self.held.trim_start().is_empty() {
                        self.reading = Reading::Calls;
                    }
                    return Said::default();
                }
                let found = formats.iter().filter_map(|format| self.held.find(format.mark)).min();
                let keep = formats.iter().map(|format| self::begun(&self.held, format.mark)).max().unwrap_or(0);
                let rest = self.held.split_off(found.unwrap_or(self.held.len() - keep));
                let text = std::mem::replace(&mut self.held, rest);
                *begun |= !text.trim_start().is_empty();
                if found.is_some() {
                    self.reading = Reading::Calls;
                }
                shown(text)
            }
        }
    }

    /// The end: the calls that were held back, and the text around them.
    pub fn finish(&mut self) -> Said {
        let held = std::mem::take(&mut self.held);
        let said = match &mut self.reading {
            Reading::Plain | Reading::Text { .. } => Said { text: held, ..Said::default() },
            Reading::Channels(channels) => channels.finish(),
            Reading::Calls => calls_in(&self.style.formats, &self.style.tools.list, &held),
            Reading::Forced => match forced(&self.style.tools.choice, &held) {
                calls if calls.is_empty() => Said { text: held, ..Said::default() },
                calls => Said { calls, ..Said::default() },
            },
        };
        self.limited(said)
    }

    /// Without more calls than the request wants.
    fn limited(&mut self, mut said: Said) -> Said {
        if self.style.tools.single {
            said.calls.truncate(1 - self.called.min(1));
        }
        self.called += said.calls.len();
        said
    }
}

/// Whether a call without a mark begins the text, or may yet.
fn may_be_bare(formats: &[&Format], text: &str) -> bool {
    let text = text.trim_start();
    let mut bare = formats.iter().filter_map(|format| format.bare);
    bare.any(|bare| text.starts_with(bare) || bare.starts_with(text))
}

/// Bytes of the longest end of `text` with which `mark` begins.
pub(super) fn begun(text: &str, mark: &str) -> usize {
    let starts = mark.char_indices().map(|(at, _)| at).filter(|at| *at > 0);
    starts.rev().find(|at| text.ends_with(&mark[..*at])).unwrap_or(0)
}

/// All calls of a text that begins with one, and what stands between and behind them. What is no call stays text.
fn calls_in(formats: &[&Format], tools: &[Value], text: &str) -> Said {
    let mut said = Said::default();
    let bare = formats.iter().find(|format| format.bare.is_some_and(|bare| text.trim_start().starts_with(bare)));
    let mut rest = text;
    if let Some((calls, len)) = bare.and_then(|format| (format.read)(text, tools)) {
        said.calls = calls;
        rest = &text[len..];
    }
    while let Some((at, format)) =
        formats.iter().filter_map(|format| Some((rest.find(format.mark)?, format))).min_by_key(|(at, _)| *at)
    {
        said.text += &rest[..at];
        rest = &rest[at..];
        let len = match (format.read)(rest, tools) {
            Some((calls, len)) => {
                said.calls.extend(calls);
                len
            }
            None => {
                said.text += format.mark;
                format.mark.len()
            }
        };
        rest = &rest[len..];
    }
    said.text += rest;
    if !said.calls.is_empty() && said.text.trim().is_empty() {
        // the line breaks between calls
        said.text.clear();
    }
    said
}

/// The calls of an answer that a grammar held to them; of one that was cut off, those that are whole.
fn forced(choice: &Choice, text: &str) -> Vec<Call> {
    let text = text.trim();
    if let Choice::Named(name) = choice {
        let whole = serde_json::from_str::<Value>(text).is_ok();
        return Vec::from_iter(whole.then(|| Call { name: name.clone(), arguments: text.to_owned() }));
    }
    let mut rest = text.strip_prefix('[').unwrap_or(text);
    let mut calls = Vec::new();
    while let Some((value, len)) = format::json_at(rest) {
        let Some(call) = format::call(&value) else { break };
        calls.push(call);
        rest = rest[len..].trim_start();
        rest = rest.strip_prefix(',').unwrap_or(rest);
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::*;
    use moesaic_model::chat::ChatTemplate;
    use serde_json::{Map, json};

    fn style(template: &str, choice: Choice) -> Style {
        let template = ChatTemplate::new(template.to_owned(), Map::new()).unwrap();
        let list = vec![json!({"type": "function", "function": {"name": "f"}})];
        let channels = template.mentions(channels::TEMPLATE);
        Style { tools: Tools { list, choice, single: false }, formats: format::of(Some(&template)).into(), channels }
    }

    fn split(style: &Style, pieces: &[&str]) -> (String, Vec<Call>) {
        let mut splitter = style.splitter();
        let mut said = Said::default();
        pieces.iter().for_each(|piece| said.add(splitter.push(piece)));
        said.add(splitter.finish());
        assert_eq!(said.reasoning, "");
        (said.text, said.calls)
    }

    fn f(arguments: &str) -> Call {
        Call { name: "f".into(), arguments: arguments.into() }
    }

    #[test]
    fn calls_are_found_over_pieces_and_text_stays_text() {
        let auto = style("", Choice::Auto);
        let hermes = ["I call. <tool", "_call>{\"name\": \"f\", \"arguments\": {\"a\":1}}</tool", "_call>"];
        assert_eq!(split(&auto, &hermes), ("I call. ".into(), vec![f("{\"a\":1}")]));
        let mistral = ["[TOOL_CALLS][{\"name\":\"f\",\"arguments\":{}},{\"name\":\"f\",\"arguments\":null}]"];
        assert_eq!(split(&auto, &mistral), (String::new(), vec![f("{}"), f("{}")]));
        assert_eq!(split(&auto, &["a <tool", " b"]), ("a <tool b".into(), vec![]));
        assert_eq!(split(&auto, &["<tool_call>{broken"]), ("<tool_call>{broken".into(), vec![]));
        let two = ["<tool_call>{\"name\":\"f\"}</tool_call>\n", "<tool_call>{\"name\":\"f\"}</tool_call>\n"];
        assert_eq!(split(&auto, &two), (String::new(), vec![f("{}"), f("{}")]));
        let single = Style { tools: Tools { single: true, ..auto.tools.clone() }, ..auto.clone() };
        assert_eq!(split(&single, &two), (String::new(), vec![f("{}")]));
    }

    #[test]
    fn text_around_calls_and_calls_that_are_none_are_kept() {
        let auto = style("", Choice::Auto);
        let after = ["<tool_call>{\"name\":\"f\"}</tool_call> I ", "wait for <tool_call>it</tool_call>."];
        let text = " I wait for <tool_call>it</tool_call>.";
        assert_eq!(split(&auto, &after), (text.into(), vec![f("{}")]));
    }

    #[test]
    fn a_call_without_a_mark_is_one_at_the_beginning_only() {
        let llama = style("<|python_tag|>", Choice::Auto);
        let call = "{\"name\":\"f\",\"parameters\":{\"a\":1}}";
        assert_eq!(split(&llama, &["\n", "{\"na", &call[4..]]), (String::new(), vec![f("{\"a\":1}")]));
        assert_eq!(split(&llama, &["See ", call]), (format!("See {call}"), vec![]));
        assert_eq!(split(&llama, &["{\"a\"", ": 1}"]), ("{\"a\": 1}".into(), vec![]));
        assert_eq!(split(&llama, &["See <|python", "_tag|>", call]), ("See ".into(), vec![f("{\"a\":1}")]));
        assert_eq!(split(&style("", Choice::Auto), &[call]), (call.into(), vec![]), "other models");
    }

    #[test]
    fn a_call_that_must_be_is_read_whole_and_several_in_a_list() {
        let named = style("", Choice::Named("f".into()));
        assert_eq!(split(&named, &["{\"a\"", ":1}"]), (String::new(), vec![f("{\"a\":1}")]));
        assert_eq!(split(&named, &["{\"a\""]), ("{\"a\"".into(), vec![]));
        let required = style("<|channel|>", Choice::Required);
        let one = "{\"name\":\"f\",\"arguments\":{}}";
        assert_eq!(split(&required, &[one]), (String::new(), vec![f("{}")]));
        assert_eq!(split(&required, &["[", one, ",", one, "]"]), (String::new(), vec![f("{}"), f("{}")]));
        assert_eq!(split(&required, &["[", one, ",{\"name\":\"f"]), (String::new(), vec![f("{}")]), "cut off");
    }
}
