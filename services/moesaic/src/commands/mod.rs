//! One file for each tool.
mod bench;
mod chat;
mod check;
mod config;
mod eval;
mod keep;
mod quantize;
mod service;
mod up;

use crate::args::{Args, Command, ModelArgs};
use crate::progress::Bar;
use anyhow::{Context, Result};
use moesaic_model::{Runner, demo};
use std::process::ExitCode;

/// Runs the command; the exit status is the command's.
pub fn run(args: Args) -> Result<ExitCode> {
    match args.command {
        Command::Up(args) => up::run(args),
        Command::Service(args) => Ok(service::run(args)),
        Command::Keep(args) => keep::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Check(args) => check::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Config(args) => config::run(args),
    }
}

/// All cores.
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Loads a model for the tools that drive it step by step.
fn load_runner(args: &ModelArgs) -> Result<Box<dyn Runner>> {
    let path = match &args.model {
        Some(path) => path.clone(),
        None => demo::find()?,
    };
    let bar = Bar::new("load");
    let options = moesaic_model::LoadOptions {
        weights: args.weights,
        kv: args.kv.unwrap_or_default(),
        threads: args.threads.filter(|n| *n > 0).unwrap_or_else(default_threads),
        activations: args.activations.unwrap_or_default(),
        progress: Some(&|p| bar.layers(p)),
    };
    let kind = args.backend.unwrap_or_default();
    let runner = moesaic_model::load(&path, kind, &options).with_context(|| format!("load {}", path.display()))?;
    bar.finish();
    Ok(runner)
}
