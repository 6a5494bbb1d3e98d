//! The flags of `moesaic-loadtest load`, and what they make.
use super::arrivals::Arrivals;
use super::drive::{Limits, Pacing};
use super::lengths::{AnswerLengths, Lengths, PromptLengths};
use super::measured::WarmUp;
use super::mooncake::{self, Scale};
use super::slo::Slo;
use super::target::{Api, Prompts, Target, Writer};
use super::workload::{Groups, Source, Vocabulary, Workload};
use crate::origin::Origin;
use anyhow::{Context, Result, ensure};
use clap::Args;
use moesaic_config::HumanDuration;
use moesaic_model::tokenizer::Tokenizer;
use serde_json::{Map, Value};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Where nothing says which tokens a model has: those of nearly all, past bytes and marks.
const USUAL: Vocabulary = Vocabulary { from: 1000, to: 30_000 };

/// `moesaic-loadtest load`: loads a server of the OpenAI API and measures its answers.
///
/// An open loop (--rate, or --trace alone) sends each request at its time, and its times count from there. A closed loop
/// (--clients) has so many requests at once.
#[derive(Clone, Debug, Args)]
pub struct Load {
    /// The server: http://host:port or https://host, with a path where its API is not under /v1.
    #[arg(long, value_name = "URL")]
    pub url: String,
    /// The model that is asked for; the first of the server's list where not given.
    #[arg(long)]
    pub model: Option<String>,
    /// Completions, or chat for servers that have nothing else.
    #[arg(long, value_enum, default_value_t = Api::Completions)]
    pub api: Api,
    /// The environment variable that has the API key.
    #[arg(long, value_name = "NAME")]
    pub api_key_env: Option<String>,
    /// Members that are added to each request's body, or stand in the place of usual ones: '{"cache_prompt": false}'. Not
    /// stream and stream_options, without which nothing can be measured.
    #[arg(long, value_name = "JSON", value_parser = object, default_value = "{}")]
    pub body: Body,
    /// How prompts are sent.
    #[arg(long, value_enum, default_value_t = Prompts::Auto)]
    pub prompts: Prompts,
    /// The model's tokenizer, for prompts of its tokens and as text.
    #[arg(long, value_name = "DIR|FILE.gguf")]
    pub tokenizer: Option<PathBuf>,
    /// Tokens that prompts are made of, as FROM..TO; those of --tokenizer, or else 1000..30000, where not given.
    #[arg(long, value_name = "FROM..TO", value_parser = vocabulary)]
    pub vocab: Option<Vocabulary>,

    /// Open loop: so many requests a second on average, 0.000001 to 100000.
    #[arg(long, value_name = "PER_SECOND", value_parser = rate, conflicts_with = "clients")]
    pub rate: Option<f64>,
    /// Open loop: poisson, constant, or gamma:SHAPE, which comes in bursts below a shape of 1.
    #[arg(long, default_value_t = Arrivals::Poisson, requires = "rate")]
    pub arrivals: Arrivals,
    /// Open loop: more requests are not in flight at once; what comes then waits, in the time of its answer.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    pub most_at_once: u32,
    /// Closed loop: so many clients, each with one request after another.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=60_000))]
    pub clients: Option<u32>,
    /// Closed loop: what a client waits between an answer and its next request.
    #[arg(long, default_value = "0", requires = "clients")]
    pub think: HumanDuration,

    /// The run ends after so many requests, those of the warm-up included.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    pub requests: Option<u64>,
    /// No request is sent after this time; what runs then is waited for. Rates are until then.
    #[arg(long, value_name = "TIME", value_parser = positive)]
    pub duration: Option<Duration>,
    /// Left out of the results: the first requests, as a number of them or as a time.
    #[arg(long, value_name = "N|TIME", value_parser = warm_up, default_value = "0")]
    pub warm_up: WarmUp,
    /// An answer of which nothing comes for so long is given up.
    #[arg(long, value_name = "TIME", value_parser = positive, default_value = "180s")]
    pub patience: Duration,

    /// Tokens of prompts: N, uniform:FROM..TO, lognormal:MEDIAN:SIGMA or lognormal:MEDIAN:SIGMA:MOST, or trace:FILE, whose
    /// lengths are drawn.
    #[arg(long, value_name = "LENGTHS", default_value = "128")]
    pub prompt_lengths: PromptLengths,
    /// Tokens of answers, in the same forms.
    #[arg(long, value_name = "LENGTHS", default_value = "64")]
    pub answer_lengths: AnswerLengths,
    /// Groups of requests with a prefix each, which comes before the prompt's own tokens; 0: none.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub groups: u32,
    /// Tokens of the groups' prefixes.
    #[arg(long, value_name = "LENGTHS", default_value = "1024")]
    pub group_lengths: PromptLengths,
    /// How uneven the groups' popularity is, 0 to 10: group g is as likely as 1 / (g + 1) to the power of this.
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = exponent)]
    pub group_exponent: f64,

    /// A trace in Mooncake's format, JSON lines of timestamp, input_length, output_length and hash_ids: its requests with
    /// their shared prefixes, at its times unless --rate or --clients says otherwise.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt_lengths", "answer_lengths", "groups"])]
    pub trace: Option<PathBuf>,
    /// Factor of the trace's times, above 0 and at most 1000: at 0.5 requests come twice as fast.
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = factor, requires = "trace")]
    pub time_scale: f64,
    /// Factor of the trace's lengths, blocks included, above 0 and at most 1000.
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = factor, requires = "trace")]
    pub length_scale: f64,

    /// Objectives of each request: ttft, itl (99 in 100 of its gaps), tpot (the mean gap) and e2e, as ttft=500ms,itl=50ms.
    #[arg(long, value_name = "OBJECTIVES")]
    pub slo: Option<Slo>,
    /// Decides prompts, lengths and arrivals.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Also draw it.
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
}

/// Members of a body.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Body(pub Map<String, Value>);

/// Members of a request's body that make the server tell when tokens come, and how many.
const MEASURED_BY: [&str; 2] = ["stream", "stream_options"];

fn object(text: &str) -> Result<Body, String> {
    match serde_json::from_str(text) {
        Ok(Value::Object(members)) => match MEASURED_BY.iter().find(|name| members.contains_key(**name)) {
            Some(name) => Err(format!("'{name}' is what is measured by and cannot be replaced")),
            None => Ok(Body(members)),
        },
        Ok(other) => Err(format!("'{other}' is no object of JSON")),
        Err(error) => Err(error.to_string()),
    }
}

fn vocabulary(text: &str) -> Result<Vocabulary, String> {
    let ends = text.split_once("..").and_then(|(from, to)| Some((from.parse().ok()?, to.parse().ok()?)));
    let ends = ends.filter(|(from, to): &(u32, u32)| from < to && *to <= 1 << 24);
    ends.map(|(from, to)| Vocabulary { from, to })
        .ok_or_else(|| format!("use FROM..TO with FROM below TO, which is at most {}", 1 << 24))
}

fn rate(text: &str) -> Result<f64, String> {
    // with less the gaps between arrivals are more than a time can hold
    let value = text.parse().ok().filter(|value| (1e-6..=100_000.0).contains(value));
    value.ok_or_else(|| "use a number from 0.000001 to 100000".into())
}

fn factor(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|value| *value > 0.0 && *value <= 1000.0);
    value.ok_or_else(|| "use a number above 0 and at most 1000".into())
}

fn exponent(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|value| (0.0..=10.0).contains(value));
    value.ok_or_else(|| "use a number from 0 to 10".into())
}

fn positive(text: &str) -> Result<Duration, String> {
    let time = text.parse::<HumanDuration>()?.get();
    // a month; longer times are a slip
    let is_usable = !time.is_zero() && time <= Duration::from_secs(31 * 86_400);
    if is_usable { Ok(time) } else { Err("use a time above 0 and at most 31d".into()) }
}

fn warm_up(text: &str) -> Result<WarmUp, String> {
    match text.parse() {
        Ok(count) => Ok(WarmUp::Requests(count)),
        Err(_) => Ok(WarmUp::Time(text.parse::<HumanDuration>()?.get())),
    }
}

impl Load {
    /// Whether requests have a schedule.
    pub fn is_open(&self) -> bool {
        self.clients.is_none()
    }

    /// Checks what no flag alone can tell.
    ///
    /// # Errors
    /// Names the flags.
    pub fn validate(&self) -> Result<()> {
        let paced = self.rate.is_some() || self.clients.is_some() || self.trace.is_some();
        ensure!(paced, "nothing says when requests are sent; give --rate, --clients or --trace");
        let ends = self.requests.is_some() || self.duration.is_some() || self.trace.is_some();
        ensure!(ends, "nothing says when the run ends; give --requests or --duration");
        match (self.warm_up, self.requests, self.duration) {
            (WarmUp::Requests(before), Some(all), _) => {
                ensure!((before as u64) < all, "--warm-up {before} leaves nothing of --requests {all}");
            }
            (WarmUp::Time(before), _, Some(all)) => {
                let (before_text, all_text) = (HumanDuration(before), HumanDuration(all));
                ensure!(before < all, "--warm-up {before_text} leaves nothing of --duration {all_text}");
            }
            _ => {}
        }
        ensure!(
            self.api == Api::Completions || self.prompts != Prompts::Tokens,
            "--api chat takes no --prompts tokens; use text"
        );
        Ok(())
    }

    /// When it ends.
    pub fn limits(&self) -> Limits {
        let requests = self.requests.map(|count| usize::try_from(count).unwrap_or(usize::MAX));
        Limits { requests, duration: self.duration }
    }

    fn tokenizer(&self) -> Result<Option<Arc<Tokenizer>>> {
        let Some(path) = &self.tokenizer else { return Ok(None) };
        let tokenizer = Tokenizer::open(path).with_context(|| format!("--tokenizer {}", path.display()))?;
        Ok(Some(Arc::new(tokenizer)))
    }

    /// Which tokens are used, and how they become text.
    ///
    /// # Errors
    /// When the tokenizer cannot be read.
    pub fn words(&self) -> Result<(Vocabulary, Writer)> {
        let tokenizer = self.tokenizer()?;
        let of = |tokenizer: &Arc<Tokenizer>| {
            let last = (0..tokenizer.vocab_size() as u32).rev().find(|token| !tokenizer.is_special(*token));
            Vocabulary { from: 0, to: last.map_or(1, |last| last + 1) }
        };
        let vocabulary = self.vocab.or(tokenizer.as_ref().map(of)).unwrap_or(USUAL);
        Ok((vocabulary, tokenizer.map_or(Writer::Words, Writer::Tokenizer)))
    }

    /// The server, with the model and the way that it takes; prompts are text until that was tried.
    ///
    /// # Errors
    /// When the URL or the key is not usable.
    pub fn target(&self, writer: Writer) -> Result<Target> {
        let mut origin = Origin::parse(&self.url).context("--url")?;
        if let Some(name) = &self.api_key_env {
            let key = std::env::var(name).ok().filter(|key| !key.is_empty());
            let key = key.with_context(|| format!("--api-key-env {name}: there is no such environment variable"))?;
            origin = origin.with_key(&key)?;
        }
        Ok(Target {
            origin,
            model: self.model.clone(),
            api: self.api,
            writer: Some(writer),
            body: self.body.0.clone(),
            patience: self.patience,
        })
    }

    /// What is asked.
    ///
    /// # Errors
    /// When the trace cannot be read, or is too long with the factor of its lengths.
    pub fn workload(&self, vocabulary: Vocabulary) -> Result<Workload> {
        let source = match &self.trace {
            Some(path) => {
                let scale = Scale { time: self.time_scale, length: self.length_scale };
                let entries = scale.apply(&mooncake::read(path).context("--trace")?).context("--length-scale")?;
                Source::Trace { entries: entries.into(), block: scale.block() }
            }
            None => {
                let groups = (self.groups > 0).then(|| Groups {
                    count: self.groups as usize,
                    prefix: self.group_lengths.0.clone(),
                    exponent: self.group_exponent,
                });
                let (prompts, answers) = (self.prompt_lengths.0.clone(), self.answer_lengths.0.clone());
                Source::Drawn { prompts, answers, groups }
            }
        };
        Ok(Workload::new(source, vocabulary, self.seed))
    }

    /// When requests are sent.
    pub fn pacing(&self, workload: &Workload) -> Pacing {
        let most_at_once = self.most_at_once as usize;
        match (self.clients, self.rate) {
            (Some(clients), _) => Pacing::Closed { clients: clients as usize, think: self.think.get() },
            (None, Some(rate)) => Pacing::Open { times: Box::new(self.arrivals.times(rate, self.seed)), most_at_once },
            (None, None) => {
                let times = workload.trace_times().unwrap_or_default();
                Pacing::Open { times: Box::new(times.into_iter()), most_at_once }
            }
        }
    }

    /// The load in words.
    pub fn describe(&self) -> String {
        let lengths = |lengths: &Lengths| lengths.to_string();
        let what = match &self.trace {
            Some(path) => {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                format!("Requests of the trace {name}, times x {}, lengths x {}", self.time_scale, self.length_scale)
            }
            None => {
                let groups = match self.groups {
                    0 => String::new(),
                    count => format!(
                        " after the prefix of one of {count} groups ({} tokens, popularity 1 / rank^{})",
                        lengths(&self.group_lengths.0),
                        self.group_exponent
                    ),
                };
                let (prompts, answers) = (lengths(&self.prompt_lengths.0), lengths(&self.answer_lengths.0));
                format!("Prompts of {prompts} tokens{groups}, answers of {answers} tokens")
            }
        };
        let pacing = match (self.clients, self.rate) {
            (Some(clients), _) if self.think.get().is_zero() => format!("a closed loop of {clients} clients"),
            (Some(clients), _) => format!("a closed loop of {clients} clients that think for {}", self.think),
            (None, Some(rate)) => format!("an open loop of {rate} requests/s ({})", self.arrivals),
            (None, None) => "an open loop at the trace's times".into(),
        };
        let warm_up = match self.warm_up {
            WarmUp::Requests(0) => "nothing is left out".into(),
            WarmUp::Requests(count) => format!("the first {count} requests are left out"),
            WarmUp::Time(time) => format!("the first {} are left out", HumanDuration(time)),
        };
        format!("{what}; {pacing}; {warm_up}; seed {}.", self.seed)
    }
}
