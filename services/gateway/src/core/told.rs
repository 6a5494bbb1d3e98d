//! What a request's span tells of the request and its answers, by OpenTelemetry's names for GenAI.
use moesaic_telemetry::{count, genai};
use moesaic_types::{FinishReason, Usage};
use std::sync::{Mutex, PoisonError};
use tracing::Span;

/// What a client asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// An answer to a conversation.
    Chat,
    /// Text that goes on with a prompt.
    TextCompletion,
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::TextCompletion => "text_completion",
        }
    }
}

/// Opens a request's span: its name, the door's own fields, and those that [`Told`] fills.
macro_rules! request_span {
    ($name:literal, $($fields:tt)*) => {
        tracing::info_span!(
            $name,
            $($fields)*
            gen_ai.operation.name = tracing::field::Empty,
            gen_ai.provider.name = tracing::field::Empty,
            gen_ai.request.model = tracing::field::Empty,
            gen_ai.usage.input_tokens = tracing::field::Empty,
            gen_ai.usage.output_tokens = tracing::field::Empty,
        )
    };
}
pub(crate) use request_span;

/// A request's span, which both doors open by [`request_span`]. All jobs of a request share it; how
/// they ended is told when the last one did.
pub(crate) struct Told {
    span: Span,
    answers: Mutex<Answers>,
}

#[derive(Default)]
struct Answers {
    output_tokens: usize,
    finish_reasons: Vec<&'static str>,
}

impl Told {
    /// Of the span that is entered.
    pub(super) fn of_current_span() -> Self {
        Self { span: Span::current(), answers: Mutex::default() }
    }

    /// The span: every attempt at an answer is a child.
    pub(super) fn span(&self) -> &Span {
        &self.span
    }

    /// What is asked for, once a request: a second time is written beside the first.
    pub(crate) fn asked(&self, operation: Operation, model: &str, input_tokens: usize) {
        self.span
            .record("gen_ai.operation.name", operation.name())
            .record("gen_ai.provider.name", "moesaic")
            .record("gen_ai.request.model", model)
            .record("gen_ai.usage.input_tokens", count(input_tokens));
    }

    /// An answer ended.
    pub(super) fn ended(&self, reason: FinishReason, usage: &Usage) {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.output_tokens += usage.completion_tokens;
        answers.finish_reasons.push(reason.name());
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        let answers = self.answers.get_mut().unwrap_or_else(PoisonError::into_inner);
        if !answers.finish_reasons.is_empty() {
            self.span.record("gen_ai.usage.output_tokens", count(answers.output_tokens));
            genai::finish_reasons(&self.span, &answers.finish_reasons);
        }
    }
}
