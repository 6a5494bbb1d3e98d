//! A request's tokens and log-probabilities depend on the request alone: not on the batch, the chunks, the cache,
//! preemption or migration.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use moesaic_scheduler::Config;
use moesaic_types::{GenerateRequest, Grammar, Priority, SamplingParams};
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::Ordering;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// One request; several share the start of their prompts.
fn arbitrary_request() -> impl Strategy<Value = GenerateRequest> {
    let shape = (0u64..3, 0usize..300, 1usize..200, 1usize..60, 0i32..3, any::<u64>());
    (shape, 0u8..6).prop_map(|((family, shared, own, max_tokens, priority, seed), kind)| {
        let mut tokens = prompt(family, shared);
        tokens.extend(prompt(seed, own));
        let mut request = request(tokens, max_tokens);
        request.priority = Priority(priority);
        request.sampling = SamplingParams { seed, temperature: 0.8, ..Default::default() };
        match kind {
            0 => request.sampling = SamplingParams::greedy(),
            1 => request.sampling.top_p = 0.7,
            2 => {
                request.sampling.repetition_penalty = 1.3;
                request.sampling.frequency_penalty = 0.4;
                request.sampling.top_k = Some(20);
            }
            3 => request.top_logprobs = Some(3),
            4 => request.prompt_logprobs = true,
            _ => {
                request.grammar = Some(Grammar::Regex("([a-z]{3,9} [0-9]+; )*".into()));
                request.stop.ignore_eos = false;
            }
        }
        request
    })
}

async fn alone(requests: &[GenerateRequest]) -> Vec<Answer> {
    let scheduler = start(Config { prefix_cache: false, ..config() }, &Arc::default()).await;
    let mut answers = Vec::new();
    for request in requests {
        answers.push(generate(&scheduler, request.clone()).await.unwrap());
    }
    answers
}

async fn together(config: Config, requests: &[GenerateRequest], rounds: usize) -> (Vec<Vec<Answer>>, u64) {
    let levers: Arc<Levers> = Arc::default();
    let scheduler = start(config, &levers).await;
    let mut all = Vec::new();
    for _ in 0..rounds {
        let answers = requests.iter().map(|request| generate(&scheduler, request.clone()));
        all.push(futures::future::try_join_all(answers).await.unwrap());
    }
    until_idle(&scheduler).await;
    assert!(levers.widest.load(Ordering::SeqCst) > 1, "nothing ran together");
    (all, scheduler.snapshot().preemptions)
}

fn same(expected: &[Answer], found: &[Answer], what: &str) {
    for (n, (expected, found)) in expected.iter().zip(found).enumerate() {
        assert_eq!(expected.tokens, found.tokens, "{what}: tokens of request {n}");
        assert_eq!(expected.prompt_logprobs, found.prompt_logprobs, "{what}: prompt of request {n}");
        assert_eq!(expected.finish.unwrap().0, found.finish.unwrap().0, "{what}: end of request {n}");
    }
}

// 12 cases of 16 requests: each alone, and in three batches.
proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..Default::default() })]
    #[test]
    fn answers_depend_on_the_request_alone(
        requests in prop::collection::vec(arbitrary_request(), 16),
        chunk in 1usize..512,
        spare in 0usize..4,
    ) {
        runtime().block_on(async {
            let expected = alone(&requests).await;
            let batch = Config { max_running: 16, token_budget: 16.max(chunk), max_chunk: chunk, ..config() };
            let (rounds, _) = together(batch.clone(), &requests, 2).await;
            same(&expected, &rounds[0], "cold cache");
            same(&expected, &rounds[1], "warm cache");
            // The largest request fits, with little else.
            let tiny = Config { kv_blocks: Some(10 + spare), ..batch };
            let (rounds, _) = together(tiny, &requests, 1).await;
            same(&expected, &rounds[0], "tiny pool");
        });
    }
}

#[test]
fn every_small_chunk_size_and_the_largest_give_the_same() {
    runtime().block_on(async {
        let requests: Vec<_> = (0..4).map(|n| request(prompt(n, 150 + 40 * n as usize), 20)).collect();
        let expected = alone(&requests).await;
        for chunk in (1..16).chain([63, 64, 65, 127, 128, 129, 511, 512]) {
            let config = Config { max_running: 4, token_budget: chunk.max(4), max_chunk: chunk, ..config() };
            same(&expected, &together(config, &requests, 1).await.0[0], &format!("chunks of {chunk}"));
        }
    });
}

#[test]
fn preempted_sequences_go_on_with_the_same_tokens() {
    runtime().block_on(async {
        let requests: Vec<_> = (0..8).map(|n| request(prompt(n, 60), 200)).collect();
        let expected = alone(&requests).await;
        for prefix_cache in [false, true] {
            let config = Config { kv_blocks: Some(9), prefix_cache, ..config() };
            let (rounds, preemptions) = together(config, &requests, 1).await;
            assert!(preemptions > 0, "nothing was preempted");
            same(&expected, &rounds[0], "preempted");
        }
    });
}

#[test]
fn a_migrated_request_goes_on_with_the_same_tokens() {
    runtime().block_on(async {
        let mut whole = request(prompt(5, 100), 50);
        whole.sampling.presence_penalty = 0.7;
        whole.grammar = Some(Grammar::Regex("[a-y ]*z".into()));
        let expected = &alone(&[whole.clone()]).await[0];
        let emitted = expected.ids()[..expected.tokens.len() / 2].to_vec();
        let mut rest = whole.clone();
        rest.prompt = whole.prompt.iter().copied().chain(emitted.iter().copied()).collect();
        rest.resumed_tokens = emitted.len();
        rest.stop.max_tokens -= emitted.len();
        let found = &alone(&[rest]).await[0];
        assert_eq!(expected.tokens[emitted.len()..], found.tokens);
        assert_eq!(expected.finish, found.finish, "the usage describes the whole answer");
    });
}
