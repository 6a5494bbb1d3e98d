//! What it costs that experts are in other processes: the same load on a cluster and on `moesaic up`, in turns.
use crate::breakdown::{self, Use};
use crate::client::{Answer, Completion, Prompt};
use crate::cluster::{Cluster, Counted, Embedded, Plan, between};
use crate::load;
use crate::model;
use crate::random::Random;
use crate::report::{Section, Table, number};
use crate::stats::{Ratio, median};
use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::json;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Instant;

/// `moesaic-loadtest distribution`.
#[derive(Clone, Debug, Args)]
pub struct Distribution {
    /// The model; moe-2b with random weights where not given.
    #[arg(long, value_name = "FILE.gguf")]
    pub model: Option<PathBuf>,
    /// Clients, each with one request after another.
    #[arg(long, default_value_t = 16)]
    pub clients: usize,
    /// Tokens of each prompt in the measurement of prompts.
    #[arg(long, default_value_t = 384)]
    pub prompt_tokens: usize,
    /// Tokens of each answer in the measurement of generation.
    #[arg(long, default_value_t = 64)]
    pub output_tokens: usize,
    /// Pairs of runs, embedded and cluster in turns.
    #[arg(long, default_value_t = 3)]
    pub runs: usize,
    /// Expert-shards, of one thread each.
    #[arg(long, default_value_t = 2)]
    pub shards: usize,
    /// Threads of the cluster's scheduler.
    #[arg(long, default_value_t = 1)]
    pub scheduler_threads: usize,
    /// Threads of the embedded server.
    #[arg(long, default_value_t = 2)]
    pub embedded_threads: usize,
    /// How activations travel to the shards and back: f32, bf16 or int8.
    #[arg(long, default_value = "f32")]
    pub wire: String,
}

/// What is loaded.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    /// Prompts alone: one token is generated of each.
    Prompt,
    /// Answers to short prompts.
    Generation,
}

/// One run of one side.
struct Run {
    phase: Phase,
    rate: f64,
    seconds: f64,
    /// Tokens that the model computed.
    tokens: f64,
    counted: Vec<(String, Counted)>,
}

/// The requests of a run; the same for both sides, and others in each run.
fn requests(args: &Distribution, phase: Phase, vocab: usize, run: usize) -> Vec<Completion> {
    let (prompt, max_tokens) = match phase {
        Phase::Prompt => (args.prompt_tokens, 1),
        Phase::Generation => (16, args.output_tokens),
    };
    let request = |client: usize| {
        let mut random = Random::named(run as u64, &format!("{phase:?} {client}"));
        Completion { prompt: Prompt::Tokens(random.tokens(prompt, vocab)), max_tokens }
    };
    (0..args.clients).map(request).collect()
}

fn rate(phase: Phase, answers: &[Answer]) -> Result<f64> {
    match phase {
        Phase::Prompt => load::prompt_rate(answers),
        Phase::Generation => load::generation_rate(answers),
    }
}

/// One side.
enum Side {
    Embedded(Embedded),
    Cluster(Cluster),
}

impl Side {
    fn http(&self) -> SocketAddr {
        match self {
            Self::Embedded(embedded) => embedded.http,
            Self::Cluster(cluster) => cluster.http,
        }
    }

    async fn counted(&self) -> Result<Vec<(String, Counted)>> {
        match self {
            Self::Embedded(embedded) => Ok(vec![(embedded.member.id.clone(), embedded.member.counted().await?)]),
            Self::Cluster(cluster) => cluster.counted().await,
        }
    }

    async fn run(&self, args: &Distribution, phase: Phase, requests: Vec<Completion>) -> Result<Run> {
        let before = self.counted().await?;
        let begun = Instant::now();
        let outcomes = load::closed(self.http(), args.clients, requests).await?;
        let seconds = begun.elapsed().as_secs_f64();
        let counted = between(&before, &self.counted().await?);
        let tokens = counted.iter().map(|(_, counted)| counted.metrics.histogram("moesaic_step_tokens").1).sum();
        let rate = rate(phase, &load::answers(outcomes)?)?;
        Ok(Run { phase, rate, seconds, tokens, counted })
    }
}

/// Measures it.
///
/// # Errors
/// When a process does not start or a request fails.
pub async fn run(args: &Distribution) -> Result<Section> {
    ensure!(args.runs > 0 && args.clients > 0, "--runs and --clients must be 1 or more");
    let model = match &args.model {
        Some(model) => model.clone(),
        None => model::stored(model::Preset::Moe2b)?,
    };
    let vocab = model::vocabulary_of(&model)?;
    let common = ["scheduler.prefix_cache=false", "scheduler.max_running=64"].map(str::to_owned);
    let settings = "[scheduler]\nexperts = \"shards\"\n[router.placement]\nrebalance_interval = \"24h\"\n";
    let wire = ["activations", "outputs"].map(|what| format!("scheduler.expert_{what}={}", args.wire));
    let threads = [format!("model.threads={}", args.scheduler_threads)];
    let plan = Plan {
        model: model.clone(),
        schedulers: 1,
        shards: args.shards,
        settings: settings.into(),
        scheduler: common.iter().chain(&wire).chain(&threads).cloned().collect(),
        ..Plan::default()
    };
    crate::tell("start the embedded server and the cluster");
    let embedded = Side::Embedded(Embedded::start(&model, args.embedded_threads, &common).await?);
    let cluster = Side::Cluster(Cluster::start(&plan).await?);
    let sides = [&embedded, &cluster];
    for side in sides {
        let short = Distribution { prompt_tokens: 64, output_tokens: 8, ..args.clone() };
        for phase in [Phase::Prompt, Phase::Generation] {
            let warm = load::closed(side.http(), args.clients, requests(&short, phase, vocab, usize::MAX)).await?;
            load::answers(warm).context("warm up")?;
        }
    }
    let mut runs: [Vec<Run>; 2] = [Vec::new(), Vec::new()];
    for run in 0..args.runs {
        for phase in [Phase::Prompt, Phase::Generation] {
            for (side, runs) in sides.iter().zip(&mut runs) {
                let measured = side.run(args, phase, requests(args, phase, vocab, run)).await?;
                let name = if matches!(side, Side::Embedded(_)) { "embedded" } else { "cluster" };
                crate::tell(&format!("{name} {phase:?} {}: {} tok/s", run + 1, number(measured.rate)));
                runs.push(measured);
            }
        }
    }
    Ok(section(args, &runs))
}

fn uses(runs: &[Run], phase: Phase) -> Vec<Use<'_>> {
    let of_phase = runs.iter().filter(|run| run.phase == phase);
    of_phase.map(|run| Use { counted: &run.counted, seconds: run.seconds, tokens: run.tokens }).collect()
}

fn section(args: &Distribution, [embedded, cluster]: &[Vec<Run>; 2]) -> Section {
    let of = |runs: &[Run], phase: Phase| -> Vec<f64> {
        runs.iter().filter(|run| run.phase == phase).map(|run| run.rate).collect()
    };
    let columns = [
        "at the same load",
        "embedded tok/s",
        "cluster tok/s",
        "ratio (median of pairs)",
        "least",
        "most",
        "ratio of core time",
    ];
    let mut rates = Table::new("Rates", &columns);
    let mut values = serde_json::Map::new();
    let mut tables = Vec::new();
    for (phase, name) in [(Phase::Prompt, "prompt"), (Phase::Generation, "generation")] {
        let (a, b) = (of(embedded, phase), of(cluster, phase));
        let ratio = Ratio::of(b.iter().copied().zip(a.iter().copied()));
        let (embedded, cluster) = (uses(embedded, phase), uses(cluster, phase));
        let (sent, received) = breakdown::wire_bytes(&cluster);
        let bytes = json!({"sent": sent, "received": received});
        let core_ms = (breakdown::core_ms(&embedded), breakdown::core_ms(&cluster));
        let cells = [median(&a), median(&b), ratio.median, ratio.min, ratio.max, core_ms.0 / core_ms.1].map(number);
        rates.row(std::iter::once(name.to_owned()).chain(cells));
        let of_phase = json!({
            "embedded_tok_s": a, "cluster_tok_s": b, "ratio": ratio, "bytes_a_token": bytes,
            "core_ms_a_token": {"embedded": core_ms.0, "cluster": core_ms.1, "ratio": core_ms.0 / core_ms.1},
        });
        values.insert(name.into(), of_phase);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        tables.push(breakdown::cores(&format!("Where the cores' time goes: {name}"), &embedded, &cluster, cores));
        tables.push(breakdown::layers(&format!("A layer's experts in the cluster: {name}"), &cluster));
    }
    tables.insert(0, rates);
    let method = format!(
        "{} expert-shards of one thread each and a scheduler of {} thread(s), with router, gateway, Redis and NATS, all as \
         processes of one host that reach each other by Unix sockets, against `moesaic up` with {} threads. {} clients at \
         once; prompts: {} tokens each, one token generated; generation: {} tokens after a prompt of 16, counted while \
         all clients' answers are being written. {} pairs of runs in turns (embedded, cluster, embedded, ...); prefix \
         cache off, activations as {}.",
        args.shards,
        args.scheduler_threads,
        args.embedded_threads,
        args.clients,
        args.prompt_tokens,
        args.output_tokens,
        args.runs,
        args.wire,
    );
    let notes = vec![
        "A ratio is that of two runs one after the other; the table has the median of the pairs' ratios.".to_owned(),
        "The ratio of core time is of what all threads ran for a token, embedded over cluster: what the ratio of rates \
         would be if no core were idle."
            .to_owned(),
        "Core time is what the kernel counts for each thread; what is not used is idle, or was used by other programs of \
         the machine, the load generator among them."
            .to_owned(),
    ];
    Section { title: "Cost of distribution".into(), method, tables, notes, values: serde_json::Value::Object(values) }
}
