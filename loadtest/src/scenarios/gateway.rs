//! What the gateway adds: HTTP client -> gateway -> mock replica, against gRPC client -> mock replica.
use crate::client::{Completion, Prompt};
use crate::cluster::{Cluster, Member, Plan};
use crate::load;
use crate::report::{Section, Table, ms, number, percent};
use crate::scrape::Threads;
use crate::stats::{Summary, median};
use anyhow::{Context, Result, ensure};
use clap::Args;
use futures::StreamExt;
use moesaic_model::tokenizer::Tokenizer;
use moesaic_testkit::servers::ports;
use moesaic_transport::GrpcReplica;
use moesaic_transport::channel::to_address;
use moesaic_types::boundary::Replica;
use moesaic_types::{GenerateRequest, Priority, RequestId, SamplingParams, StopConditions, TenantSalt};
use serde_json::json;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;
use tokio::task::JoinSet;

/// What prompts are made of.
const SENTENCE: &str =
    "Please check whether order number 4711 has left the warehouse and tell the customer when it comes. ";

/// `moesaic-loadtest gateway`.
#[derive(Clone, Debug, Args)]
pub struct GatewayCost {
    /// The model whose tokenizer is used; no weights are read.
    #[arg(long, value_name = "DIR|FILE.gguf", default_value = "deploy/models/demo-moe")]
    pub model: PathBuf,
    /// Bytes of each prompt's text, which the gateway makes into tokens.
    #[arg(long, default_value_t = 1000)]
    pub prompt_bytes: usize,
    /// Tokens of each answer, which come one by one and at once.
    #[arg(long, default_value_t = 16)]
    pub output_tokens: usize,
    /// Requests of each run.
    #[arg(long, default_value_t = 1000)]
    pub requests: usize,
    /// Clients at once in the measurement of requests a second.
    #[arg(long, default_value_t = 32)]
    pub clients: usize,
    /// Pairs of runs, direct and through the gateway in turns.
    #[arg(long, default_value_t = 3)]
    pub runs: usize,
    /// Do not pin the gateway to core 0 and everything else to core 1.
    #[arg(long)]
    pub unpinned: bool,
}

/// What one way took.
struct Run {
    first: Vec<f64>,
    total: Vec<f64>,
    seconds: f64,
}

/// Through the gateway.
async fn through(http: SocketAddr, completion: &Completion, clients: usize, count: usize) -> Result<Run> {
    let begun = Instant::now();
    let answers = load::answers(load::closed(http, clients, vec![completion.clone(); count]).await?)?;
    let seconds = begun.elapsed().as_secs_f64();
    let (first, total) = answers.iter().map(|answer| (answer.ttft(), answer.total())).unzip();
    Ok(Run { first, total, seconds })
}

/// Straight to the replica.
async fn direct(
    replica: &GrpcReplica,
    prompt: &Arc<[u32]>,
    tokens: usize,
    clients: usize,
    count: usize,
) -> Result<Run> {
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for client in 0..clients {
        let (replica, prompt) = (replica.clone(), Arc::clone(prompt));
        tasks.spawn(async move {
            let mut times = Vec::new();
            for number in (client..count).step_by(clients) {
                let (sent, mut first, mut got) = (Instant::now(), None, 0);
                let mut deltas = replica.generate(request(number, &prompt, tokens)).await?;
                while let Some(delta) = deltas.next().await {
                    first = first.or(Some(sent.elapsed()));
                    got += delta?.tokens.len();
                }
                ensure!(got == tokens, "the mock sent {got} of {tokens} tokens");
                times.push((first.unwrap_or_default().as_secs_f64(), sent.elapsed().as_secs_f64()));
            }
            Ok(times)
        });
    }
    let times: Vec<(f64, f64)> = tasks.join_all().await.into_iter().collect::<Result<Vec<_>>>()?.concat();
    let seconds = begun.elapsed().as_secs_f64();
    let (first, total) = times.into_iter().unzip();
    Ok(Run { first, total, seconds })
}

/// A greedy request for so many tokens.
pub(crate) fn request(number: usize, prompt: &Arc<[u32]>, max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        id: RequestId::new(format!("direct-{number}")),
        prompt: Arc::clone(prompt),
        resumed_tokens: 0,
        sampling: SamplingParams::greedy(),
        stop: StopConditions { max_tokens, ignore_eos: true, ..StopConditions::default() },
        top_logprobs: None,
        prompt_logprobs: false,
        grammar: None,
        priority: Priority::default(),
        deadline: None,
        salt: TenantSalt::default(),
        traceparent: None,
    }
}

/// Keeps this process, which is the client, to some cores: as taskset lists them.
fn pin_self(cores: &str) -> Result<()> {
    let own = std::process::id().to_string();
    let output = Command::new("taskset").args(["-a", "-c", "-p", cores, &own]).output().context("run taskset")?;
    ensure!(output.status.success(), "taskset: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Starts gateway, router and mock.
async fn start(args: &GatewayCost, cores: Option<(usize, usize)>) -> Result<(Cluster, Member)> {
    let plan = Plan { model: args.model.clone(), cores, ..Plan::default() };
    let mut cluster = Cluster::launch(&plan)?;
    let grpc = SocketAddr::from(([127, 0, 0, 1], ports::free()));
    let model = std::path::absolute(&args.model)?;
    let flags = [
        ("--model", model.display().to_string()),
        ("--redis", cluster.redis.url()),
        ("--nats", cluster.nats.url()),
        ("--grpc", grpc.to_string()),
    ];
    let mut arguments = vec!["mock-replica".to_owned()];
    arguments.extend(flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]));
    let core = cores.map(|(_, others)| others);
    let mock = Member::start("moesaic-loadtest", "mock", arguments, (grpc, grpc), Path::new(cluster.folder()), core)?;
    // the gateway is ready when it has the mock
    cluster.is_ready().await.with_context(|| format!("the mock's log:\n{}", mock.log()))?;
    Ok((cluster, mock))
}

/// Measures it.
///
/// # Errors
/// When a process does not start or a request fails.
pub async fn run(args: &GatewayCost) -> Result<Section> {
    ensure!(
        args.runs > 0 && args.clients > 0 && args.requests > 0,
        "--runs, --clients and --requests must be 1 or more"
    );
    let available = std::thread::available_parallelism().map_or(1, usize::from);
    let cores = (available > 1 && !args.unpinned).then_some((0, 1));
    crate::tell("start gateway, router and the mock replica");
    let (cluster, mock) = start(args, cores).await?;
    if let Some((_, others)) = cores {
        pin_self(&others.to_string())?;
    }
    let measured = measure(args, &cluster, &mock).await;
    if cores.is_some() {
        pin_self(&format!("0-{}", available.saturating_sub(1)))?;
    }
    let Measured { tokens, alone, full, cost } = measured?;
    let values = json!({
        "alone": alone.values(), "full": full.values(), "prompt_tokens": tokens, "gateway_cpu_s": cost.each,
        "gateway_busy": cost.busy, "gateway_starved": cost.starved,
    });
    let method = format!(
        "A text of {} bytes ({tokens} tokens) and an answer of {} tokens as a stream, by HTTP through the gateway (which \
         makes tokens of the text, asks the router, and text of the tokens) to a mock replica that answers at once, \
         against gRPC straight to the mock. {}. {} requests a run, {} pairs of runs in turns.",
        args.prompt_bytes,
        args.output_tokens,
        match cores {
            Some(_) => "The gateway is pinned to one core; client, mock, router, Redis and NATS share another",
            None => "Nothing is pinned",
        },
        args.requests,
        args.runs,
    );
    let used = format!(
        "The gateway's own processor time is {} ms for each of these requests, which is what one core of it can do: {} \
         requests/s. With {} clients its threads ran for {} of the time, and were ready without a core for {}.",
        ms(cost.each),
        number(1.0 / cost.each),
        args.clients,
        percent(cost.busy),
        percent(cost.starved),
    );
    let tables = vec![alone.table("Latency, one client"), full.table(&format!("Rate, {} clients", args.clients))];
    let notes = vec!["Added is the difference of the two columns' percentiles.".to_owned(), used];
    Ok(Section { title: "Gateway".into(), method, tables, notes, values })
}

struct Measured {
    tokens: usize,
    alone: Ways,
    full: Ways,
    cost: Cost,
}

/// What the gateway's process used when it was full of requests.
struct Cost {
    /// Processor seconds of a request.
    each: f64,
    /// Of the time, what its threads ran, and were ready to without a core.
    busy: f64,
    starved: f64,
}

impl Cost {
    /// The medians over runs of what the threads did, each in so many seconds with so many requests.
    fn of(runs: &[(Threads, f64)], requests: usize) -> Self {
        let of = |value: &dyn Fn(&Threads, f64) -> f64| {
            median(&runs.iter().map(|(threads, seconds)| value(threads, *seconds)).collect::<Vec<_>>())
        };
        Self {
            each: of(&|threads, _| threads.ran() / requests as f64),
            busy: of(&|threads, seconds| threads.ran() / seconds),
            starved: of(&|threads, seconds| threads.waited() / seconds),
        }
    }
}

async fn measure(args: &GatewayCost, cluster: &Cluster, mock: &Member) -> Result<Measured> {
    let text: String = SENTENCE.chars().cycle().take(args.prompt_bytes).collect();
    let prompt: Arc<[u32]> = Tokenizer::open(&args.model)?.encode(&text, true)?.into();
    let completion = Completion { prompt: Prompt::Text(text), max_tokens: args.output_tokens };
    let replica = GrpcReplica::new("mock", to_address(&format!("http://{}", mock.grpc))?);
    let gateway = cluster.members.iter().find(|member| member.id == "gateway").context("the gateway runs")?;
    let (mut alone, mut full) = (Ways::default(), Ways::default());
    let mut used = Vec::new();
    // warm up both ways
    through(cluster.http, &completion, args.clients, args.clients * 4).await?;
    direct(&replica, &prompt, args.output_tokens, args.clients, args.clients * 4).await?;
    for run in 0..args.runs {
        for (clients, ways) in [(1, &mut alone), (args.clients, &mut full)] {
            ways.direct.push(direct(&replica, &prompt, args.output_tokens, clients, args.requests).await?);
            let before = Threads::of(gateway.pid())?;
            let through = through(cluster.http, &completion, clients, args.requests).await?;
            if clients == args.clients {
                used.push((Threads::of(gateway.pid())?.since(&before), through.seconds));
            }
            let rate = args.requests as f64 / through.seconds;
            crate::tell(&format!("gateway run {}, {clients} client(s): {} requests/s", run + 1, number(rate)));
            ways.through.push(through);
        }
    }
    Ok(Measured { tokens: prompt.len(), alone, full, cost: Cost::of(&used, args.requests) })
}

/// Both ways' runs.
#[derive(Default)]
struct Ways {
    direct: Vec<Run>,
    through: Vec<Run>,
}

impl Ways {
    /// The median over runs of a percentile or rate.
    fn both(&self, value: impl Fn(&Run) -> f64) -> (f64, f64) {
        let of = |runs: &[Run]| median(&runs.iter().map(&value).collect::<Vec<_>>());
        (of(&self.direct), of(&self.through))
    }

    fn rows(&self) -> Vec<(&'static str, (f64, f64))> {
        vec![
            ("first token p50", self.both(|run| Summary::of(run.first.iter().copied()).p50)),
            ("first token p99", self.both(|run| Summary::of(run.first.iter().copied()).p99)),
            ("whole answer p50", self.both(|run| Summary::of(run.total.iter().copied()).p50)),
            ("whole answer p99", self.both(|run| Summary::of(run.total.iter().copied()).p99)),
        ]
    }

    fn rate(&self) -> (f64, f64) {
        self.both(|run| run.total.len() as f64 / run.seconds)
    }

    fn table(&self, title: &str) -> Table {
        let mut table = Table::new(title, &["", "direct", "through the gateway", "added"]);
        for (name, (direct, through)) in self.rows() {
            let cells = [format!("{name}, ms"), ms(direct), ms(through), ms(through - direct)];
            table.row(cells);
        }
        let (direct, through) = self.rate();
        table.row(["requests/s".into(), number(direct), number(through), String::new()]);
        table
    }

    fn values(&self) -> serde_json::Value {
        let rows = self.rows().into_iter().chain([("requests/s", self.rate())]);
        rows.map(|(name, (direct, through))| (name.to_owned(), json!({"direct": direct, "through": through}))).collect()
    }
}
