//! The channels of GPT-OSS's answers (the harmony format): `<|channel|>analysis<|message|>...<|end|>` is reasoning,
//! `final` the answer, `commentary to=functions.NAME` a call. Where no channel is ever named, the text is the answer.
use super::Call;
use super::reply::{Said, begun};

/// Texts that begin or end a part.
const MARKS: [&str; 7] =
    ["<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"];
/// What templates of these models contain.
pub(super) const TEMPLATE: &str = "<|channel|>";

/// Where an answer is.
#[derive(Clone, Debug, PartialEq)]
enum Part {
    /// Nothing was marked yet.
    Unmarked,
    /// Between two parts: nothing of it is shown.
    Between,
    /// In what stands before `<|message|>`: who speaks to whom, and in which channel.
    Head(String),
    /// In a part for the user.
    Content,
    /// In a part that is not.
    Reasoning,
    /// In the arguments of a call.
    Call(Call),
}

/// Splits an answer into its channels.
#[derive(Clone, Debug)]
pub(super) struct Channels {
    part: Part,
    held: String,
    may_call: bool,
}

impl Channels {
    /// Without `may_call`, what is meant for a function is shown as content.
    pub(super) fn new(may_call: bool) -> Self {
        Self { part: Part::Unmarked, held: String::new(), may_call }
    }

    pub(super) fn push(&mut self, text: &str) -> Said {
        self.held.push_str(text);
        let mut said = Said::default();
        while let Some((at, mark)) = MARKS.iter().filter_map(|mark| Some((self.held.find(mark)?, *mark))).min() {
            let rest = self.held.split_off(at + mark.len());
            self.held.truncate(at);
            let before = std::mem::replace(&mut self.held, rest);
            self.take(&before, &mut said);
            self.turn(mark, &mut said);
        }
        let keep = MARKS.iter().map(|mark| begun(&self.held, mark)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        let shown = std::mem::replace(&mut self.held, rest);
        self.take(&shown, &mut said);
        said
    }

    pub(super) fn finish(&mut self) -> Said {
        let mut said = Said::default();
        let rest = std::mem::take(&mut self.held);
        self.take(&rest, &mut said);
        self.end(&mut said);
        said
    }

    /// Text of the part that the answer is in.
    fn take(&mut self, text: &str, said: &mut Said) {
        match &mut self.part {
            Part::Unmarked | Part::Content => said.text += text,
            Part::Reasoning => said.reasoning += text,
            Part::Head(head) => head.push_str(text),
            Part::Call(call) => call.arguments.push_str(text),
            Part::Between => {}
        }
    }

    fn turn(&mut self, mark: &str, said: &mut Said) {
        if let Part::Head(head) = &mut self.part {
            match mark {
                "<|channel|>" | "<|constrain|>" => return head.push_str(mark),
                "<|message|>" => {
                    let head = std::mem::take(head);
                    self.part = self.addressed(&head);
                    return;
                }
                _ => {}
            }
        }
        match mark {
            "<|start|>" | "<|channel|>" => {
                self.end(said);
                self.part = Part::Head(mark.to_owned());
            }
            // without a beginning it ends nothing
            _ if self.part == Part::Unmarked => {}
            _ => self.end(said),
        }
    }

    /// The part that a head begins.
    fn addressed(&self, head: &str) -> Part {
        let word = |after: &str| {
            let (_, rest) = head.split_once(after)?;
            rest.split(|c: char| c.is_whitespace() || c == '<').find(|word| !word.is_empty())
        };
        let function = word("to=").and_then(|to| to.strip_prefix("functions."));
        match (word("<|channel|>"), function) {
            (_, Some(name)) if self.may_call => Part::Call(Call { name: name.to_owned(), arguments: String::new() }),
            (Some("analysis"), _) => Part::Reasoning,
            // for a tool that is no function of the client's
            (_, None) if head.contains("to=") => Part::Reasoning,
            _ => Part::Content,
        }
    }

    /// The end of a part.
    fn end(&mut self, said: &mut Said) {
        if let Part::Call(Call { name, arguments }) = std::mem::replace(&mut self.part, Part::Between) {
            let arguments = match arguments.trim() {
                "" => "{}".to_owned(),
                arguments => arguments.to_owned(),
            };
            said.calls.push(Call { name, arguments });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said in all, however the text is cut.
    fn split(may_call: bool, text: &str) -> Said {
        let cut = |len: usize| {
            let mut channels = Channels::new(may_call);
            let mut all = Said::default();
            let mut rest = text;
            while !rest.is_empty() {
                let (piece, after) = rest.split_at(rest.ceil_char_boundary(len.min(rest.len())));
                all.add(channels.push(piece));
                rest = after;
            }
            all.add(channels.finish());
            all
        };
        let whole = cut(text.len().max(1));
        for len in [1, 3, 7] {
            assert_eq!(cut(len), whole, "pieces of {len}: {text}");
        }
        whole
    }

    fn said(text: &str, reasoning: &str, calls: &[(&str, &str)]) -> Said {
        let call = |(name, arguments): &(&str, &str)| Call { name: (*name).into(), arguments: (*arguments).into() };
        Said { text: text.into(), reasoning: reasoning.into(), calls: calls.iter().map(call).collect() }
    }

    #[test]
    fn reasoning_and_answer_are_told_apart() {
        let text =
            "<|channel|>analysis<|message|>Let me < think.<|end|><|start|>assistant<|channel|>final<|message|>Hi<|x|>!";
        assert_eq!(split(true, text), said("Hi<|x|>!", "Let me < think.", &[]));
        assert_eq!(split(true, &format!("{text}<|return|>")), said("Hi<|x|>!", "Let me < think.", &[]));
        assert_eq!(split(true, "<|channel|>analysis<|message|>cut"), said("", "cut", &[]));
    }

    #[test]
    fn calls_are_found_with_either_order_of_a_head() {
        let after = "<|channel|>analysis<|message|>I call.<|end|><|start|>assistant<|channel|>commentary to=functions.f \
                     <|constrain|>json<|message|>{\"a\":1}<|call|>";
        assert_eq!(split(true, after), said("", "I call.", &[("f", "{\"a\":1}")]));
        let before = "<|start|>assistant to=functions.g<|channel|>commentary json<|message|> <|call|>";
        assert_eq!(split(true, before), said("", "", &[("g", "{}")]));
        let preamble = "<|channel|>commentary<|message|>First,<|end|><|start|>assistant<|channel|>commentary \
                        to=functions.f<|message|>{}";
        assert_eq!(split(true, preamble), said("First,", "", &[("f", "{}")]));
        assert_eq!(split(true, "<|channel|>commentary to=browser.open<|message|>{}<|call|>"), said("", "{}", &[]));
        assert_eq!(split(false, before).text, " ", "no tool may be called");
    }

    #[test]
    fn text_without_a_channel_is_the_answer() {
        assert_eq!(split(true, "{\"a\": 1} <|"), said("{\"a\": 1} <|", "", &[]));
    }
}
