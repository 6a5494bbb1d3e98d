//! Moesaic and its peers on one machine, with one file and as many threads, in turns.
pub mod bench;
pub mod ceiling;
pub mod engine;
pub mod results;
pub mod serve;

use crate::cluster;
use crate::generator::workload::Vocabulary;
use crate::machine;
use crate::model::{self, Preset, Shape};
use crate::report::{Section, Table, number};
use crate::stats::median;
use anyhow::{Context, Result, bail, ensure};
use bench::Test;
use ceiling::Ceilings;
use clap::{Args, ValueEnum};
use engine::{Engine, Kind, Kv};
use results::{Case, Results};
use serve::{Loop, Server};
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
    /// addition being two; without it, prompts have no share of the limit.
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

impl Peers {
    /// Where its record is written to where nothing else is said.
    pub fn records(&self) -> Vec<PathBuf> {
        ["md", "json"].map(|end| self.out.join(format!("{}-peers.{end}", machine::today()))).into()
    }

    fn has(&self, group: Group) -> bool {
        self.only.is_empty() || self.only.contains(&group)
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
    ceilings: Ceilings,
    /// Moesaic's largest resident set and times to load.
    peak_rss_bytes: u64,
    load_s: Vec<f64>,
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

    /// An engine's rate in a test: a peer has its better way of storing keys and values.
    async fn alone(&mut self, engine: &Engine, test: Test, kv: Kv) -> Result<f64> {
        let deep = matches!(test, Test::Generation { depth: 1.., .. });
        let ways: &[Kv] = match (engine.kind, deep) {
            (Kind::Moesaic, _) => &[kv],
            (_, true) => &[Kv::Bf16, Kv::Int8],
            (_, false) => &[Kv::Bf16],
        };
        let mut best = f64::NEG_INFINITY;
        for way in ways {
            let measured = bench::run(engine, self.model, test, usize::from(self.args.threads), *way).await?;
            best = best.max(median(&measured.rates));
            self.peak_rss_bytes = self.peak_rss_bytes.max(measured.peak_rss_bytes.unwrap_or(0));
            self.load_s.extend(measured.load_s);
        }
        Ok(best)
    }

    async fn tests(&mut self, cases: &[Case], round: usize) {
        // a peer's better way was measured for the first format and holds for the other
        let mut known = std::collections::BTreeMap::<(Test, Kind), f64>::new();
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

    async fn serve(&mut self, clients: usize, busy: bool, round: usize) -> Result<()> {
        let (prompt, answer) = SERVED;
        let threads = usize::from(self.args.threads);
        let folder = tempfile::tempdir()?;
        for engine in self.engines {
            let load = Loop { clients, prompt, answer, requests: self.args.requests as usize, seed: round as u64 };
            let measured = async {
                let context = (prompt + answer).next_multiple_of(256);
                let server = Server::start(engine, self.model, threads, (clients, context)).await?;
                let _busy = busy.then(|| serve::busy_process(folder.path())).transpose()?;
                serve::load(&server, load, self.vocabulary).await
            };
            let rate = measured.await.map(|measured| measured.generation_tok_s);
            self.put(Case::Serve { clients, busy }, engine, round, rate);
        }
        Ok(())
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
            let gain = measured.await.map(|(cold, warm)| cold / warm);
            self.put(Case::Prefix { tokens: PREFIX }, engine, round, gain);
        }
    }

    fn measure_ceilings(&mut self) -> Result<()> {
        let now = Ceilings::measure(usize::from(self.args.threads), self.args.int8_gops)?;
        crate::tell(&format!("memory is read with {} GB/s", number(now.read_bytes_s / 1e9)));
        self.ceilings = self.ceilings.or_larger(now);
        Ok(())
    }
}

/// Measures all engines with both models.
///
/// # Errors
/// When a program is not there, or a model cannot be made. What fails in a case is told in the record.
pub async fn run(args: &Peers) -> Result<Vec<Section>> {
    let commit = machine::Machine::look().commit;
    let engines = args.engines(&commit)?;
    ensure!(args.out.is_dir(), "--out {}: there is no such folder", args.out.display());
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
        ceilings: Ceilings::default(),
        peak_rss_bytes: 0,
        load_s: Vec::new(),
    };
    let cases = if large {
        [Test::Prompt { tokens: 128 }, Test::Generation { tokens: 32, depth: 0 }]
            .map(|test| Case::Alone { test, kv: Kv::Bf16 })
            .to_vec()
    } else {
        args.tests()
    };
    for round in 0..usize::from(args.rounds) {
        bench.measure_ceilings()?;
        if args.has(Group::Alone) || large {
            bench.tests(&cases, round).await;
        }
        if large {
            continue;
        }
        for (group, busy) in [(Group::Serve, false), (Group::Busy, true)] {
            for clients in args.clients.iter().filter(|_| args.has(group)) {
                bench.serve(*clients as usize, busy, round).await?;
            }
        }
        if args.has(Group::Prefix) {
            bench.prefix(round).await;
        }
    }
    bench.measure_ceilings()?;
    if bench.results.is_empty() {
        bail!(
            "nothing was measured; the first failure: {}",
            bench.results.failures.first().map_or("none", String::as_str)
        );
    }
    let file_bytes = std::fs::metadata(&model).context("the model's size")?.len();
    Ok(section(&bench, &preset.shape(), file_bytes, large))
}

fn section(bench: &Bench<'_>, shape: &Shape, file_bytes: u64, large: bool) -> Section {
    let Bench { args, engines, results, ceilings, .. } = bench;
    let mut flags = Table::new("Engines", &["engine", "built of", "flags alone", "flags of the server"]);
    for engine in *engines {
        let server = engine.server_arguments(Path::new("MODEL"), args.threads.into(), (1, 256), (0, 0)).join(" ");
        let bench = engine.flags(Kv::Bf16).join(" ");
        flags.row([engine.name.to_owned(), engine.version.clone(), bench, server]);
    }
    let gb = |bytes: f64| number(bytes / 1e9);
    let method = format!(
        "{} with random weights ({:.2} GB, matrices Q4_0, embedding and output Q8_0), the same GGUF file for all, {} \
         threads each, {} rounds in turns. Alone: `moesaic bench` and `llama-bench`, one repetition a round after its \
         warm-up, each a process of its own. Servers: a closed loop over /v1/completions, prompts of {} tokens and \
         answers of {}, {} requests of each client after one to warm up.",
        shape.name,
        file_bytes as f64 / 1e9,
        args.threads,
        args.rounds,
        SERVED.0,
        SERVED.1,
        args.requests,
    );
    let mut notes = vec![
        format!(
            "The machine's limits: memory was read with at most {} GB/s by {} threads in this run; {}. A generated token \
             reads {} MB of matrices and its context's keys and values; a prompt's token is {} MFLOP.",
            gb(ceilings.read_bytes_s),
            args.threads,
            ceilings.int8_ops_s.map_or_else(
                || "the int8 limit was not given (--int8-gops), so prompts have no share".to_owned(),
                |ops| format!("int8 is {} GOP/s, as was given", gb(ops)),
            ),
            number(shape.bytes_a_token() as f64 / 1e6),
            number(shape.operations_a_token() as f64 / 1e6),
        ),
        "A cell is the median of the rounds; a ratio is taken within each round, to the peer that was better in it, and \
         the table has the ratios' median and their range. With a context, a peer has its better way of f16 and q8_0 keys \
         and values."
            .to_owned(),
        "Both peers were built for this processor (GGML_NATIVE=ON) from their source distributions; llama.cpp repacks \
         weights at load by default, ik_llama.cpp with -rtr."
            .to_owned(),
    ];
    if !bench.load_s.is_empty() {
        notes.push(format!(
            "Moesaic loaded the GGUF file in {} s (median) and had {:.2} GB resident at most, {:.2} times the file.",
            number(median(&bench.load_s)),
            bench.peak_rss_bytes as f64 / 1e9,
            bench.peak_rss_bytes as f64 / file_bytes as f64,
        ));
    }
    if args.only_peers {
        notes.push("Moesaic was left out (--only-peers).".into());
    }
    notes.extend(results.failures.iter().map(|failure| {
        let line: Vec<&str> = failure.split_whitespace().collect();
        format!("**Failed**: {}", line.join(" "))
    }));
    let mut values = results.values(shape, ceilings);
    values["ceilings"] = serde_json::to_value(ceilings).unwrap_or_default();
    values["engines"] = serde_json::to_value(engines).unwrap_or_default();
    values["model"] = serde_json::json!({"name": shape.name, "file_bytes": file_bytes});
    values["moesaic"] = serde_json::json!({"peak_rss_bytes": bench.peak_rss_bytes, "load_s": bench.load_s});
    let title = format!("Peers: {}", shape.name);
    let tables = vec![results.table("Rates", shape, ceilings, large), flags];
    Section { title, method, tables, notes, values }
}
