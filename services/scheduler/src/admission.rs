//! Refuses requests that can never be served, naming the field and the limit.
use crate::engine::Info;
use crate::planner::blocks_for;
use moesaic_types::{BLOCK_TOKENS, Error, GenerateRequest, Result, SamplingParams};

/// Most alternatives that `top_logprobs` may ask for.
const MAX_TOP_LOGPROBS: u8 = 20;

/// Checks a request against the model and the pool.
pub fn validate(request: &GenerateRequest, info: &Info) -> Result<()> {
    let prompt = &request.prompt;
    if prompt.is_empty() {
        return Err(Error::invalid("prompt", "prompt must have at least one token"));
    }
    if let Some(token) = prompt.iter().find(|&&token| token as usize >= info.vocab) {
        let message = format!("prompt has token {token}; the model's vocabulary has {} tokens", info.vocab);
        return Err(Error::invalid("prompt", message));
    }
    if request.resumed_tokens >= prompt.len() {
        let message =
            format!("resumed_tokens {} must be less than the prompt's {} tokens", request.resumed_tokens, prompt.len());
        return Err(Error::invalid("resumed_tokens", message));
    }
    if prompt.len() >= info.max_context {
        let message =
            format!("prompt has {} tokens; with one token of output it must fit {}", prompt.len(), context_limit(info));
        return Err(Error::invalid("prompt", message));
    }
    if request.stop.max_tokens == 0 {
        return Err(Error::invalid("max_tokens", "max_tokens must be at least 1"));
    }
    // Beyond the model's own context an answer is cut; what the pool cannot hold is refused.
    let longest = prompt.len().saturating_add(request.stop.max_tokens).min(info.model_context);
    if longest > info.max_context {
        let message = format!(
            "prompt of {} tokens with max_tokens {} needs {} KV blocks of {BLOCK_TOKENS} tokens; it must fit {}: \
             shorten the prompt or lower max_tokens to {}",
            prompt.len(),
            request.stop.max_tokens,
            blocks_for(longest),
            context_limit(info),
            info.max_context - prompt.len()
        );
        return Err(Error::invalid("max_tokens", message));
    }
    if request.top_logprobs.is_some_and(|n| n > MAX_TOP_LOGPROBS) {
        return Err(Error::invalid("top_logprobs", format!("top_logprobs must be at most {MAX_TOP_LOGPROBS}")));
    }
    sampling(&request.sampling, info)
}

fn context_limit(info: &Info) -> String {
    match info.max_context < info.model_context {
        true => format!("this replica's KV pool of {} blocks, {} tokens", info.kv_blocks, info.max_context),
        false => format!("the model's context of {} tokens", info.max_context),
    }
}

fn sampling(params: &SamplingParams, info: &Info) -> Result<()> {
    let check = |ok: bool, field: &str, value: f32, bounds: &str| match ok {
        true => Ok(()),
        false => Err(Error::invalid(field, format!("{field} is {value}; it must be {bounds}"))),
    };
    let SamplingParams { temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, .. } =
        *params;
    check((0.0..=2.0).contains(&temperature), "temperature", temperature, "from 0 to 2")?;
    check(top_p > 0.0 && top_p <= 1.0, "top_p", top_p, "above 0 and at most 1")?;
    check((0.0..1.0).contains(&min_p), "min_p", min_p, "at least 0 and below 1")?;
    let repetition = repetition_penalty > 0.0 && repetition_penalty.is_finite();
    check(repetition, "repetition_penalty", repetition_penalty, "finite and above 0")?;
    check((-2.0..=2.0).contains(&presence_penalty), "presence_penalty", presence_penalty, "from -2 to 2")?;
    check((-2.0..=2.0).contains(&frequency_penalty), "frequency_penalty", frequency_penalty, "from -2 to 2")?;
    if params.top_k == Some(0) {
        return Err(Error::invalid("top_k", "top_k must be at least 1"));
    }
    for (&token, &bias) in &params.logit_bias {
        check((-100.0..=100.0).contains(&bias), "logit_bias", bias, "from -100 to 100")?;
        if token as usize >= info.vocab {
            let message = format!("logit_bias names token {token}; the model's vocabulary has {} tokens", info.vocab);
            return Err(Error::invalid("logit_bias", message));
        }
    }
    Ok(())
}
