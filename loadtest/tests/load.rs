//! The load generator against real servers: Moesaic itself, and one that does what a test tells it to.
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use bytes::Bytes;
use clap::Parser;
use futures::stream::{self, StreamExt};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use moesaic_loadtest::cluster::Embedded;
use moesaic_loadtest::generator::{self, Load};
use moesaic_loadtest::model::{self, Preset};
use moesaic_loadtest::report::Section;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    load: Load,
}

fn load(address: SocketAddr, flags: &str) -> Load {
    let url = format!("http://{address}");
    let words = ["load", "--url", &url].map(str::to_owned).into_iter();
    Command::parse_from(words.chain(flags.split_whitespace().map(str::to_owned))).load
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// What the server of a test does with a request's body.
type Manner = Arc<dyn Fn(usize, &Value) -> Reply + Send + Sync>;

enum Reply {
    /// A status that is no success.
    Refuse(u16),
    /// These events, each after a pause.
    Events(Duration, Vec<String>),
}

/// A server that answers by a manner and keeps the bodies that it got.
struct Scripted {
    address: SocketAddr,
    bodies: Arc<Mutex<Vec<Value>>>,
}

type Chunks = StreamBody<stream::BoxStream<'static, Result<Frame<Bytes>, Infallible>>>;

fn respond(reply: Reply) -> Response<Chunks> {
    let (status, pause, events) = match reply {
        Reply::Refuse(status) => (status, Duration::ZERO, vec!["no".to_owned()]),
        Reply::Events(pause, events) => {
            (200, pause, events.into_iter().map(|event| format!("data: {event}\n\n")).collect())
        }
    };
    let chunks = stream::iter(events).then(move |event| async move {
        tokio::time::sleep(pause).await;
        Ok(Frame::data(Bytes::from(event)))
    });
    Response::builder().status(status).body(StreamBody::new(chunks.boxed())).unwrap()
}

impl Scripted {
    async fn start(manner: Manner) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let bodies = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&bodies);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (manner, kept) = (Arc::clone(&manner), Arc::clone(&kept));
                let service = service_fn(move |request: Request<Incoming>| {
                    let (manner, kept) = (Arc::clone(&manner), Arc::clone(&kept));
                    async move {
                        if request.method() == "GET" {
                            return Ok::<_, Infallible>(respond(Reply::Refuse(404)));
                        }
                        let bytes = request.into_body().collect().await.unwrap().to_bytes();
                        let body: Value = serde_json::from_slice(&bytes).unwrap();
                        let number = {
                            let mut kept = kept.lock().unwrap();
                            kept.push(body.clone());
                            kept.len() - 1
                        };
                        Ok(respond(manner(number, &body)))
                    }
                });
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        Self { address, bodies }
    }

    fn bodies(&self) -> Vec<Value> {
        self.bodies.lock().unwrap().clone()
    }
}

fn text(text: &str) -> String {
    json!({"choices": [{"index": 0, "text": text}]}).to_string()
}

/// So many tokens, one an event, and what they are counted as.
fn answer(body: &Value) -> Vec<String> {
    let count = body["max_tokens"].as_u64().unwrap();
    let usage = json!({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": count}}).to_string();
    (0..count).map(|at| text(&format!("t{at}"))).chain([usage, "[DONE]".into()]).collect()
}

fn at_once() -> Manner {
    Arc::new(|_, body| Reply::Events(Duration::ZERO, answer(body)))
}

fn tiny(folder: &Path) -> PathBuf {
    let path = folder.join("tiny.gguf");
    model::write(&Preset::MoeTiny.shape(), 1, &path, &|_, _| ()).unwrap();
    path
}

fn check_moesaic(section: &Section, requests: u64, answer: f64) {
    let values = &section.values;
    assert_eq!((&values["answered"], &values["requests"]), (&json!(requests), &json!(requests)), "{values}");
    assert_eq!(
        (&values["told_usage"], &values["errors"], &values["short_answers"]),
        (&json!(true), &json!({}), &json!(0))
    );
    assert!((number(&values["answer_tokens"]["mean"]) - answer).abs() < 1e-9, "{values}");
    for time in ["ttft_s", "itl_s", "tpot_s", "e2e_s"] {
        let of = |name: &str| number(&values[time][name]);
        assert!(
            of("p50") > 0.0 && of("p50") <= of("p90") && of("p90") <= of("p99") && of("p99") <= of("max"),
            "{values}"
        );
    }
    assert!(number(&values["ttft_s"]["max"]) <= number(&values["e2e_s"]["max"]), "{values}");
    assert!(number(&values["generation_tok_s"]) > 0.0 && number(&values["prompt_tok_s"]) > 0.0, "{values}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn moesaic_is_loaded_in_closed_and_open_loops_and_through_both_ways() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny(folder.path());
    let server = Embedded::start(&model, 1, &[]).await.unwrap();
    let common = format!("--tokenizer {} --seed 3", model.display());

    let closed = "--clients 3 --requests 15 --warm-up 3 --prompt-lengths uniform:20..40 --answer-lengths 9";
    let section = generator::run(&load(server.http, &format!("{common} {closed}"))).await.unwrap();
    check_moesaic(&section, 12, 9.0);
    let prompt = &section.values["prompt_tokens"];
    assert!(number(&prompt["min"]) >= 20.0 && number(&prompt["max"]) <= 40.0, "tokens are sent as such: {prompt}");
    // nothing ran after the last answer and all began before: the rate times the window is what was generated in it
    let generated = number(&section.values["generation_tok_s"]) * number(&section.values["window_s"]);
    assert!(generated > 9.0 * 12.0 - 1.0 && generated <= 9.0 * 15.0 + 1.0, "{generated}");

    let plot = folder.path().join("p.svg");
    let open = format!(
        "--rate 40 --arrivals gamma:0.5 --requests 12 --groups 2 --group-lengths 128 --prompt-lengths 10 \
         --answer-lengths 6 --slo ttft=60s,e2e=1h --plot {}",
        plot.display()
    );
    let section = generator::run(&load(server.http, &format!("{common} {open}"))).await.unwrap();
    check_moesaic(&section, 12, 6.0);
    let values = &section.values;
    assert!(number(&values["cached_share"]) > 0.3, "two groups of twelve requests share prefixes: {values}");
    assert_eq!((&values["goodput"]["good"], &values["goodput"]["share"]), (&json!(12), &json!(1.0)));
    let drawn = std::fs::read_to_string(plot).unwrap();
    assert!(roxmltree::Document::parse(&drawn).is_ok());

    let chat = "--api chat --clients 2 --requests 4 --prompt-lengths 12 --answer-lengths 5";
    let section = generator::run(&load(server.http, &format!("{common} {chat}"))).await.unwrap();
    check_moesaic(&section, 4, 5.0);
    assert!(section.notes.iter().any(|note| note.contains("as text")), "{:?}", section.notes);
}

#[tokio::test]
async fn a_trace_is_replayed_with_its_lengths_and_its_shared_blocks() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace.jsonl");
    let lines = r#"{"timestamp": 0, "input_length": 1100, "output_length": 4, "hash_ids": [1, 2, 3]}
{"timestamp": 100, "input_length": 1300, "output_length": 8, "hash_ids": [1, 2, 4]}
{"timestamp": 300, "input_length": 600, "output_length": 2, "hash_ids": [5, 6]}"#;
    std::fs::write(&trace, lines).unwrap();
    let server = Scripted::start(at_once()).await;
    let flags = format!("--trace {} --time-scale 0.1 --length-scale 0.5", trace.display());
    let section = generator::run(&load(server.address, &flags)).await.unwrap();
    assert_eq!(section.values["answered"], 3);
    // the first was the trial
    let bodies = server.bodies()[1..].to_vec();
    let mut prompts: Vec<Vec<Value>> = bodies.iter().map(|body| body["prompt"].as_array().unwrap().clone()).collect();
    prompts.sort_by_key(Vec::len);
    assert_eq!(prompts.iter().map(Vec::len).collect::<Vec<_>>(), [300, 550, 650]);
    assert_eq!(prompts[1][..512], prompts[2][..512], "two blocks of 256");
    assert_ne!(prompts[1][512..], prompts[2][512..550]);
    let answers: u64 = bodies.iter().map(|body| body["max_tokens"].as_u64().unwrap()).sum();
    assert_eq!(answers, 2 + 4 + 1);
}

#[tokio::test]
async fn a_seed_s_requests_are_the_same_whoever_answers() {
    let mut asked = Vec::new();
    for seed in [5, 5, 6] {
        let server = Scripted::start(at_once()).await;
        let flags = format!(
            "--rate 500 --requests 20 --prompt-lengths lognormal:20:0.5 --answer-lengths uniform:1..5 --groups 3 \
             --group-lengths 8 --model m --seed {seed}"
        );
        generator::run(&load(server.address, &flags)).await.unwrap();
        let mut bodies: Vec<String> = server.bodies().iter().map(Value::to_string).collect();
        // requests may overtake each other on their connections
        bodies.sort();
        asked.push(bodies);
    }
    assert_eq!(asked[0].len(), 21);
    assert_eq!(asked[0], asked[1]);
    assert_ne!(asked[0], asked[2]);
}

#[tokio::test]
async fn errors_are_counted_by_kind_and_the_rest_is_measured() {
    let manner: Manner = Arc::new(|number, body| match number {
        // the trial, then one of each kind in turns
        0 => Reply::Events(Duration::ZERO, answer(body)),
        number if number % 4 == 1 => Reply::Refuse(429),
        number if number % 4 == 2 => {
            Reply::Events(Duration::ZERO, vec![text("a"), json!({"error": {"message": "boom"}}).to_string()])
        }
        number if number % 4 == 3 => Reply::Events(Duration::ZERO, vec![text("a")]),
        _ => Reply::Events(Duration::ZERO, answer(body)),
    });
    let server = Scripted::start(manner).await;
    let section = generator::run(&load(server.address, "--rate 1000 --requests 20 --slo e2e=1h")).await.unwrap();
    let values = &section.values;
    assert_eq!(values["errors"], json!({"broken stream": 10, "http 429": 5}), "{values}");
    assert_eq!((&values["answered"], &values["goodput"]["share"]), (&json!(5), &json!(0.25)));
    assert!(section.tables.iter().any(|table| table.title == "Errors" && table.rows.len() == 2));
    assert!(section.notes.iter().any(|note| note.contains("15 of 20 counted requests failed")), "{:?}", section.notes);
}

#[tokio::test]
async fn tokens_are_counted_from_events_where_the_server_tells_no_usage() {
    let manner: Manner = Arc::new(|_, _| Reply::Events(Duration::ZERO, vec![text("a"), text("b"), "[DONE]".into()]));
    let server = Scripted::start(manner).await;
    let flags = "--clients 1 --requests 4 --prompt-lengths 30 --answer-lengths 3";
    let section = generator::run(&load(server.address, flags)).await.unwrap();
    let values = &section.values;
    assert_eq!((&values["told_usage"], &values["short_answers"]), (&json!(false), &json!(4)));
    assert_eq!((number(&values["answer_tokens"]["mean"]), number(&values["prompt_tokens"]["mean"])), (2.0, 30.0));
    assert!(section.notes.iter().any(|note| note.contains("counted as events")), "{:?}", section.notes);
}

#[tokio::test]
async fn prompts_are_text_where_the_server_takes_no_tokens() {
    let manner: Manner = Arc::new(|_, body| match &body["prompt"] {
        Value::String(_) => Reply::Events(Duration::ZERO, answer(body)),
        _ => Reply::Refuse(400),
    });
    let server = Scripted::start(manner).await;
    let flags = "--clients 1 --requests 3 --prompt-lengths 12";
    let section = generator::run(&load(server.address, flags)).await.unwrap();
    assert_eq!(section.values["answered"], 3);
    let last = server.bodies().pop().unwrap();
    assert_eq!(last["prompt"].as_str().unwrap().split(' ').count(), 12);
    // where tokens are asked for, the refusal is an error
    let error = generator::run(&load(server.address, &format!("{flags} --prompts tokens"))).await.unwrap_err();
    assert!(format!("{error:#}").contains("400"), "{error:#}");
}

#[tokio::test]
async fn the_time_that_a_request_waits_for_its_turn_counts() {
    // an answer takes at least 50 ms, requests come each 10 ms, and only one is let out at once
    let manner: Manner = Arc::new(|_, body| Reply::Events(Duration::from_millis(25), answer(body)));
    let server = Scripted::start(manner).await;
    let flags = "--rate 100 --arrivals constant --requests 10 --most-at-once 1 --answer-lengths 1";
    let section = generator::run(&load(server.address, flags)).await.unwrap();
    let values = &section.values;
    // the tenth begins after nine answers and ends after its own, 500 ms after the first began; it was due 90 ms later
    assert!(number(&values["e2e_s"]["max"]) >= 0.4, "{values}");
    assert!(number(&values["late_s"]["max"]) >= 0.35 && values["kept_schedule"] == false, "{values}");
    assert!(section.notes.iter().any(|note| note.contains("schedule was not kept")), "{:?}", section.notes);
}

#[tokio::test]
async fn an_answer_that_does_not_come_is_a_timeout_and_nothing_waits_for_it() {
    let manner: Manner = Arc::new(|number, body| match number {
        0 => Reply::Events(Duration::ZERO, answer(body)),
        // after the trial only the last is answered
        number if number < 4 => Reply::Events(Duration::from_secs(3600), answer(body)),
        _ => Reply::Events(Duration::ZERO, answer(body)),
    });
    let server = Scripted::start(manner).await;
    let flags = "--clients 1 --requests 4 --patience 1s --answer-lengths 1";
    let section = generator::run(&load(server.address, flags)).await.unwrap();
    assert_eq!(section.values["errors"], json!({"timeout": 3}), "{}", section.values);
    assert_eq!(section.values["answered"], 1);
}

#[tokio::test]
async fn what_cannot_be_run_is_said_by_its_flag() {
    let server = Scripted::start(at_once()).await;
    let said = |flags: &'static str| {
        let args = load(server.address, flags);
        async move { format!("{:#}", generator::run(&args).await.unwrap_err()) }
    };
    assert!(said("--requests 3").await.contains("--rate, --clients or --trace"));
    assert!(said("--rate 3").await.contains("--requests or --duration"));
    assert!(said("--rate 3 --requests 5 --warm-up 5").await.contains("--warm-up 5 leaves nothing of --requests 5"));
    assert!(said("--rate 3 --duration 2s --warm-up 3s").await.contains("--warm-up 3s leaves nothing"));
    assert!(said("--clients 3 --requests 1 --api chat --prompts tokens").await.contains("--prompts tokens"));
    assert!(said("--clients 1 --requests 1 --api-key-env MOESAIC_NO_SUCH_KEY").await.contains("MOESAIC_NO_SUCH_KEY"));
    assert!(said("--trace /nowhere/trace").await.contains("/nowhere/trace"));
    assert!(said("--clients 1 --requests 1 --plot /nowhere/p.svg").await.contains("--plot: write /nowhere/p.svg"));
    assert!(server.bodies().is_empty(), "nothing is sent before all this is known");
    let refused = |flags: &str| {
        let words = ["load", "--url", "http://h"].into_iter().chain(flags.split_whitespace());
        Command::try_parse_from(words).err().map(|error| error.to_string()).unwrap_or_default()
    };
    for (flags, flag, limit) in [
        ("--clients 0", "--clients", "1..=60000"),
        ("--rate 0", "--rate", "from 0.000001"),
        ("--rate 1e9", "--rate", "100000"),
        ("--prompt-lengths 0", "--prompt-lengths", "1 to"),
        ("--slo ttft=0s", "--slo", "longer"),
        ("--vocab 9..3", "--vocab", "FROM below TO"),
        ("--duration 0", "--duration", "above 0"),
        ("--body [1]", "--body", "object"),
        ("--body {\"stream\":false}", "--body", "'stream' is what is measured by"),
        ("--group-exponent 11", "--group-exponent", "0 to 10"),
    ] {
        let error = refused(flags);
        assert!(error.contains(flag) && error.contains(limit), "{flags}: {error}");
    }
    let nobody = load("127.0.0.1:1".parse().unwrap(), "--clients 1 --requests 1");
    assert!(format!("{:#}", generator::run(&nobody).await.unwrap_err()).contains("127.0.0.1:1"));
}
