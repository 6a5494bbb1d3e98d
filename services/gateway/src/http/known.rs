//! Which fields a body may have. A field that is not known is an error: ignored, it would change the answer silently.
use moesaic_types::{Error, Result};
use serde_json::{Map, Value};

/// What both generating routes take.
pub(super) const GENERATE: &[&str] = &[
    "model",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "stop",
    "include_stop_str_in_output",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "return_tokens_as_token_ids",
    "n",
    "stream",
    "stream_options",
    "response_format",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "priority",
    "deadline_ms",
];

/// What only `/v1/chat/completions` takes.
pub(super) const CHAT: &[&str] = &[
    "messages",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "logprobs",
    "top_logprobs",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "reasoning_effort",
    "modalities",
];

/// What only `/v1/completions` takes.
pub(super) const COMPLETIONS: &[&str] = &["prompt", "logprobs", "echo", "best_of", "add_special_tokens"];

/// What `/tokenize` takes.
pub(super) const TOKENIZE: &[&str] = &[
    "model",
    "prompt",
    "messages",
    "add_special_tokens",
    "add_generation_prompt",
    "chat_template_kwargs",
    "tools",
    "return_token_strs",
];

/// What `/detokenize` takes.
pub(super) const DETOKENIZE: &[&str] = &["model", "tokens"];

/// Taken and without effect: they concern OpenAI's own platform, or are hints that change no answer.
pub(super) const WITHOUT_EFFECT: &[&str] = &[
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "verbosity",
    "guided_decoding_backend",
];

/// Fields that others have, with what to do instead.
const REFUSED: &[(&str, &str)] = &[
    ("functions", "use tools"),
    ("function_call", "use tool_choice"),
    ("suffix", "filling in the middle is not offered"),
    ("audio", "only text is offered"),
    ("web_search_options", "searching is not offered; use tools"),
    ("bad_words", "use logit_bias with the words' tokens, or a grammar"),
    ("use_beam_search", "beam search is not offered; use n"),
    ("cache_salt", "each API key has prefix blocks of its own already"),
];

/// Checks that a body has no other fields than these, nulls aside.
///
/// # Errors
/// `InvalidArgument` naming the field, and the one that was probably meant.
pub(super) fn only(object: &Map<String, Value>, lists: &[&[&str]]) -> Result<()> {
    for (field, value) in object {
        if value.is_null() || lists.iter().any(|list| list.contains(&field.as_str())) {
            continue;
        }
        let shown: String = field.chars().take(60).collect();
        if let Some((_, instead)) = REFUSED.iter().find(|(name, _)| name == field) {
            return Err(Error::invalid(field.clone(), format!("{field} is not supported: {instead}")));
        }
        let nearest =
            lists.iter().copied().flatten().map(|known| (strsim::damerau_levenshtein(&shown, known), known)).min();
        let hint = match nearest {
            Some((distance, known)) if distance <= 1 + known.len() / 4 => format!("did you mean {known}?"),
            _ => "/openapi.json lists the known ones".to_owned(),
        };
        return Err(Error::invalid(shown.clone(), format!("{shown} is not a known field; {hint}")));
    }
    Ok(())
}
