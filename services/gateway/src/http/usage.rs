//! `usage` of an answer.
use moesaic_types::Usage;
use serde_json::{Value, json};

/// Usage over all choices: the prompt counts once, and as cached only as far as no choice had to compute it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Totals {
    prompt: usize,
    cached: Option<usize>,
    completion: usize,
}

impl Totals {
    pub(super) fn add(&mut self, usage: Usage) {
        self.prompt = self.prompt.max(usage.prompt_tokens);
        self.cached = Some(self.cached.map_or(usage.cached_tokens, |cached| cached.min(usage.cached_tokens)));
        self.completion += usage.completion_tokens;
    }

    /// Of several prompts.
    pub(super) fn sum(totals: &[Self]) -> Self {
        totals.iter().fold(Self::default(), |all, one| Self {
            prompt: all.prompt + one.prompt,
            cached: Some(all.cached.unwrap_or(0) + one.cached.unwrap_or(0)),
            completion: all.completion + one.completion,
        })
    }

    pub(super) fn object(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached.unwrap_or(0)},
        })
    }
}
