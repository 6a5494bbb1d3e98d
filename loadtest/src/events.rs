//! Server-sent events of the OpenAI API's streams, as far as a measurement needs them.
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use std::borrow::Cow;

/// Tokens as a server counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt.
    pub prompt: usize,
    /// Of the prompt, those that came from a prefix cache.
    pub cached: usize,
    /// Of the answer.
    pub completion: usize,
}

/// What an event says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Event {
    /// It has a piece of the answer that is not empty.
    pub text: bool,
    /// It tells the usage so far.
    pub usage: Option<Usage>,
    /// It tells of an error.
    pub error: Option<String>,
    /// The stream's last event.
    pub done: bool,
}

/// Puts events together from pieces that end anywhere.
#[derive(Debug, Default)]
pub struct Events {
    unfinished: Vec<u8>,
}

impl Events {
    /// The events that end in this piece.
    pub fn read(&mut self, piece: &[u8]) -> Vec<Event> {
        self.unfinished.extend_from_slice(piece);
        let Some(end) = self.unfinished.iter().rposition(|byte| *byte == b'\n') else { return Vec::new() };
        let rest = self.unfinished.split_off(end + 1);
        let whole = std::mem::replace(&mut self.unfinished, rest);
        whole.split(|byte| *byte == b'\n').filter_map(|line| line.strip_prefix(b"data:")).map(event).collect()
    }
}

#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(borrow)]
    choices: Option<Vec<Choice<'a>>>,
    usage: Option<Counts>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow)]
    text: Option<Cow<'a, str>>,
    #[serde(borrow)]
    delta: Option<Delta<'a>>,
}

/// Of a chat: text, thoughts (two names are in use) or a call of a tool.
#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    content: Option<Cow<'a, str>>,
    #[serde(borrow)]
    reasoning_content: Option<Cow<'a, str>>,
    #[serde(borrow)]
    reasoning: Option<Cow<'a, str>>,
    tool_calls: Option<Vec<IgnoredAny>>,
}

#[derive(Deserialize)]
struct Counts {
    prompt_tokens: Option<usize>,
    completion_tokens: Option<usize>,
    prompt_tokens_details: Option<Details>,
}

#[derive(Deserialize)]
struct Details {
    cached_tokens: Option<usize>,
}

impl Choice<'_> {
    fn has_text(&self) -> bool {
        let says = |text: &Option<Cow<'_, str>>| text.as_ref().is_some_and(|text| !text.is_empty());
        let in_delta = |delta: &Delta<'_>| {
            let calls = delta.tool_calls.as_ref().is_some_and(|calls| !calls.is_empty());
            says(&delta.content) || says(&delta.reasoning_content) || says(&delta.reasoning) || calls
        };
        says(&self.text) || self.delta.as_ref().is_some_and(in_delta)
    }
}

fn event(data: &[u8]) -> Event {
    let data = data.trim_ascii();
    if data == b"[DONE]" {
        return Event { done: true, ..Event::default() };
    }
    let Ok(chunk) = serde_json::from_slice::<Chunk<'_>>(data) else { return Event::default() };
    // a usage without the answer's tokens says nothing that is measured
    let usage = chunk.usage.and_then(|counts| {
        Some(Usage {
            prompt: counts.prompt_tokens.unwrap_or(0),
            cached: counts.prompt_tokens_details.and_then(|details| details.cached_tokens).unwrap_or(0),
            completion: counts.completion_tokens?,
        })
    });
    let message = |error: Value| error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned);
    Event {
        text: chunk.choices.iter().flatten().any(Choice::has_text),
        usage,
        error: chunk.error.map(message),
        done: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = concat!(
        "data: {\"choices\":[{\"index\":0,\"text\":\" \\\"usage\\\":{ x\"}],\"usage\":null}\n\n",
        ": waiting\n\n",
        "data: {\"choices\":[{\"index\":0,\"text\":\"b\\n\"}],\"usage\":null}\r\n\r\n",
        "data: {\"choices\":[{\"index\":0,\"text\":\"\",\"finish_reason\":\"length\"}],\"usage\":null}\n\n",
        "data:{\"choices\":[],\"usage\":{\"completion_tokens\":2}}\n\n",
        "data: [DONE]\n\n",
    );

    #[test]
    fn events_are_the_same_wherever_the_stream_is_cut() {
        let text = || Event { text: true, ..Event::default() };
        let usage = Some(Usage { completion: 2, ..Usage::default() });
        let expected = [
            text(),
            text(),
            Event::default(),
            Event { usage, ..Event::default() },
            Event { done: true, ..Event::default() },
        ];
        for size in 1..STREAM.len() {
            let mut reader = Events::default();
            let events: Vec<_> = STREAM.as_bytes().chunks(size).flat_map(|piece| reader.read(piece)).collect();
            assert_eq!(events, expected, "pieces of {size}");
        }
    }

    #[test]
    fn a_chat_s_deltas_are_text_when_they_say_something() {
        let says = |delta: &str| event(format!("{{\"choices\":[{{\"delta\":{delta}}}]}}").as_bytes()).text;
        for (delta, expected) in [
            (r#"{"role":"assistant","content":null}"#, false),
            (r#"{"role":"assistant","content":""}"#, false),
            (r#"{"content": "a \u00e4"}"#, true),
            (r#"{"reasoning_content":"hm"}"#, true),
            (r#"{"tool_calls":[{"index":0}]}"#, true),
            ("{}", false),
        ] {
            assert_eq!(says(delta), expected, "{delta}");
        }
    }

    #[test]
    fn usage_and_errors_are_read_beside_text() {
        let both = event(
            br#"{"choices":[{"text":"a"}],
            "usage":{"prompt_tokens":9,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":4}}}"#,
        );
        assert_eq!((both.text, both.usage), (true, Some(Usage { prompt: 9, cached: 4, completion: 1 })));
        assert_eq!(event(br#"{"error":{"message":"m","code":500}}"#).error.as_deref(), Some("m"));
        assert_eq!(event(br#"{"error":"broken"}"#).error.as_deref(), Some("\"broken\""));
    }
}
