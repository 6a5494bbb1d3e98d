//! `moesaic-loadtest`: benchmark models and measurements.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line program speaks to its terminal")]

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use moesaic_loadtest::generator::{self, Load};
use moesaic_loadtest::machine::{self, Machine};
use moesaic_loadtest::mock::{self, MockReplica};
use moesaic_loadtest::model::{self, Preset, SEED, Shape};
use moesaic_loadtest::peers::{self, Peers};
use moesaic_loadtest::report::{self, Record, Section};
use moesaic_loadtest::scenarios::ablation::{self, Ablation};
use moesaic_loadtest::scenarios::distribution::{self, Distribution};
use moesaic_loadtest::scenarios::gateway::{self, GatewayCost};
use moesaic_loadtest::scenarios::prefix::{self, Prefix};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Measures Moesaic: each measurement starts the services that it needs, with Redis and NATS of their own.
#[derive(Debug, Parser)]
#[command(name = "moesaic-loadtest", version, about, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Also write what was measured to a file: JSON where its name ends so, else a Markdown page. May be repeated.
    #[arg(long, global = true, value_name = "FILE")]
    record: Vec<PathBuf>,
    /// The page's title.
    #[arg(long, global = true, default_value = "Measurements", value_name = "TEXT")]
    title: String,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write a model with random weights as a GGUF file.
    MakeModel(MakeModel),
    /// Load a server of the OpenAI API, and measure its answers.
    Load(Box<Load>),
    /// Moesaic against llama.cpp and ik_llama.cpp on this machine; `loadtest/peers` builds them and runs it.
    Peers(Box<Peers>),
    /// What it costs that experts are in other processes.
    Distribution(Distribution),
    /// Prefixes shared by replicas: fetched against computed, and the router's policies.
    Prefix(Prefix),
    /// What the gateway adds to a request, and how many it takes on one core.
    Gateway(GatewayCost),
    /// What continuous batching, the prefix cache and 4-bit weights are worth, each alone and together.
    Ablation(Ablation),
    /// All measurements of the cluster, one after another, each as it is by default.
    Cluster,
    /// A replica that answers at once without computing; the measurement of the gateway starts it.
    MockReplica(MockReplica),
}

/// `moesaic-loadtest make-model`.
#[derive(Debug, Args)]
struct MakeModel {
    /// The shape.
    preset: Preset,
    /// The file to write.
    #[arg(long, value_name = "FILE.gguf")]
    out: PathBuf,
    /// Another seed gives other weights.
    #[arg(long, default_value_t = SEED)]
    seed: u64,
    /// Another width.
    #[arg(long)]
    hidden: Option<usize>,
    /// Another number of layers.
    #[arg(long)]
    layers: Option<usize>,
    /// Another number of experts in each layer.
    #[arg(long)]
    experts: Option<usize>,
    /// Another number of experts for each token.
    #[arg(long)]
    top_k: Option<usize>,
    /// Another inner width of an expert.
    #[arg(long)]
    expert_inner: Option<usize>,
    /// Another number of query heads.
    #[arg(long)]
    heads: Option<usize>,
    /// Another number of key and value heads.
    #[arg(long)]
    kv_heads: Option<usize>,
    /// Another width of a head.
    #[arg(long)]
    head_dim: Option<usize>,
    /// Another number of tokens in the vocabulary.
    #[arg(long)]
    vocab: Option<usize>,
    /// Another longest context.
    #[arg(long)]
    context: Option<usize>,
}

impl MakeModel {
    fn shape(&self) -> Shape {
        let preset = self.preset.shape();
        Shape {
            hidden: self.hidden.unwrap_or(preset.hidden),
            layers: self.layers.unwrap_or(preset.layers),
            experts: self.experts.unwrap_or(preset.experts),
            top_k: self.top_k.unwrap_or(preset.top_k),
            expert_inner: self.expert_inner.unwrap_or(preset.expert_inner),
            heads: self.heads.unwrap_or(preset.heads),
            kv_heads: self.kv_heads.unwrap_or(preset.kv_heads),
            head_dim: self.head_dim.unwrap_or(preset.head_dim),
            vocab: self.vocab.unwrap_or(preset.vocab),
            context: self.context.unwrap_or(preset.context),
            name: preset.name,
        }
    }

    fn run(&self) -> Result<()> {
        let (shape, bar) = (self.shape(), ProgressBar::new(0));
        let style = ProgressStyle::with_template("[{wide_bar}] {bytes}/{total_bytes} {eta}")?;
        bar.set_style(style.progress_chars("=> "));
        let bytes = model::write(&shape, self.seed, &self.out, &|done, total| {
            bar.set_length(total);
            bar.set_position(done);
        })?;
        bar.finish_and_clear();
        let (all, active) = shape.parameters();
        let millions = |count: u64| count as f64 / 1e6;
        println!(
            "{}: {:.1} million parameters, {:.1} million for each token, {:.1} MiB",
            self.out.display(),
            millions(all),
            millions(active),
            bytes as f64 / f64::from(1 << 20)
        );
        Ok(())
    }
}

/// The command as it was given, without the folders of this machine.
fn command() -> String {
    let short = |argument: String| match Path::new(&argument).file_name() {
        Some(name) if argument.starts_with('/') => name.to_string_lossy().into_owned(),
        _ => argument,
    };
    std::env::args().map(short).collect::<Vec<_>>().join(" ")
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("moesaic-loadtest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    if let Command::MakeModel(make) = &arguments.command {
        return make.run();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(async {
        // what was started is ended by its drop, on ctrl-c too
        tokio::select! {
            measured = measure(arguments) => measured,
            _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted"),
        }
    })
}

/// Where what is measured goes.
fn files(arguments: &Arguments) -> Vec<PathBuf> {
    match &arguments.command {
        Command::Peers(args) if arguments.record.is_empty() => args.records(),
        _ => arguments.record.clone(),
    }
}

async fn measure(arguments: &Arguments) -> Result<()> {
    let files = files(arguments);
    files.iter().try_for_each(|file| report::check_writable(file)).context("the record")?;
    let mut machine = Machine::look();
    let sections: Vec<Section> = match &arguments.command {
        Command::MakeModel(make) => return make.run(),
        Command::MockReplica(mock) => return mock::run(mock).await,
        Command::Load(args) => vec![generator::run(args).await?],
        Command::Peers(args) => peers::run(args).await?,
        Command::Distribution(args) => vec![distribution::run(args).await?],
        Command::Prefix(args) => vec![prefix::run(args).await?],
        Command::Ablation(args) => vec![ablation::run(args).await?],
        Command::Gateway(args) => vec![gateway::run(args).await?],
        Command::Cluster => vec![
            distribution::run(&defaults()?).await?,
            prefix::run(&defaults()?).await?,
            gateway::run(&defaults()?).await?,
        ],
    };
    machine.load_after = machine::load();
    let record = Record { date: machine::today(), command: command(), machine, sections };
    print!("{}", record.text());
    for file in &files {
        record.write(&arguments.title, file)?;
    }
    Ok(())
}

/// A scenario's arguments where none are given.
fn defaults<A: Args>() -> Result<A> {
    let command = A::augment_args(clap::Command::new("defaults").no_binary_name(true));
    Ok(A::from_arg_matches(&command.get_matches_from(Vec::<String>::new()))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_scenarios_have_defaults() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
        assert!(defaults::<Distribution>().is_ok_and(|args| args.clients == 16));
        assert!(defaults::<Prefix>().is_ok() && defaults::<GatewayCost>().is_ok() && defaults::<Ablation>().is_ok());
    }

    #[test]
    fn flags_change_a_shape_s_sizes() {
        let words = ["moesaic-loadtest", "make-model", "moe-2b", "--out", "x.gguf", "--layers", "3", "--top-k", "4"];
        let Command::MakeModel(make) = Arguments::parse_from(words).command else { panic!("another command") };
        assert_eq!(make.shape(), Shape { layers: 3, top_k: 4, ..Preset::Moe2b.shape() });
    }
}
