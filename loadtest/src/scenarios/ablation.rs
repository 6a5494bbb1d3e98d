//! What three parts of the engine are worth, each alone and all together: one load with shared prefixes, on `moesaic up`.
use crate::client::{Answer, Completion, Prompt};
use crate::cluster::Embedded;
use crate::load;
use crate::model;
use crate::random::Random;
use crate::report::{Section, Table, ms, number};
use crate::stats::{Summary, median};
use anyhow::{Context, Result, ensure};
use clap::Args;
use moesaic_model::memory;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// `moesaic-loadtest ablation`.
#[derive(Clone, Debug, Args)]
pub struct Ablation {
    /// The model, with 4-bit weights; moe-2b with random weights where not given.
    #[arg(long, value_name = "FILE.gguf")]
    pub model: Option<PathBuf>,
    /// Threads of the server.
    #[arg(long, default_value_t = 2)]
    pub threads: usize,
    /// Clients, each with one request after another; also the places in the batch.
    #[arg(long, default_value_t = 16)]
    pub clients: usize,
    /// Requests in all.
    #[arg(long, default_value_t = 64)]
    pub requests: usize,
    /// Prefixes that requests share.
    #[arg(long, default_value_t = 4)]
    pub prefixes: usize,
    /// Tokens of each prefix.
    #[arg(long, default_value_t = 256)]
    pub prefix_tokens: usize,
    /// Tokens of each prompt after its prefix.
    #[arg(long, default_value_t = 32)]
    pub own_tokens: usize,
    /// Tokens of the longest answer; lengths are spread evenly from an eighth of it.
    #[arg(long, default_value_t = 64)]
    pub output_tokens: usize,
    /// Runs of each variation, in turns.
    #[arg(long, default_value_t = 1)]
    pub runs: usize,
}

/// Which parts are on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Variation {
    continuous: bool,
    prefix_cache: bool,
    four_bits: bool,
}

impl Variation {
    /// None, each alone, all.
    fn all() -> [(&'static str, Self); 5] {
        let of = |continuous, prefix_cache, four_bits| Self { continuous, prefix_cache, four_bits };
        [
            ("none: static batches, no prefix cache, bf16", of(false, false, false)),
            ("continuous batching alone", of(true, false, false)),
            ("prefix cache alone", of(false, true, false)),
            ("4-bit weights alone", of(false, false, true)),
            ("all", of(true, true, true)),
        ]
    }

    fn settings(self, places: usize) -> Vec<String> {
        vec![
            format!("scheduler.batching={}", if self.continuous { "continuous" } else { "static" }),
            format!("scheduler.prefix_cache={}", self.prefix_cache),
            format!("model.weights={}", if self.four_bits { "q4" } else { "bf16" }),
            format!("scheduler.max_running={places}"),
        ]
    }
}

/// What one run measured.
#[derive(Clone, Debug, Serialize)]
struct Run {
    requests_s: f64,
    ttft: Summary,
    total: Summary,
    /// Prompt tokens that came from the cache, of all.
    cached_share: f64,
    peak_rss_bytes: u64,
}

/// The requests of a run; the same for all variations.
fn requests(args: &Ablation, vocab: usize, run: usize) -> Vec<Completion> {
    let prefix =
        |number: usize| Random::named(run as u64, &format!("prefix {number}")).tokens(args.prefix_tokens, vocab);
    let prefixes: Vec<Vec<u32>> = (0..args.prefixes).map(prefix).collect();
    let least = (args.output_tokens / 8).max(1);
    let request = |number: usize| {
        let mut random = Random::named(run as u64, &format!("request {number}"));
        let mut tokens = prefixes[random.below(prefixes.len())].clone();
        tokens.extend(random.tokens(args.own_tokens, vocab));
        let max_tokens = least + random.below(args.output_tokens - least + 1);
        Completion { prompt: Prompt::Tokens(tokens), max_tokens }
    };
    (0..args.requests).map(request).collect()
}

async fn measure(args: &Ablation, model: &Path, vocab: usize, variation: Variation, run: usize) -> Result<Run> {
    let server = Embedded::start(model, args.threads, &variation.settings(args.clients)).await?;
    // other prefixes than those that are measured
    let warm = Ablation { requests: args.clients, output_tokens: 8, prefix_tokens: 16, ..args.clone() };
    let warm = load::closed(server.http, args.clients, requests(&warm, vocab, usize::MAX)).await?;
    load::answers(warm).context("warm up")?;
    let answers = load::answers(load::closed(server.http, args.clients, requests(args, vocab, run)).await?)?;
    let peak_rss_bytes = memory::peak_rss_bytes(&server.member.pid().to_string())?;
    let begun = answers.iter().map(|answer| answer.sent).min().context("no answers")?;
    let ended = answers.iter().map(|answer| answer.ended).max().context("no answers")?;
    let sum = |count: fn(&Answer) -> usize| answers.iter().map(count).sum::<usize>() as f64;
    Ok(Run {
        requests_s: answers.len() as f64 / (ended - begun).as_secs_f64(),
        ttft: Summary::of(answers.iter().map(Answer::ttft)),
        total: Summary::of(answers.iter().map(Answer::total)),
        cached_share: sum(|answer| answer.cached_tokens) / sum(|answer| answer.prompt_tokens),
        peak_rss_bytes,
    })
}

/// Measures it.
///
/// # Errors
/// When a server does not start or a request fails.
pub async fn run(args: &Ablation) -> Result<Section> {
    ensure!(
        args.runs > 0 && args.clients > 0 && args.prefixes > 0,
        "--runs, --clients and --prefixes must be 1 or more"
    );
    ensure!(args.requests >= args.clients, "--requests must be at least --clients");
    ensure!(args.output_tokens > 0, "--output-tokens must be 1 or more");
    let model = match &args.model {
        Some(model) => model.clone(),
        None => model::stored(model::Preset::Moe2b)?,
    };
    let vocab = model::vocabulary_of(&model)?;
    let mut runs = Variation::all().map(|(name, variation)| (name, variation, Vec::new()));
    for run in 0..args.runs {
        for (name, variation, runs) in &mut runs {
            let measured = measure(args, &model, vocab, *variation, run).await.with_context(|| name.to_owned())?;
            crate::tell(&format!("{name}, run {}: {} requests/s", run + 1, number(measured.requests_s)));
            runs.push(measured);
        }
    }
    let columns = ["", "requests/s", "TTFT p50 ms", "TTFT p99 ms", "end to end p99 ms", "cached", "peak memory GiB"];
    let mut table = Table::new("Ablation", &columns);
    for (name, _, runs) in &runs {
        let of = |value: fn(&Run) -> f64| median(&runs.iter().map(value).collect::<Vec<_>>());
        table.row([
            (*name).to_owned(),
            number(of(|run| run.requests_s)),
            ms(of(|run| run.ttft.p50)),
            ms(of(|run| run.ttft.p99)),
            ms(of(|run| run.total.p99)),
            crate::report::percent(of(|run| run.cached_share)),
            number(of(|run| run.peak_rss_bytes as f64) / f64::from(1 << 30)),
        ]);
    }
    let method = format!(
        "`moesaic up` with {} threads, started anew for each row; a closed loop of {} clients, {} requests, each with one \
         of {} prefixes of {} tokens and {} tokens of its own, answers of {} to {} tokens; the same requests for all rows; \
         {} run(s) in turns, medians. Places in the batch: as many as clients. The bf16 rows hold the same file's 4-bit \
         weights widened to bf16.",
        args.threads,
        args.clients,
        args.requests,
        args.prefixes,
        args.prefix_tokens,
        args.own_tokens,
        (args.output_tokens / 8).max(1),
        args.output_tokens,
        args.runs,
    );
    let rows: Vec<_> =
        runs.iter().map(|(name, on, runs)| serde_json::json!({"name": name, "on": on, "runs": runs})).collect();
    let notes = vec![
        "TTFT counts from sending the request, waiting included.".to_owned(),
        "Continuous batching alone does not make a request shorter: who came first waits for nobody, and shares each step \
         with the prompts of those who come later; without the two other parts a prompt takes long. Static batches make \
         these wait instead, before their first token."
            .to_owned(),
    ];
    Ok(Section { title: "Ablation".into(), method, tables: vec![table], notes, values: rows.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_share_prefixes_and_answers_differ_in_length() {
        let command = Ablation::augment_args(clap::Command::new("x").no_binary_name(true));
        let args =
            <Ablation as clap::FromArgMatches>::from_arg_matches(&command.get_matches_from(Vec::<String>::new()));
        let args = args.expect("defaults");
        let all = requests(&args, 1000, 0);
        let prefix = |completion: &Completion| match &completion.prompt {
            Prompt::Tokens(tokens) => tokens[..args.prefix_tokens].to_vec(),
            Prompt::Text(_) => Vec::new(),
        };
        let distinct: std::collections::BTreeSet<_> = all.iter().map(prefix).collect();
        assert_eq!((all.len(), distinct.len()), (args.requests, args.prefixes));
        let lengths = all.iter().map(|completion| completion.max_tokens);
        assert!(lengths.clone().all(|length| (8..=64).contains(&length)));
        assert!(lengths.collect::<std::collections::BTreeSet<_>>().len() > 20);
        assert_ne!(requests(&args, 1000, 1), all);
    }

    #[test]
    fn each_part_is_on_alone_and_with_all_others() {
        let on = |v: Variation| usize::from(v.continuous) + usize::from(v.prefix_cache) + usize::from(v.four_bits);
        assert_eq!(Variation::all().map(|(_, variation)| on(variation)), [0, 1, 1, 1, 3]);
    }
}
