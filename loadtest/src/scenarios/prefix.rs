//! Prefixes that two replicas share: what a fetch from the kv-store saves, and what the router's policies find again.
use crate::client::{Answer, Completion, Connection, Prompt};
use crate::cluster::{Cluster, Plan, between};
use crate::load;
use crate::model::{self, Preset};
use crate::random::Random;
use crate::report::{Section, Table, ms, number, percent};
use crate::scrape::Scrape;
use crate::stats::Summary;
use crate::trace::Trace;
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use moesaic_types::BLOCK_TOKENS;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest wait until a prompt's blocks are in the store.
const STORED_WITHIN: Duration = Duration::from_secs(30);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Tokens of a request's own after its prefix.
const TAIL: usize = 48;

/// `moesaic-loadtest prefix`.
#[derive(Clone, Debug, Args)]
pub struct Prefix {
    /// The model; moe-small with random weights where not given.
    #[arg(long, value_name = "FILE.gguf")]
    pub model: Option<PathBuf>,
    /// Tokens of the prefixes that are fetched.
    #[arg(long, default_value_t = 2000)]
    pub prefix_tokens: usize,
    /// Prefixes that are fetched.
    #[arg(long, default_value_t = 20)]
    pub prefixes: usize,
    /// Whether a replica fetches: `estimated` (where that is estimated to be faster) or `always`.
    #[arg(long, default_value = "estimated")]
    pub fetch: String,
    /// Requests of each replayed trace; 0 leaves the traces out.
    #[arg(long, default_value_t = 160)]
    pub requests: usize,
    /// Groups of requests that share a prefix in the trace.
    #[arg(long, default_value_t = 24)]
    pub groups: usize,
    /// Tokens of a group's prefix in the trace.
    #[arg(long, default_value_t = 1024)]
    pub group_tokens: usize,
    /// KV blocks of 64 tokens of each replica in the trace: what both together hold is less than all groups' prefixes
    /// and what runs.
    #[arg(long, default_value_t = 320)]
    pub kv_blocks: usize,
    /// Clients at once at saturation.
    #[arg(long, default_value_t = 12)]
    pub clients: usize,
    /// The load below saturation, as a share of what round-robin answers at saturation.
    #[arg(long, default_value_t = 0.5)]
    pub below: f64,
}

/// Measures both.
///
/// # Errors
/// When a process does not start or a request fails.
pub async fn run(args: &Prefix) -> Result<Section> {
    let model = match &args.model {
        Some(model) => model.clone(),
        None => model::stored(Preset::MoeSmall)?,
    };
    let vocab = model::vocabulary_of(&model)?;
    let mut tables = Vec::new();
    let mut values = serde_json::Map::new();
    if args.prefixes > 0 {
        let fetch = fetched(args, &model, vocab).await?;
        tables.push(fetch.table());
        values.insert("fetch".into(), fetch.values());
    }
    if args.requests > 0 {
        let (table, runs) = policies(args, &model, vocab).await?;
        tables.push(table);
        values.insert("policies".into(), runs);
    }
    let name = model.file_stem().map_or_else(|| "the model".into(), |name| name.to_string_lossy().into_owned());
    let method = format!(
        "Two replicas of {name} with one thread each, their experts in their own processes, behind router and gateway. \
         Fetches: round-robin sends each new prefix of {} tokens first to one replica and, once its blocks are in the \
         kv-store, to the other, then to both again; each request ends with {TAIL} tokens of its own. Traces: {} requests \
         over {} groups with a prefix of {} tokens each, popularity as 1/rank, without a kv-store and with {} KV blocks a \
         replica; at saturation {} clients at once, below it arrivals at {} of round-robin's rate at saturation. The same \
         requests in the same order for each policy, on fresh processes.",
        args.prefix_tokens,
        args.requests,
        args.groups,
        args.group_tokens,
        args.kv_blocks,
        args.clients,
        percent(args.below),
    );
    let notes = vec![
        "Hit rate: vllm:prefix_cache_hits over vllm:prefix_cache_queries, which is over prompt tokens.".to_owned(),
    ];
    let values = serde_json::Value::Object(values);
    Ok(Section { title: "Shared prefixes".into(), method, tables, notes, values })
}

/// Times to the first token in seconds, by where the prefix came from.
#[derive(Default)]
struct Fetched {
    /// Computed.
    missed: Vec<f64>,
    /// Fetched from the store, which had it from the other replica.
    fetched: Vec<f64>,
    /// The replica had it.
    local: Vec<f64>,
    /// Could have been fetched, and was computed since that was estimated to be faster.
    declined: usize,
    block_bytes: f64,
}

impl Fetched {
    fn table(&self) -> Table {
        let columns = ["TTFT, ms", "p50", "p90", "requests"];
        let mut table = Table::new("A shared prefix: computed, fetched, or there", &columns);
        let rows = [
            ("miss: computed", &self.missed),
            ("hit: computed by the other replica, fetched", &self.fetched),
            ("hit: in the replica's own cache", &self.local),
        ];
        for (name, times) in rows {
            let summary = Summary::of(times.iter().copied());
            table.row([name.to_owned(), ms(summary.p50), ms(summary.p90), times.len().to_string()]);
        }
        table.row([
            "not fetched, estimated to take longer".into(),
            String::new(),
            String::new(),
            self.declined.to_string(),
        ]);
        table
    }

    fn values(&self) -> serde_json::Value {
        let summary = |times: &[f64]| Summary::of(times.iter().copied());
        json!({
            "miss_s": summary(&self.missed), "fetched_s": summary(&self.fetched), "local_s": summary(&self.local),
            "declined": self.declined, "block_bytes": self.block_bytes,
        })
    }
}

async fn metrics(cluster: &Cluster, process: &str) -> Result<Scrape> {
    let mut sum = Scrape::default();
    for member in cluster.members.iter().filter(|member| member.id.starts_with(process)) {
        sum = sum.plus(&member.counted().await?.metrics);
    }
    Ok(sum)
}

const OFFERED: &str = "moesaic_prefix_store_offered_blocks_total";
const FETCHED: &str = "moesaic_prefix_store_fetched_blocks_total";
const STORED: &str = "moesaic_kv_store_bytes";

/// Waits until so many blocks are in the store; `block_bytes` is known from the first time, at which the store must
/// have been quiet for a while.
async fn stored(cluster: &Cluster, blocks: f64, block_bytes: Option<f64>) -> Result<f64> {
    let deadline = Instant::now() + STORED_WITHIN;
    let (mut last, mut quiet_looks) = (0.0, 0);
    loop {
        let (offered, bytes) =
            (metrics(cluster, "scheduler").await?.sum(OFFERED), metrics(cluster, "kv").await?.sum(STORED));
        quiet_looks = if bytes == last && bytes > 0.0 { quiet_looks + 1 } else { 0 };
        last = bytes;
        let all_offered = offered >= blocks;
        match block_bytes {
            Some(each) if all_offered && bytes >= blocks * each => return Ok(each),
            None if all_offered && quiet_looks > 100 => return Ok(bytes / blocks),
            _ if Instant::now() > deadline => {
                bail!("{offered} of {blocks} blocks were offered, {bytes} bytes are stored")
            }
            _ => tokio::time::sleep(LOOK_EVERY).await,
        }
    }
}

async fn fetched(args: &Prefix, model: &Path, vocab: usize) -> Result<Fetched> {
    let plan = Plan {
        model: model.to_owned(),
        schedulers: 2,
        kv_stores: 1,
        settings: "[router]\npolicy = \"round_robin\"\n[kv_store]\ncapacity = \"4GiB\"\n".into(),
        scheduler: vec![format!("scheduler.prefix_store_fetch={}", args.fetch)],
        ..Plan::default()
    };
    crate::tell("start two replicas and a kv-store");
    let cluster = Cluster::start(&plan).await?;
    let mut connection = Connection::open(cluster.http).await?;
    let (mut result, mut block_bytes, mut blocks) = (Fetched::default(), None, 0.0);
    // the first prefix warms up
    for number in 0..=args.prefixes {
        let prefix = Random::named(number as u64, "prefix").tokens(args.prefix_tokens, vocab);
        for turn in 0..4 {
            let mut tokens = prefix.clone();
            tokens.extend(Random::named(number as u64, &format!("tail {turn}")).tokens(TAIL, vocab));
            let new_blocks = match turn {
                0 => tokens.len() / BLOCK_TOKENS,
                // of later requests only what begins in the prefix and ends in their own tokens is new
                _ => tokens.len() / BLOCK_TOKENS - args.prefix_tokens / BLOCK_TOKENS,
            };
            blocks += new_blocks as f64;
            let before = metrics(&cluster, "scheduler").await?.sum(FETCHED);
            let answer = connection.complete(&Completion { prompt: Prompt::Tokens(tokens), max_tokens: 2 }).await?;
            let was_fetched = metrics(&cluster, "scheduler").await?.sum(FETCHED) > before;
            block_bytes = Some(stored(&cluster, blocks, block_bytes).await?);
            if number > 0 {
                result.add(turn, &answer, was_fetched);
            }
        }
    }
    result.block_bytes = block_bytes.unwrap_or_default();
    ensure!(!result.fetched.is_empty(), "no prefix was fetched: computing it is estimated to be faster for this model");
    Ok(result)
}

impl Fetched {
    fn add(&mut self, turn: usize, answer: &Answer, was_fetched: bool) {
        let times = match (answer.cached_tokens, was_fetched) {
            (0, _) => &mut self.missed,
            (_, true) => &mut self.fetched,
            (_, false) => &mut self.local,
        };
        times.push(answer.ttft());
        if turn == 1 && answer.cached_tokens == 0 {
            self.declined += 1;
        }
    }
}

const POLICIES: [&str; 3] = ["round_robin", "least_loaded", "prefix_aware"];

/// One policy under one load.
struct Replayed {
    policy: &'static str,
    load: &'static str,
    hit_rate: f64,
    first: Summary,
    rate: f64,
    computed: f64,
}

async fn policies(args: &Prefix, model: &Path, vocab: usize) -> Result<(Table, serde_json::Value)> {
    let trace = Trace {
        groups: args.groups,
        exponent: 1.0,
        prefix_tokens: args.group_tokens,
        tail_tokens: TAIL,
        output_tokens: 8,
        requests: args.requests,
        vocab,
        seed: 7,
    };
    let mut all = Vec::new();
    let mut below = None;
    for saturated in [true, false] {
        for policy in POLICIES {
            let run = replay(args, model, &trace, policy, if saturated { None } else { below }).await?;
            if saturated && policy == "round_robin" {
                below = Some(run.rate * args.below);
            }
            let (hits, rate) = (percent(run.hit_rate), number(run.rate));
            crate::tell(&format!("{policy}, {}: hit rate {hits}, {rate} requests/s", run.load));
            all.push(run);
        }
    }
    let columns =
        ["policy and load", "hit rate", "TTFT p50, ms", "TTFT p90, ms", "requests/s", "prompt tokens computed"];
    let best = percent(trace.best_hit_rate(BLOCK_TOKENS));
    let mut table = Table::new(&format!("Policies on one trace (a cache without end would hit {best})"), &columns);
    let mut values = Vec::new();
    for Replayed { policy, load, hit_rate, first, rate, computed } in &all {
        let cells = [percent(*hit_rate), ms(first.p50), ms(first.p90), number(*rate), number(*computed)];
        table.row(std::iter::once(format!("{policy}, {load}")).chain(cells));
        values.push(json!({
            "policy": policy, "load": load, "hit_rate": hit_rate, "ttft_s": first, "requests_s": rate,
            "computed_tokens": computed,
        }));
    }
    Ok((table, values.into()))
}

/// Replays the trace on fresh processes: at `rate` requests a second, or as fast as the clients go.
async fn replay(
    args: &Prefix,
    model: &Path,
    trace: &Trace,
    policy: &'static str,
    rate: Option<f64>,
) -> Result<Replayed> {
    let plan = Plan {
        model: model.to_owned(),
        schedulers: 2,
        settings: format!("[router]\npolicy = \"{policy}\"\n[scheduler]\nkv_blocks = {}\n", args.kv_blocks),
        ..Plan::default()
    };
    let cluster = Cluster::start(&plan).await?;
    let before = cluster.counted().await?;
    let begun = Instant::now();
    let outcomes = match rate {
        Some(rate) => load::open(cluster.http, trace.arrivals(rate)).await?,
        None => load::closed(cluster.http, args.clients, trace.completions()).await?,
    };
    let seconds = begun.elapsed().as_secs_f64();
    let answers = load::answers(outcomes).with_context(|| format!("policy {policy}"))?;
    let counted = between(&before, &cluster.counted().await?);
    let schedulers = counted.into_iter().filter(|(name, _)| name.starts_with("scheduler"));
    let metrics = schedulers.fold(Scrape::default(), |sum, (_, counted)| sum.plus(&counted.metrics));
    let (queries, hits) = (metrics.sum("vllm:prefix_cache_queries"), metrics.sum("vllm:prefix_cache_hits"));
    let told: usize = answers.iter().map(|answer| answer.cached_tokens).sum();
    ensure!(told as f64 == hits, "the answers tell of {told} cached tokens, the metrics of {hits}");
    Ok(Replayed {
        policy,
        load: if rate.is_some() { "below saturation" } else { "at saturation" },
        hit_rate: hits / queries.max(1.0),
        first: Summary::of(answers.iter().map(Answer::ttft)),
        rate: answers.len() as f64 / seconds,
        computed: queries - hits,
    })
}
