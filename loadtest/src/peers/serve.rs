//! The engines as servers: started alone, loaded by the same closed loop, ended.
use super::engine::Engine;
use crate::client::{Connection, Prompt};
use crate::generator::drive::{self, Limits, Pacing};
use crate::generator::lengths::Lengths;
use crate::generator::measured::{Measured, WarmUp};
use crate::generator::slo::Slo;
use crate::generator::target::{Api, Target};
use crate::generator::workload::{Source, Vocabulary, Workload};
use crate::origin::Origin;
use crate::random::Random;
use anyhow::{Context, Result, anyhow, bail};
use moesaic_testkit::servers::ports;
use moesaic_testkit::servers::process::Process;
use serde_json::Map;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long a server may take to load its model.
const START_DEADLINE: Duration = Duration::from_secs(600);
/// A look that takes so long found a server that is not ready.
const LOOK_PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// An answer of which nothing comes for so long is given up: 16 long prompts may stand before it.
const PATIENCE: Duration = Duration::from_secs(300);
/// Tokens of a request's own after a shared prefix.
const TAIL: usize = 48;

/// A running server; ended when it is dropped.
pub struct Server {
    address: SocketAddr,
    process: Process,
    log: PathBuf,
    _folder: TempDir,
}

impl Server {
    /// Starts an engine's server for so many clients with contexts of so many tokens, and waits until it is ready.
    ///
    /// # Errors
    /// With the end of its log when it does not become ready.
    pub async fn start(
        engine: &Engine,
        model: &Path,
        threads: usize,
        (clients, context): (usize, usize),
    ) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let log = folder.path().join("log");
        let (http, grpc) = (ports::free(), ports::free());
        let arguments = engine.server_arguments(model, threads, (clients, context), (http, grpc));
        let process = Process::start(&engine.server_program(), &arguments, &log)
            .map_err(|error| anyhow!("start the server of {}: {error}", engine.name))?;
        let mut server = Self { address: SocketAddr::from(([127, 0, 0, 1], http)), process, log, _folder: folder };
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            let look = async { Connection::open(server.address).await?.get(engine.ready_path()).await };
            let ready = tokio::time::timeout(LOOK_PATIENCE, look).await;
            match ready.unwrap_or_else(|_| Err(anyhow!("nothing came for {} s", LOOK_PATIENCE.as_secs()))) {
                Ok(_) => return Ok(server),
                Err(reason) if server.process.has_ended() || Instant::now() > deadline => {
                    bail!("the server of {} is not ready: {reason:#}; its log ends:\n{}", engine.name, server.log());
                }
                Err(_) => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    }

    fn log(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&text[text.len().saturating_sub(3000)..]).into_owned()
    }
}

/// A closed loop.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loop {
    /// Clients at once.
    pub clients: usize,
    /// Tokens of each prompt.
    pub prompt: usize,
    /// Tokens of each answer.
    pub answer: usize,
    /// Requests of each client, after one that warms up.
    pub requests: usize,
    /// Decides the prompts.
    pub seed: u64,
}

/// Loads a server and measures.
///
/// # Errors
/// When a request failed: a rate over the others says nothing.
pub async fn load(server: &Server, load: Loop, vocabulary: Vocabulary) -> Result<Measured> {
    let (prompts, answers) = (Lengths::Fixed(load.prompt), Lengths::Fixed(load.answer));
    let workload = Workload::new(Source::Drawn { prompts, answers, groups: None }, vocabulary, load.seed);
    let target = Target {
        origin: Origin::from(server.address),
        model: None,
        api: Api::Completions,
        writer: None,
        body: Map::new(),
        patience: PATIENCE,
    };
    let pacing = Pacing::Closed { clients: load.clients, think: Duration::ZERO };
    let limits = Limits { requests: Some(load.clients * (load.requests + 1)), duration: None };
    let run = drive::run(target, workload, pacing, limits, Box::new(|_, _| ())).await?;
    let measured = Measured::of(&run, WarmUp::Requests(load.clients), None, &Slo::default(), false);
    if let Some((kind, count)) = measured.errors.iter().next() {
        bail!("{count} requests failed: {kind}: {}", measured.first_errors[kind]);
    }
    if measured.short_answers > 0 {
        bail!("{} answers are shorter than was asked for", measured.short_answers);
    }
    Ok(measured)
}

/// Times to the first token of a prompt that begins with a prefix, in seconds: when the prefix is new, and when it was
/// just asked for with another ending.
///
/// # Errors
/// When a request fails.
pub async fn prefix(server: &Server, tokens: usize, vocabulary: Vocabulary, seed: u64) -> Result<(f64, f64)> {
    let mut connection = Connection::open_within(server.address, PATIENCE).await?;
    let draw = |name: &str, count: usize| -> Vec<u32> {
        let width = (vocabulary.to - vocabulary.from) as usize;
        let drawn = Random::named(seed, name).tokens(count, width);
        drawn.into_iter().map(|token| token + vocabulary.from).collect()
    };
    let mut times = [0.0; 2];
    for (turn, time) in times.iter_mut().enumerate() {
        let mut prompt = draw("prefix", tokens);
        prompt.extend(draw(&format!("tail {turn}"), TAIL));
        let completion = crate::client::Completion { prompt: Prompt::Tokens(prompt), max_tokens: 2 };
        let path = Origin::from(server.address).path("completions");
        let answer = connection.ask(&path, completion.body(), PATIENCE).await;
        *time = answer.context("a shared prefix")?.ttft();
    }
    Ok((times[0], times[1]))
}

/// A process that uses a core and knows nothing of the measurement; ended when it is dropped.
///
/// # Errors
/// When it cannot be started.
pub fn busy_process(folder: &Path) -> Result<Process> {
    let arguments = ["-c", "while :; do :; done"].map(str::to_owned);
    let shell = moesaic_testkit::servers::program("sh");
    Process::start(&shell, &arguments, &folder.join("busy.log"))
        .map_err(|error| anyhow!("start a busy process: {error}"))
}
