//! The command line.
use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use moesaic_model::{Activations, BackendKind};
use moesaic_service::SettingsArgs;
use moesaic_types::{KvFormat, WeightFormat};
use std::path::PathBuf;

/// Serves mixture-of-experts language models.
#[derive(Debug, Parser)]
#[command(name = "moesaic", version, about, arg_required_else_help = true)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The tools.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a model: all services in one process, or with --cluster as processes of their own (the demo model where none
    /// is named).
    Up(Up),
    /// Run one service of a cluster, as the programs moesaic-gateway, moesaic-router and so on do.
    Service(Service),
    /// Run a program that ends when standard input does.
    #[command(hide = true)]
    Keep(Keep),
    /// Answer one message in the terminal.
    Chat(Chat),
    /// Compare a model's outputs with reference outputs; exit status 1 beyond tolerance.
    Check(Check),
    /// Measure prompt processing and generation rates.
    Bench(Bench),
    /// Write a folder with packed 4-bit or 8-bit weights that loads by memory map.
    Quantize(Quantize),
    /// Perplexity and task accuracy of the demo model's evaluation sets.
    Eval(Eval),
    /// Print the effective configuration.
    Config(Config),
}

/// Which model, and how it runs.
#[derive(Clone, Debug, Default, ClapArgs)]
pub struct ModelArgs {
    /// A Hugging Face folder, a folder of `moesaic quantize`, or a .gguf file.
    #[arg(long, value_name = "DIR|FILE.gguf")]
    pub model: Option<PathBuf>,
    /// native (our CPU kernels) or candle.
    #[arg(long)]
    pub backend: Option<BackendKind>,
    /// f32, bf16, q8, q4, q4-g64 or q4-g128; as stored where not given.
    #[arg(long)]
    pub weights: Option<WeightFormat>,
    /// Format of cached keys and values: f32, bf16 or int8.
    #[arg(long)]
    pub kv: Option<KvFormat>,
    /// What products take on the native backend: int8 (for q8 and q4 weights; bf16 for bf16 ones) or f32.
    #[arg(long, value_name = "FORMAT")]
    pub activations: Option<Activations>,
    /// Threads of the maths, with --cluster of all processes together; all cores where not given.
    #[arg(long, value_parser = threads)]
    pub threads: Option<usize>,
}

fn threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(threads) => moesaic_model::backend::check_threads(threads),
        Err(_) => Err(format!("'{text}' is no number")),
    }
}

/// `moesaic check`.
#[derive(Debug, ClapArgs)]
pub struct Check {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The reference outputs.
    #[arg(long, value_name = "FILE")]
    pub golden: PathBuf,
    /// An adapter (comes with the LoRA issue; refused until then).
    #[arg(long, value_name = "DIR")]
    pub lora: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// `moesaic bench`.
#[derive(Debug, ClapArgs)]
pub struct Bench {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Prompt lengths to process.
    #[arg(long, value_delimiter = ',', default_value = "512")]
    pub pp: Vec<usize>,
    /// Tokens to generate, one after another.
    #[arg(long, value_delimiter = ',', default_value = "128")]
    pub tg: Vec<usize>,
    /// Tokens in the context before the measurement starts.
    #[arg(long, value_delimiter = ',', default_value = "0")]
    pub depth: Vec<usize>,
    /// Sequences that generate at a time; the rates are of all of them.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    pub batch: Vec<usize>,
    /// Say where a step's time goes.
    #[arg(long)]
    pub profile: bool,
    /// Counted runs of each test, after one warm-up.
    #[arg(long, default_value_t = 5)]
    pub runs: usize,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// `moesaic quantize`.
#[derive(Debug, ClapArgs)]
pub struct Quantize {
    /// The folder or file to read.
    #[arg(long, value_name = "DIR|FILE.gguf")]
    pub model: PathBuf,
    /// The folder to write; must not exist or be empty.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// q4 or q8; as stored where not given.
    #[arg(long)]
    pub weights: Option<WeightFormat>,
    /// Values that share a scale in q4: 32, 64 or 128.
    #[arg(long)]
    pub group: Option<u16>,
}

/// `moesaic eval`.
#[derive(Debug, ClapArgs)]
pub struct Eval {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Folder with `*_eval.jsonl`; the demo model's where not given.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Samples of each set at most.
    #[arg(long)]
    pub limit: Option<usize>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// `moesaic up`.
#[derive(Debug, ClapArgs)]
pub struct Up {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub settings: SettingsArgs,
    /// HTTP address, `127.0.0.1:8000` by default.
    #[arg(long, value_name = "ADDR:PORT")]
    pub http: Option<String>,
    /// gRPC address, `127.0.0.1:9000` by default.
    #[arg(long, value_name = "ADDR:PORT")]
    pub grpc: Option<String>,
    /// Run gateway, router, schedulers, expert-shards and kv-stores as processes of their own on this host, as
    /// docker-compose.yml does, on free ports of the loopback interface. This program is all of them; Redis and NATS
    /// are those of REDIS_URL and NATS_URL, or else its own, of the redis-server and nats-server on PATH. What ends by
    /// itself is started again; SIGTERM and ctrl-c let answers finish, and a second one does not wait.
    #[arg(long)]
    pub cluster: bool,
    /// Print the effective configuration and exit.
    #[arg(long)]
    pub dump_config: bool,
    #[command(flatten)]
    pub counts: Counts,
}

/// How many processes `moesaic up --cluster` starts.
#[derive(Clone, Debug, PartialEq, Eq, ClapArgs)]
#[command(next_help_heading = "With --cluster")]
pub struct Counts {
    /// Replicas of the model, of one scheduler each; 1 to 64.
    #[arg(long, value_name = "N", default_value_t = 2, requires = "cluster", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub replicas: u16,
    /// Pipeline stages of each replica, one more scheduler each; 1 to 64.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "cluster", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub stages: u16,
    /// Groups of shards that the experts are spread over (expert parallel); 0 to 64. With 0, schedulers have the
    /// experts themselves.
    #[arg(long, value_name = "N", default_value_t = 2, requires = "cluster", value_parser = clap::value_parser!(u16).range(0..=64))]
    pub expert_groups: u16,
    /// Shards of each group, with a slice of each expert (tensor parallel); 1 to 64.
    #[arg(long, value_name = "N", default_value_t = 2, requires = "cluster", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub expert_ranks: u16,
    /// Stores of prefix blocks; 0 to 64. They keep blocks in RAM, and with kv_store.disk_folder in a folder of that.
    #[arg(long, value_name = "N", default_value_t = 2, requires = "cluster", value_parser = clap::value_parser!(u16).range(0..=64))]
    pub kv_stores: u16,
    /// Routers; 1 to 8.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "cluster", value_parser = clap::value_parser!(u16).range(1..=8))]
    pub routers: u16,
    /// A folder for the processes' logs, which stays; without one, they are in a temporary folder that is removed at
    /// the end unless something failed.
    #[arg(long, value_name = "DIR", requires = "cluster")]
    pub logs: Option<PathBuf>,
}

/// `moesaic service`.
#[derive(Debug, ClapArgs)]
pub struct Service {
    /// Which one.
    #[arg(value_enum)]
    pub name: ServiceName,
    #[command(flatten)]
    pub settings: SettingsArgs,
    /// Print the effective configuration and exit.
    #[arg(long)]
    pub dump_config: bool,
    /// End at once when standard input ends: with a pipe, this process does not outlive who started it.
    #[arg(long)]
    pub end_with_stdin: bool,
}

/// The services.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ServiceName {
    /// The only door: HTTP as OpenAI's clients speak it, and gRPC.
    Gateway,
    /// Decides where requests and experts go.
    Router,
    /// A replica of the model.
    Scheduler,
    /// Executes experts.
    ExpertShard,
    /// Keeps prefix blocks.
    KvStore,
}

/// `moesaic keep`.
#[derive(Debug, ClapArgs)]
pub struct Keep {
    /// The process that keeps it: becomes the program, which the kernel kills when that process is gone.
    #[cfg(target_os = "linux")]
    #[arg(long, hide = true, value_name = "PID")]
    pub kept_by: Option<i32>,
    /// The program and its arguments.
    #[arg(required = true, last = true)]
    pub program: Vec<std::ffi::OsString>,
}

/// `moesaic chat`.
#[derive(Debug, ClapArgs)]
pub struct Chat {
    /// The message.
    pub text: String,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub settings: SettingsArgs,
    /// A system message before it.
    #[arg(long)]
    pub system: Option<String>,
    /// Longest answer, in tokens; 512 where not given, or less where the model's context leaves less.
    #[arg(long)]
    pub max_tokens: Option<u64>,
    /// 0 is greedy; the model's own default where not given.
    #[arg(long)]
    pub temperature: Option<f64>,
    /// Makes the answer repeatable.
    #[arg(long)]
    pub seed: Option<u64>,
}

/// `moesaic config`.
#[derive(Debug, ClapArgs)]
pub struct Config {
    #[command(flatten)]
    pub settings: SettingsArgs,
    /// One section only: model, gateway, router, scheduler, expert_shard, kv_store, cluster or telemetry.
    #[arg(long, value_name = "NAME")]
    pub service: Option<String>,
}
