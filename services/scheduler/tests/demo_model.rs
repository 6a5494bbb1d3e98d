//! The same promises with the real demo model: tokens and log-probabilities are equal to the bit.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Answer, PATIENCE, generate, prompt, request, until_idle};
use moesaic_model::tokenizer::Tokenizer;
use moesaic_model::{BackendKind, LoadOptions};
use moesaic_scheduler::{Config, RunnerFactory, Scheduler, Vocabulary};
use moesaic_types::{BlockHasher, Digest, GenerateRequest, Grammar, KvFormat, SamplingParams, WeightFormat};
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/models/demo-moe")
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_dir(&folder()).unwrap()
}

fn vocabulary() -> Vocabulary {
    let tokenizer = tokenizer();
    let token_bytes = tokenizer.all_token_bytes().to_vec();
    let special = (0..token_bytes.len() as u32).map(|id| tokenizer.is_special(id)).collect();
    let eos = moesaic_model::generation_config::end_tokens(&folder(), tokenizer.vocab_size(), &tokenizer).unwrap();
    Vocabulary { token_bytes, special, eos }
}

async fn start(config: Config, kv: KvFormat, weights: Option<WeightFormat>) -> Arc<Scheduler> {
    let factory: RunnerFactory = Arc::new(move || {
        let options =
            LoadOptions { weights, kv, threads: 2, activations: moesaic_model::Activations::Int8, progress: None };
        moesaic_model::load(&folder(), BackendKind::Native, &options)
    });
    let hasher = BlockHasher::new(&Digest::of(b"demo"), weights.unwrap_or_default(), kv, None);
    Scheduler::start(config, factory, vocabulary(), hasher, None, None).await.unwrap()
}

/// Sixteen requests: half of them share the start of their prompts; greedy, drawn, with log-probabilities.
fn requests() -> Vec<GenerateRequest> {
    let shared = prompt(0, 130);
    (0..16u64)
        .map(|n| {
            let mut tokens = if n % 2 == 0 { shared.clone() } else { Vec::new() };
            tokens.extend(prompt(n + 1, 5 + 7 * n as usize));
            let mut request = request(tokens, 10 + 2 * n as usize);
            request.top_logprobs = Some(2);
            request.prompt_logprobs = n == 5;
            if n % 3 > 0 {
                request.sampling = SamplingParams { seed: n, temperature: 1.0, top_p: 0.95, ..Default::default() };
            } else {
                request.sampling = SamplingParams::greedy();
            }
            request
        })
        .collect()
}

fn same(expected: &[Answer], found: &[Answer], what: &str) {
    for (n, (expected, found)) in expected.iter().zip(found).enumerate() {
        // Equality of floats is equality of bits here: no NaN, and a log-probability is never a negative zero alone.
        assert_eq!(expected.tokens, found.tokens, "{what}: request {n}");
        assert_eq!(expected.prompt_logprobs, found.prompt_logprobs, "{what}: prompt of request {n}");
    }
}

async fn all(scheduler: &Scheduler, requests: &[GenerateRequest]) -> Vec<Answer> {
    let answers = requests.iter().map(|request| generate(scheduler, request.clone()));
    futures::future::try_join_all(answers).await.unwrap()
}

/// Sizes of chunks from 1 to 512: both ends, and two that depend on the formats.
fn chunk_sizes(kv: KvFormat, weights: Option<WeightFormat>) -> [usize; 4] {
    let seed = format!("{kv:?} {weights:?}").bytes().fold(7usize, |seed, byte| seed * 31 % 65_521 + byte as usize);
    [1, 2 + seed % 62, 65 + seed % 446, 512]
}

/// Each of the sixteen requests alone; then all of them together nine times: for each of four sizes of chunks with a
/// cold and with a warm prefix cache, and once in a pool so small that sequences are preempted. 144 answers are compared
/// with their sixteen; with the five pairs of formats below, 720 with 80.
async fn check(kv: KvFormat, weights: Option<WeightFormat>) {
    let requests = requests();
    let config = Config { kv_blocks: Some(200), ..Config::default() };
    let alone = start(Config { prefix_cache: false, ..config.clone() }, kv, weights).await;
    let mut expected = Vec::new();
    for request in &requests {
        expected.push(generate(&alone, request.clone()).await.unwrap());
    }
    drop(alone);
    for chunk in chunk_sizes(kv, weights) {
        let batch = Config { max_running: 16, max_chunk: chunk, token_budget: chunk.max(16), ..config.clone() };
        let scheduler = start(batch, kv, weights).await;
        same(&expected, &all(&scheduler, &requests).await, &format!("batch, chunks of {chunk}"));
        let warm = all(&scheduler, &requests).await;
        same(&expected, &warm, &format!("warm, chunks of {chunk}"));
        assert!(warm.iter().any(|answer| answer.usage().cached_tokens > 0));
        until_idle(&scheduler).await;
    }
    let tiny = start(Config { kv_blocks: Some(9), ..config }, kv, weights).await;
    same(&expected, &all(&tiny, &requests).await, "tiny pool");
    assert!(tiny.snapshot().preemptions > 0, "nothing was preempted");
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_equal_to_the_bit_as_configured_by_default() {
    let LoadOptions { weights, kv, .. } = LoadOptions::default();
    assert_eq!((weights, kv), (None, KvFormat::Bf16));
    check(kv, weights).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_equal_to_the_bit_in_f32() {
    check(KvFormat::F32, Some(WeightFormat::F32)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_equal_to_the_bit_in_q8() {
    check(KvFormat::Bf16, Some(WeightFormat::Q8)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_equal_to_the_bit_in_q4() {
    check(KvFormat::Bf16, Some(WeightFormat::Q4 { group: 32 })).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_equal_to_the_bit_with_an_int8_cache() {
    check(KvFormat::Int8, Some(WeightFormat::Q8)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_model_writes_json_that_follows_a_schema() {
    let scheduler = start(Config { kv_blocks: Some(64), ..Config::default() }, KvFormat::F32, None).await;
    let tokenizer = tokenizer();
    let schema = r#"{"type":"object","properties":{"name":{"type":"string","maxLength":12},"n":{"enum":[1,2]}},
        "required":["name","n"],"additionalProperties":false}"#;
    for seed in 0..4 {
        let mut wanted = request(tokenizer.encode("A story as JSON: ", false).unwrap(), 300);
        wanted.stop.ignore_eos = false;
        wanted.sampling.seed = seed;
        wanted.grammar = Some(Grammar::JsonSchema(schema.into()));
        let answer = tokio::time::timeout(PATIENCE, generate(&scheduler, wanted)).await.unwrap().unwrap();
        let text = tokenizer.decode(&answer.ids(), true).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert!(value["name"].is_string() && value["n"].as_u64().unwrap() <= 2, "{value}");
    }
}
