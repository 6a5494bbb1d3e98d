//! What a door calls a field, where it has another name there than here.
use moesaic_types::Error;

/// Names of fields as the client knows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Names {
    /// Of what became the prompt.
    pub prompt: &'static str,
    /// Of `max_tokens`.
    pub max_tokens: &'static str,
    /// Of `top_logprobs`.
    pub top_logprobs: &'static str,
    /// Of what became the grammar.
    pub grammar: &'static str,
}

impl Default for Names {
    fn default() -> Self {
        Self { prompt: "prompt", max_tokens: "max_tokens", top_logprobs: "top_logprobs", grammar: "response_format" }
    }
}

impl Names {
    /// An error that speaks of the client's own field, in `field` and in the message.
    pub(crate) fn apply(&self, error: Error) -> Error {
        let Some(field) = error.field.as_deref() else { return error };
        let name = match field {
            "prompt" => self.prompt,
            "max_tokens" => self.max_tokens,
            "top_logprobs" => self.top_logprobs,
            // the scheduler names a grammar by its kind
            "response_format" | "regex" | "grammar" => self.grammar,
            _ => return error,
        };
        let message = error.message.replacen(field, name, 1);
        Error { field: Some(name.into()), message, ..error }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_speak_of_the_clients_field() {
        let names = Names { prompt: "messages", grammar: "guided_regex", ..Names::default() };
        let told = |field: &str, message: &str| {
            let error = names.apply(Error::invalid(field, message));
            (error.field.unwrap(), error.message)
        };
        assert_eq!(told("prompt", "prompt is empty"), ("messages".into(), "messages is empty".into()));
        let regex = told("regex", "regex cannot be compiled: (regex)");
        assert_eq!(regex, ("guided_regex".into(), "guided_regex cannot be compiled: (regex)".into()));
        assert_eq!(told("seed", "seed is wrong"), ("seed".into(), "seed is wrong".into()));
        let none = Error::internal("prompt");
        assert_eq!(names.apply(none.clone()), none);
    }
}
