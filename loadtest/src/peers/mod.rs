//! Moesaic and its peers on one machine, with one file and as many threads, in turns.
pub mod bench;
pub mod ceiling;
pub mod engine;
pub mod prefix;
pub mod quality;
mod record;
pub mod results;
pub mod serve;

use crate::cluster;
use crate::generator::workload::Vocabulary;
use crate::machine;
use crate::model::{self, Preset};
use crate::report::{Section, ms, number};
use crate::stats::median;
use anyhow::{Context, Result, anyhow, bail, ensure};
use bench::Test;
use ceiling::Ceilings;
use clap::{Args, ValueEnum};
use engine::{Engine, Kind, Kv, Way};
use prefix::{Prefix, Times};
use quality::Quality;
use results::{Case, Results};
use serve::{Loop, Server};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Group {
    /// Prompt processing and generation, each engine alone.
    Alone,
    /// Servers with several clients.
    Serve,
    /// The same beside a process that uses a core.
    Busy,
    /// A shared prefix, cold and warm.
    Prefix,
    /// Moesaic's perplexity in each configuration that is timed, here or by `ablation`.
    Quality,
}

/// `moesaic-loadtest peers`; `loadtest/peers` builds what it needs and runs it.
#[derive(Clone, Debug, Args)]
pub struct Peers {
    /// Where `loadtest/peers` built the peers.
    #[arg(long, value_name = "DIR")]
    pub peers: PathBuf,
    /// Moesaic's program; the one beside this program where not given.
    #[arg(long, value_name = "FILE", conflicts_with = "only_peers")]
    pub moesaic: Option<PathBuf>,
    /// Leave Moesaic out.
    #[arg(long)]
    pub only_peers: bool,
    /// Threads of each engine.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: u16,
    /// Rounds, in each of which every engine has its turn; a table has their median.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub rounds: u16,
    /// What is measured; all where not given.
    #[arg(long, value_name = "GROUP", value_enum, value_delimiter = ',')]
    pub only: Vec<Group>,
    /// Lengths of prompts, in tokens.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "512,2048", value_parser = clap::value_parser!(u32).range(1..=7000))]
    pub pp: Vec<u32>,
    /// Tokens that are generated one after another.
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub tg: u32,
    /// Tokens in the context before a generation; 0 is none.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "0,4096", value_parser = clap::value_parser!(u32).range(0..=7000))]
    pub depth: Vec<u32>,
    /// Clients of the servers.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1,4,16", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub clients: Vec<u32>,
    /// Requests of each client after one that warms up, of 128 tokens with answers of 64.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub requests: u32,
    /// Also the model of 30 billion parameters (16 GiB of disk and memory): pp128 and tg32.
    #[arg(long)]
    pub large: bool,
    /// The processor's largest rate of int8 operations with these threads, in 10^9 a second, a multiplication and an
    /// addition being two; in place of the one that is measured, for a processor whose instructions are not.
    #[arg(long, value_name = "GOPS", value_parser = positive)]
    pub int8_gops: Option<f64>,
    /// Where the record goes, as DATE-peers.md and DATE-peers.json, unless --record says otherwise.
    #[arg(long, value_name = "DIR", default_value = "loadtest/results")]
    pub out: PathBuf,
}

fn positive(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|value: &f64| value.is_finite() && *value > 0.0);
    value.ok_or_else(|| "use a number above 0".into())
}

/// Tokens of the servers' prompts and answers, and of shared prefixes.
const SERVED: (usize, usize) = (128, 64);
const PREFIX: usize = 2000;
/// What is added to a round's seed where its prompts are tried again.
const OTHER_SEED: u64 = 1 << 32;
/// Loads of the prepared model.
const PREPARED_LOADS: usize = 3;

impl Peers {
    /// Where its record is written to where nothing else is said.
    pub fn records(&self) -> Vec<PathBuf> {
        ["md", "json"].map(|end| self.out.join(format!("{}-peers.{end}", machine::today()))).into()
    }

    fn has(&self, group: Group) -> bool {
        self.only.is_empty() || self.only.contains(&group)
    }

    /// Checks what no flag alone can tell.
    ///
    /// # Errors
    /// Names the flag.
    fn validate(&self) -> Result<()> {
        ensure!(self.out.is_dir(), "--out {}: there is no such folder", self.out.display());
        for (flag, values) in [("--pp", &self.pp), ("--depth", &self.depth), ("--clients", &self.clients)] {
            let mut seen = BTreeSet::new();
            if let Some(twice) = values.iter().find(|value| !seen.insert(**value)) {
                bail!("{flag}: {twice} is there twice");
            }
        }
        Ok(())
    }

    fn engines(&self, commit: &str) -> Result<Vec<Engine>> {
        let mut engines = Vec::new();
        if !self.only_peers {
            let beside = || cluster::program("moesaic").unwrap_or_else(|_| PathBuf::from("target/release/moesaic"));
            let program = self.moesaic.clone().unwrap_or_else(beside);
            engines.push(Engine::moesaic(&program, commit)?);
        }
        engines.push(Engine::peer(Kind::LlamaCpp, &self.peers)?);
        engines.push(Engine::peer(Kind::Ik, &self.peers)?);
        Ok(engines)
    }

    fn tests(&self) -> Vec<Case> {
        let prompts = self.pp.iter().map(|tokens| (Test::Prompt { tokens: *tokens as usize }, Kv::Bf16));
        let generation = |depth: usize| Test::Generation { tokens: self.tg as usize, depth };
        let generations = self.depth.iter().flat_map(|depth| {
            // without a context the format of its keys does not matter
            let kvs: &[Kv] = if *depth == 0 { &[Kv::Bf16] } else { &[Kv::Bf16, Kv::Int8] };
            kvs.iter().map(move |kv| (generation(*depth as usize), *kv))
        });
        prompts.chain(generations).map(|(test, kv)| Case::Alone { test, kv }).collect()
    }
}

/// One model's measurement.
struct Bench<'a> {
    args: &'a Peers,
    engines: &'a [Engine],
    model: &'a Path,
    vocabulary: Vocabulary,
    results: Results,
    prefix: Prefix,
    ceilings: Ceilings,
    /// Moesaic's largest resident set and times to load the file, and a folder that was prepared from it.
    peak_rss_bytes: u64,
    load_s: Vec<f64>,
    load_prepared_s: Vec<f64>,
    quality: Quality,
}

impl Bench<'_> {
    fn failed(&mut self, what: &str, error: &anyhow::Error) {
        let text = format!("{what}: {error:#}");
        crate::tell(&text);
        self.results.failures.push(text);
    }

    fn put(&mut self, case: Case, engine: &Engine, round: usize, value: Result<f64>) {
        let what = format!("{}, {}, round {}", case.name(), engine.name, round + 1);
        match value {
            Ok(value) => {
                crate::tell(&format!("{what}: {}", number(value)));
                self.results.add(case, engine.kind, round, Some(value));
            }
            Err(error) => {
                self.failed(&what, &error);
                self.results.add(case, engine.kind, round, None);
            }
        }
    }

    /// An engine's rate in a test: a peer has the better of its ways.
    async fn alone(&mut self, engine: &Engine, test: Test, kv: Kv) -> Result<f64> {
        let mut best = f64::NEG_INFINITY;
        for way in bench::ways(engine.kind, test, kv) {
            let measured = bench::run(engine, self.model, test, usize::from(self.args.threads), way).await?;
            best = best.max(median(&measured.rates));
            self.peak_rss_bytes = self.peak_rss_bytes.max(measured.peak_rss_bytes.unwrap_or(0));
            self.load_s.extend(measured.load_s);
        }
        Ok(best)
    }

    async fn tests(&mut self, cases: &[Case], round: usize) {
        // a peer's better way was measured for the first format and holds for the other
        let mut known = BTreeMap::<(Test, Kind), f64>::new();
        for case in cases {
            let Case::Alone { test, kv } = *case else { continue };
            for engine in self.engines {
                let value = match known.get(&(test, engine.kind)) {
                    Some(value) if engine.kind != Kind::Moesaic => Ok(*value),
                    _ => self.alone(engine, test, kv).await,
                };
                if let Ok(value) = &value {
                    known.insert((test, engine.kind), *value);
                }
                self.put(*case, engine, round, value);
            }
        }
    }

    /// Tokens a second that a server of an engine generates.
    async fn served(&self, engine: &Engine, load: Loop, busy: bool) -> Result<f64> {
        let folder = tempfile::tempdir()?;
        let context = (load.prompt + load.answer).next_multiple_of(256);
        let place = (load.clients, context);
        let server = Server::start(engine, self.model, usize::from(self.args.threads), place).await?;
        let _busy = busy.then(|| serve::busy_process(folder.path())).transpose()?;
        Ok(serve::load(&server, load, self.vocabulary).await?.generation_tok_s)
    }

    async fn serve(&mut self, clients: usize, busy: bool, round: usize) {
        let ((prompt, answer), case) = (SERVED, Case::Serve { clients, busy });
        for engine in self.engines {
            let load = Loop { clients, prompt, answer, requests: self.args.requests as usize, seed: round as u64 };
            let mut rate = self.served(engine, load, busy).await;
            // a round without one engine says nothing of the better one, and random prompts may end an answer early
            if let Err(error) = &rate {
                let what = format!("{}, {}, round {}: {error:#}", case.name(), engine.name, round + 1);
                crate::tell(&format!("{what}; it is tried again with another seed"));
                self.results.tried_again.push(what);
                rate = self.served(engine, Loop { seed: load.seed + OTHER_SEED, ..load }, busy).await;
            }
            self.put(case, engine, round, rate);
        }
    }

    async fn prefix(&mut self, round: usize) {
        for engine in self.engines {
            let measured = async {
                let threads = usize::from(self.args.threads);
                let server =
                    Server::start(engine, self.model, threads, (1, (PREFIX + 256).next_multiple_of(1024))).await?;
                // the first prefix warms up
                serve::prefix(&server, PREFIX / 4, self.vocabulary, u64::MAX).await?;
                serve::prefix(&server, PREFIX, self.vocabulary, round as u64).await
            };
            let what = format!("prefix of {PREFIX}, {}, round {}", engine.name, round + 1);
            match measured.await {
                Ok((cold, warm)) => {
                    crate::tell(&format!("{what}: cold {} ms, warm {} ms", ms(cold), ms(warm)));
                    self.prefix.add(engine.kind, Times { cold, warm });
                }
                Err(error) => self.failed(&what, &error),
            }
        }
    }

    /// How long Moesaic loads a folder that `moesaic quantize` made of the file.
    async fn prepared(&mut self) {
        let Some(engine) = self.engines.iter().find(|engine| engine.kind == Kind::Moesaic) else { return };
        let measured = async {
            // beside the model, where there is room for one
            let folder = tempfile::tempdir_in(self.model.parent().context("the model's folder")?)?;
            bench::prepare(engine, self.model, folder.path()).await?;
            let (test, threads) = (Test::Generation { tokens: 1, depth: 0 }, usize::from(self.args.threads));
            let mut times = Vec::with_capacity(PREPARED_LOADS);
            for _ in 0..PREPARED_LOADS {
                let measured = bench::run(engine, folder.path(), test, threads, Way::usual(Kv::Bf16)).await?;
                times.push(measured.load_s.context("it did not tell how long it loaded")?);
            }
            anyhow::Ok(times)
        };
        match measured.await {
            Ok(times) => self.load_prepared_s = times,
            Err(error) => self.failed("load a prepared folder", &error),
        }
    }

    /// What Moesaic's timed configurations lose.
    async fn quality(&mut self) {
        let Some(engine) = self.engines.iter().find(|engine| engine.kind == Kind::Moesaic) else { return };
        match Quality::measure(engine, usize::from(self.args.threads)).await {
            Ok(quality) => {
                let beyond = quality.beyond();
                self.quality = quality;
                if !beyond.is_empty() {
                    self.failed("perplexity", &anyhow!("it is beyond the target with {}", beyond.join("; ")));
                }
            }
            Err(error) => self.failed("perplexity", &error),
        }
    }

    fn measure_ceilings(&mut self) {
        let now = Ceilings::measure(usize::from(self.args.threads), self.args.int8_gops);
        let int8 = now.int8_ops_s.map_or_else(|| "is not known".into(), |ops| format!("{} GOP/s", number(ops / 1e9)));
        crate::tell(&format!("memory is read with {} GB/s, int8 {int8}", number(now.read_bytes_s / 1e9)));
        self.ceilings = self.ceilings.or_larger(now);
    }
}

/// Measures all engines with both models.
///
/// # Errors
/// When a program is not there, or a model cannot be made. What fails in a case is told in the record.
pub async fn run(args: &Peers) -> Result<Vec<Section>> {
    args.validate()?;
    let commit = machine::Machine::look().commit;
    let engines = args.engines(&commit)?;
    let mut sections = vec![model_section(args, &engines, Preset::Moe2b).await?];
    if args.large {
        sections.push(model_section(args, &engines, Preset::Moe30b).await?);
    }
    Ok(sections)
}

async fn model_section(args: &Peers, engines: &[Engine], preset: Preset) -> Result<Section> {
    let large = preset == Preset::Moe30b;
    let model = model::stored_in(preset, &args.peers.join("models"))?;
    let vocabulary = Vocabulary { from: 0, to: u32::try_from(model::vocabulary_of(&model)?)? };
    let mut bench = Bench {
        args,
        engines,
        model: &model,
        vocabulary,
        results: Results::default(),
        prefix: Prefix::default(),
        ceilings: Ceilings::default(),
        peak_rss_bytes: 0,
        load_s: Vec::new(),
        load_prepared_s: Vec::new(),
        quality: Quality::default(),
    };
    let cases = if large {
        [Test::Prompt { tokens: 128 }, Test::Generation { tokens: 32, depth: 0 }]
            .map(|test| Case::Alone { test, kv: Kv::Bf16 })
            .to_vec()
    } else {
        args.tests()
    };
    for round in 0..usize::from(args.rounds) {
        bench.measure_ceilings();
        if args.has(Group::Alone) || large {
            bench.tests(&cases, round).await;
        }
        if large {
            continue;
        }
        for (group, busy) in [(Group::Serve, false), (Group::Busy, true)] {
            for clients in args.clients.iter().filter(|_| args.has(group)) {
                bench.serve(*clients as usize, busy, round).await;
            }
        }
        if args.has(Group::Prefix) {
            bench.prefix(round).await;
        }
    }
    bench.measure_ceilings();
    if args.has(Group::Alone) && !large {
        bench.prepared().await;
    }
    if args.has(Group::Quality) && !large {
        bench.quality().await;
    }
    if bench.results.is_empty() && bench.prefix.is_empty() && bench.quality.is_empty() {
        bail!(
            "nothing was measured; the first failure: {}",
            bench.results.failures.first().map_or("none", String::as_str)
        );
    }
    let file_bytes = std::fs::metadata(&model).context("the model's size")?.len();
    Ok(record::section(&bench, &preset.shape(), file_bytes, large))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        peers: Peers,
    }

    #[test]
    fn a_case_that_is_asked_for_twice_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().display().to_string();
        let validate = |more: &[&str]| {
            let words = ["peers", "--peers", "p", "--out", &out].into_iter().chain(more.iter().copied());
            Command::parse_from(words).peers.validate()
        };
        validate(&[]).unwrap();
        for (flag, values, twice) in [("--clients", "1,4,1", "1"), ("--pp", "512,512", "512"), ("--depth", "0,0", "0")]
        {
            let error = validate(&[flag, values]).unwrap_err().to_string();
            assert_eq!(error, format!("{flag}: {twice} is there twice"));
        }
    }
}
