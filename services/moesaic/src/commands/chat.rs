//! `moesaic chat`: one answer in the terminal, through the same services as `up`, without its doors.
use crate::{args, config, embedded};
use anyhow::{Context, Result};
use futures::StreamExt;
use moesaic_gateway::core::{Core, SamplingInput, conversation};
use moesaic_types::RequestId;
use serde_json::json;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

pub fn run(args: args::Chat) -> Result<ExitCode> {
    let config = config::load(&args.settings, args.model.overrides())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(answer(args, config))?;
    Ok(ExitCode::SUCCESS)
}

/// Longest answer where none is given.
const MAX_TOKENS: usize = 512;

/// The default is no mistake of the user's where less room is left; a prompt that leaves none is.
fn default_max_tokens(context: usize, prompt: usize) -> u64 {
    MAX_TOKENS.min(context.saturating_sub(prompt).max(1)) as u64
}

async fn answer(args: args::Chat, config: config::Config) -> Result<()> {
    let core = Arc::new(Core::new(config.gateway.clone()));
    let services = embedded::start(&config, &core).await?;
    let model = core.model("")?;
    let mut messages: Vec<_> = args.system.iter().map(|text| json!({"role": "system", "content": text})).collect();
    messages.push(json!({"role": "user", "content": args.text}));
    let prompt = conversation::render(&model, &messages, None, true, &Default::default())?;
    let tokens = model.tokenizer.encode(&prompt, false)?;
    let input = SamplingInput {
        temperature: args.temperature,
        seed: args.seed,
        max_tokens: Some(args.max_tokens.unwrap_or_else(|| default_max_tokens(model.max_context, tokens.len()))),
        ..SamplingInput::default()
    };
    let job = input.into_job(RequestId::new("chat"), model, tokens, &core.limits(), core.tenant(None))?;
    let mut pieces = core.answer(job).await?;
    let mut out = std::io::stdout().lock();
    while let Some(piece) = pieces.next().await {
        write!(out, "{}", piece?.text)?;
        out.flush()?;
    }
    writeln!(out)?;
    services.scheduler.stop();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_length_of_an_answer_fits_a_small_context() {
        assert_eq!(default_max_tokens(4096, 20), 512);
        assert_eq!(default_max_tokens(256, 20), 236);
        assert_eq!(default_max_tokens(256, 300), 1, "what is too long is the prompt");
    }
}
