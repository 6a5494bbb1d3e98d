//! The engines' own benchmark programs: what they are told, and what they say.
use super::engine::{Engine, Kind, Kv, Way};
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;

/// No program runs for so long unless it hangs: the longest test of the large model takes minutes.
pub(super) const LIMIT: Duration = Duration::from_secs(3600);
/// Repetitions that llama-bench is asked for. Its own warm-up is one token, so the first is cold.
const REPETITIONS: &str = "2";

/// One measurement of one engine alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Test {
    /// Prompt processing.
    Prompt {
        /// Tokens of the prompt.
        tokens: usize,
    },
    /// Generation of one token after another.
    Generation {
        /// How many.
        tokens: usize,
        /// Tokens in the context before.
        depth: usize,
    },
}

impl Test {
    /// As llama-bench names it: `pp512`, `tg128`, `tg128@d4096`.
    pub fn name(self) -> String {
        match self {
            Self::Prompt { tokens } => format!("pp{tokens}"),
            Self::Generation { tokens, depth: 0 } => format!("tg{tokens}"),
            Self::Generation { tokens, depth } => format!("tg{tokens}@d{depth}"),
        }
    }
}

/// What a benchmark program measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Measured {
    /// Tokens a second of each repetition that was warm.
    pub rates: Vec<f64>,
    /// The process's largest resident set, where it tells it.
    pub peak_rss_bytes: Option<u64>,
    /// Time to load the model, where it tells it.
    pub load_s: Option<f64>,
}

/// A result of llama-bench; both forks print these among others.
#[derive(Deserialize)]
struct LlamaRow {
    n_prompt: usize,
    n_gen: usize,
    /// llama.cpp's; ik_llama.cpp has the depth as the prompt of a test `tg128@pp4096`.
    #[serde(default)]
    n_depth: usize,
    #[serde(default)]
    test: String,
    samples_ts: Vec<f64>,
}

impl LlamaRow {
    fn test(&self) -> Test {
        let (tokens, depth) = (self.n_gen, self.n_depth);
        match (self.n_prompt, self.n_gen) {
            (tokens, 0) => Test::Prompt { tokens },
            (depth, tokens) if depth > 0 && self.test.contains('@') => Test::Generation { tokens, depth },
            _ => Test::Generation { tokens, depth },
        }
    }
}

/// A result of `moesaic bench --json`.
#[derive(Deserialize)]
struct MoesaicRow {
    test: String,
    depth: usize,
    tok_s_median: f64,
    peak_rss_bytes: u64,
    load_s: f64,
}

impl MoesaicRow {
    fn test(&self) -> Option<Test> {
        let tokens = self.test.get(2..)?.parse().ok()?;
        match self.test.get(..2)? {
            "pp" if self.depth == 0 => Some(Test::Prompt { tokens }),
            "tg" => Some(Test::Generation { tokens, depth: self.depth }),
            _ => None,
        }
    }
}

/// Reads what llama-bench prints with `-o json`: a list, before and after which there may be other lines.
fn read_llama(output: &str) -> Result<Vec<(Test, Measured)>> {
    let list = |(at, _): (usize, &str)| {
        let read = serde_json::Deserializer::from_str(&output[at..]).into_iter::<Vec<LlamaRow>>().next();
        read.and_then(Result::ok).filter(|rows| !rows.is_empty())
    };
    let rows = output.match_indices('[').find_map(list).context("there are no results in what it printed")?;
    let of = |row: LlamaRow| {
        // the first warms up
        let warm = row.samples_ts.get(1..).filter(|warm| !warm.is_empty()).with_context(|| {
            let (test, count) = (row.test().name(), row.samples_ts.len());
            format!("{test} was timed {count} times; it is to be twice or more, the first of which warms up")
        })?;
        Ok((row.test(), Measured { rates: warm.to_vec(), ..Measured::default() }))
    };
    rows.into_iter().map(of).collect()
}

fn read_moesaic(output: &str) -> Result<Vec<(Test, Measured)>> {
    let rows: Vec<MoesaicRow> = serde_json::from_str(output.trim())?;
    let of = |row: MoesaicRow| {
        let (peak_rss_bytes, load_s) = (Some(row.peak_rss_bytes), Some(row.load_s));
        Some((row.test()?, Measured { rates: vec![row.tok_s_median], peak_rss_bytes, load_s }))
    };
    Ok(rows.into_iter().filter_map(of).collect())
}

/// The ways in which an engine runs a test, of which the better counts: Moesaic has the one that is asked for.
pub fn ways(kind: Kind, test: Test, kv: Kv) -> Vec<Way> {
    match (kind, test) {
        (Kind::Moesaic, _) => vec![Way::usual(kv)],
        (_, Test::Prompt { tokens: 513.. }) => vec![Way::usual(Kv::Bf16), Way::wide(Kv::Bf16)],
        (_, Test::Generation { depth: 1.., .. }) => vec![Way::usual(Kv::Bf16), Way::usual(Kv::Int8)],
        _ => vec![Way::usual(Kv::Bf16)],
    }
}

/// Arguments of an engine's benchmark program for one test.
pub fn arguments(engine: &Engine, model: &Path, test: Test, threads: usize, way: Way) -> Vec<String> {
    let (model, threads) = (model.display().to_string(), threads.to_string());
    let mut all: Vec<String> = match engine.kind {
        Kind::Moesaic => {
            // a run of its own after one to warm up; 0 leaves a kind of test out
            let (pp, tg, depth) = match test {
                Test::Prompt { tokens } => (tokens, 0, 0),
                Test::Generation { tokens, depth } => (0, tokens, depth),
            };
            let flags = [("--pp", pp), ("--tg", tg), ("--depth", depth), ("--runs", 1)];
            let flags = flags.map(|(flag, value)| [flag.to_owned(), value.to_string()]).concat();
            let fixed = ["bench", "--json", "--model", &model, "--threads", &threads].map(str::to_owned);
            fixed.into_iter().chain(flags).collect()
        }
        Kind::LlamaCpp | Kind::Ik => {
            let lengths = match (test, engine.kind) {
                (Test::Prompt { tokens }, _) => vec!["-p".into(), tokens.to_string(), "-n".into(), "0".into()],
                (Test::Generation { tokens, depth }, Kind::Ik) if depth > 0 => {
                    let none = ["-p", "0", "-n", "0", "-gp"].map(str::to_owned);
                    none.into_iter().chain([format!("{depth},{tokens}")]).collect()
                }
                (Test::Generation { tokens, depth }, Kind::Ik) => {
                    debug_assert_eq!(depth, 0, "depths have the arm above");
                    vec!["-p".into(), "0".into(), "-n".into(), tokens.to_string()]
                }
                (Test::Generation { tokens, depth }, _) => {
                    let counts = [("-p", 0), ("-n", tokens), ("-d", depth)];
                    counts.map(|(flag, value)| [flag.to_owned(), value.to_string()]).concat()
                }
            };
            let fixed = ["-m", &model, "-t", &threads, "-r", REPETITIONS, "-o", "json"].map(str::to_owned);
            fixed.into_iter().chain(lengths).collect()
        }
    };
    all.extend(engine.flags(way));
    all
}

/// What a program prints, and what it says on stderr.
pub(super) async fn output(program: &Path, arguments: &[String], limit: Duration) -> Result<(String, String)> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(limit, command.output()).await;
    let output = output
        .with_context(|| format!("{} did not end within {} s", program.display(), limit.as_secs()))?
        .with_context(|| format!("start {}", program.display()))?;
    let [printed, said] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    ensure!(output.status.success(), "{}\n{}", output.status, end(&said));
    Ok((printed, said))
}

/// The last lines.
fn end(said: &str) -> String {
    let mut last: Vec<&str> = said.lines().rev().take(8).collect();
    last.reverse();
    last.join("\n")
}

/// Runs an engine's benchmark program for one test.
///
/// # Errors
/// With the end of what it says, when it fails, does not end or measured something else.
pub async fn run(engine: &Engine, model: &Path, test: Test, threads: usize, way: Way) -> Result<Measured> {
    let what = || format!("{} {}", engine.name, test.name());
    let arguments = arguments(engine, model, test, threads, way);
    let (printed, said) = output(&engine.bench_program(), &arguments, LIMIT).await.with_context(what)?;
    let read = if engine.kind == Kind::Moesaic { read_moesaic(&printed) } else { read_llama(&printed) };
    for (measured_test, measured) in read.with_context(|| format!("{}\n{}", what(), end(&said)))? {
        if measured_test == test && measured.rates.iter().all(|rate| rate.is_finite() && *rate > 0.0) {
            return Ok(measured);
        }
    }
    bail!("{}\n{}\nit did not measure {}", what(), end(&said), test.name())
}

/// Makes a folder of a model that is loaded without work (`moesaic quantize`).
///
/// # Errors
/// With the end of what it says, when it fails.
pub async fn prepare(engine: &Engine, model: &Path, folder: &Path) -> Result<()> {
    let [model, folder] = [model, folder].map(|path| path.display().to_string());
    let arguments = ["quantize", "--model", &model, "--out", &folder].map(str::to_owned);
    output(&engine.bench_program(), &arguments, LIMIT).await.context("prepare the model")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn moesaic_s_output_is_read() {
        let output = r#"[{"test":"pp512","depth":0,"threads":2,"tok_s_median":301.5,"tok_s_min":300.0,"tok_s_max":302.0,
            "peak_rss_bytes":123,"load_s":1.5},{"test":"tg128","depth":4096,"threads":2,"tok_s_median":7.5,"tok_s_min":7.0,
            "tok_s_max":8.0,"peak_rss_bytes":124,"load_s":1.5}]"#;
        let read = read_moesaic(output).unwrap();
        assert_eq!(read[0].0, Test::Prompt { tokens: 512 });
        assert_eq!(read[1].0, Test::Generation { tokens: 128, depth: 4096 });
        assert_eq!((read[1].1.rates[0], read[1].1.peak_rss_bytes, read[1].1.load_s), (7.5, Some(124), Some(1.5)));
        assert!(read_moesaic("error: no such file").is_err());
    }

    #[test]
    fn llama_bench_s_output_is_read_in_the_forms_of_both_forks() {
        // as llama.cpp's `json_printer` writes it; the fields that nobody reads are shortened
        let llama = r#"[
  {
    "build_commit": "unknown",
    "model_type": "qwen3moe ?B Q4_0",
    "n_threads": 2,
    "flash_attn": "on",
    "n_prompt": 512,
    "n_gen": 0,
    "n_depth": 0,
    "avg_ts": 325.100000,
    "samples_ns": [ 1574900000, 1575000000 ],
    "samples_ts": [ 325.2, 325.0 ]
  },
  {
    "n_prompt": 0,
    "n_gen": 128,
    "n_depth": 4096,
    "samples_ns": [ 2370000000, 2366000000, 2366000000 ],
    "samples_ts": [ 54.0, 54.1, 54.2 ]
  }
]
"#;
        let read = read_llama(llama).unwrap();
        assert_eq!((read[0].0, &read[0].1.rates), (Test::Prompt { tokens: 512 }, &vec![325.0]), "the first is cold");
        assert_eq!((read[1].0, &read[1].1.rates), (Test::Generation { tokens: 128, depth: 4096 }, &vec![54.1, 54.2]));
        // ik_llama.cpp tells of other things before, and has the depth in the prompt and the test's name
        let ik = r#"[info] repacked 97 tensors
[
  { "n_prompt": 0, "n_gen": 128, "test": "tg128", "samples_ns": [ 1, 1 ], "samples_ts": [ 179.0, 180.5 ] },
  { "n_prompt": 4096, "n_gen": 128, "test": "tg128@pp4096", "samples_ns": [ 1, 1 ], "samples_ts": [ 70.0, 77.25 ] },
  { "n_prompt": 2048, "n_gen": 0, "test": "pp2048", "samples_ns": [ 1, 1 ], "samples_ts": [ 600.0, 638.0 ] }
]
"#;
        let tests: Vec<Test> = read_llama(ik).unwrap().iter().map(|(test, _)| *test).collect();
        let generation = |depth| Test::Generation { tokens: 128, depth };
        assert_eq!(tests, [generation(0), generation(4096), Test::Prompt { tokens: 2048 }]);
        for wrong in ["", "error: failed to load model", "[ {\"n_prompt\": 1} ]", "[]]"] {
            assert!(read_llama(wrong).is_err(), "{wrong}");
        }
    }

    #[tokio::test]
    async fn a_program_that_measures_is_run_and_one_that_fails_says_why() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs");
        let engine = Engine::new(Kind::LlamaCpp, folder, "1".into());
        let test = Test::Generation { tokens: 16, depth: 0 };
        let measure = |model: &'static str| run(&engine, Path::new(model), test, 2, Way::usual(Kv::Bf16));
        assert_eq!(measure("good.gguf").await.unwrap().rates, [12.5]);
        assert!(measure("other.gguf").await.unwrap_err().to_string().contains("did not measure tg16"));
        let error = format!("{:#}", measure("once.gguf").await.unwrap_err());
        assert!(error.contains("tg16 was timed 1 times"), "{error}");
        let error = format!("{:#}", measure("bad.gguf").await.unwrap_err());
        assert!(error.contains("no such model") && error.contains("llama.cpp tg16"), "{error}");
    }

    #[tokio::test]
    async fn a_program_that_does_not_end_is_ended() {
        let error = output(Path::new("sleep"), &["600".to_owned()], Duration::from_millis(1)).await.unwrap_err();
        assert!(error.to_string().contains("did not end within"), "{error}");
    }

    #[test]
    fn a_peer_has_the_ways_that_may_be_faster_and_moesaic_the_one_that_is_meant() {
        let [short, long] = [512, 2048].map(|tokens| Test::Prompt { tokens });
        let [flat, deep] = [0, 4096].map(|depth| Test::Generation { tokens: 128, depth });
        let usual = Way::usual(Kv::Bf16);
        for test in [short, flat] {
            assert_eq!(ways(Kind::Ik, test, Kv::Bf16), [usual]);
        }
        assert_eq!(ways(Kind::Ik, long, Kv::Bf16), [usual, Way::wide(Kv::Bf16)]);
        assert_eq!(ways(Kind::LlamaCpp, deep, Kv::Bf16), [usual, Way::usual(Kv::Int8)]);
        assert_eq!(ways(Kind::Moesaic, long, Kv::Bf16), [usual]);
        assert_eq!(ways(Kind::Moesaic, deep, Kv::Int8), [Way::usual(Kv::Int8)]);
    }

    #[test]
    fn each_program_is_told_the_same_test_in_its_words() {
        let model = PathBuf::from("m.gguf");
        let words = |kind, test, kv| {
            let engine = Engine::new(kind, PathBuf::from("bin"), "1".into());
            arguments(&engine, &model, test, 2, Way::usual(kv)).join(" ")
        };
        let deep = Test::Generation { tokens: 128, depth: 4096 };
        let moesaic = words(Kind::Moesaic, deep, Kv::Int8);
        assert_eq!(moesaic, "bench --json --model m.gguf --threads 2 --pp 0 --tg 128 --depth 4096 --runs 1 --kv int8");
        let llama = words(Kind::LlamaCpp, deep, Kv::Int8);
        assert!(llama.contains("-p 0 -n 128 -d 4096") && llama.contains("-ctk q8_0 -ctv q8_0"), "{llama}");
        assert!(llama.contains("-r 2"), "one to warm up and one that counts: {llama}");
        let ik = words(Kind::Ik, deep, Kv::Bf16);
        assert!(ik.contains("-p 0 -n 0 -gp 4096,128") && ik.contains("-rtr 1") && !ik.contains("-ctk q8"), "{ik}");
        assert!(words(Kind::Ik, Test::Prompt { tokens: 512 }, Kv::Bf16).contains("-p 512 -n 0"));
        assert!(words(Kind::Ik, Test::Generation { tokens: 9, depth: 0 }, Kv::Bf16).contains("-p 0 -n 9"));
        assert_eq!(deep.name(), "tg128@d4096");
    }
}
