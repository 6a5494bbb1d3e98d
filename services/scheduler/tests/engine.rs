//! The engine's behaviour at its edges: cancellation, deadlines, priorities, full queues, slow readers, failures.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use futures::StreamExt;
use moesaic_scheduler::config::Batching;
use moesaic_scheduler::{Config, Scheduler};
use moesaic_types::boundary::Replica;
use moesaic_types::{ErrorCode, FinishReason, Grammar, Priority, StopConditions, TenantSalt};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_requests_give_their_blocks_back() {
    let levers = Arc::default();
    let scheduler = start(Config { prefix_cache: false, ..config() }, &levers).await;
    let mut streams = Vec::new();
    for n in 0..20 {
        let mut stream = scheduler.generate(request(prompt(n, 100), 1500)).await.unwrap();
        if n % 2 == 0 {
            stream.next().await.unwrap().unwrap();
        }
        streams.push(stream);
    }
    assert_eq!(scheduler.in_flight(), 20);
    drop(streams);
    until_idle(&scheduler).await;
    assert_eq!(scheduler.in_flight(), 0);
    assert_eq!(scheduler.snapshot().kv_blocks_free, 256);
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_end_running_and_waiting_requests() {
    let levers: Arc<Levers> = Arc::default();
    let scheduler = start(Config { max_running: 1, ..config() }, &levers).await;
    levers.hold();
    let first = scheduler.generate(request(prompt(0, 10), 1000)).await.unwrap();
    levers.held().await;
    let soon = || Some(Instant::now() + Duration::from_millis(20));
    let mut waiting = request(prompt(1, 10), 10);
    waiting.deadline = soon();
    let deadline = waiting.deadline.unwrap();
    let waiting = scheduler.generate(waiting).await.unwrap();
    tokio::time::sleep_until(deadline.into()).await;
    levers.release();
    assert_eq!(read(waiting).await.unwrap_err().code, ErrorCode::DeadlineExceeded);
    drop(first);
    levers.hold();
    let mut running = request(prompt(2, 10), 2000);
    running.deadline = soon();
    let deadline = running.deadline.unwrap();
    let running = scheduler.generate(running).await.unwrap();
    levers.held().await;
    tokio::time::sleep_until(deadline.into()).await;
    levers.release();
    let error = read(running).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::DeadlineExceeded, "{error}");
    let mut late = request(prompt(3, 10), 5);
    late.deadline = Some(Instant::now());
    assert_eq!(generate(&scheduler, late).await.unwrap_err().code, ErrorCode::DeadlineExceeded);
    until_idle(&scheduler).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn higher_priority_runs_first_and_equals_in_order() {
    let levers: Arc<Levers> = Arc::default();
    let scheduler = start(Config { max_running: 1, ..config() }, &levers).await;
    levers.hold();
    let blocker = scheduler.generate(request([99, 7], 1)).await.unwrap();
    levers.held().await;
    let mut streams = Vec::new();
    for (n, priority) in [0, 0, 9, -1, 9].into_iter().enumerate() {
        let mut request = request([n as u32 + 1, 7, 7], 3);
        request.priority = Priority(priority);
        streams.push(scheduler.generate(request).await.unwrap());
    }
    levers.release();
    read(blocker).await.unwrap();
    for stream in streams {
        read(stream).await.unwrap();
    }
    assert_eq!(*levers.starts.lock().unwrap(), [99, 3, 5, 1, 2, 4], "first tokens, in the order of service");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_joins_a_static_batch() {
    for (batching, steps) in [(Batching::Static, 5 + 6 + 3), (Batching::Continuous, 4 + 6)] {
        let levers: Arc<Levers> = Arc::default();
        let scheduler = start(Config { max_running: 2, batching, ..config() }, &levers).await;
        levers.hold();
        let first = scheduler.generate(request([99, 7], 5)).await.unwrap();
        levers.held().await;
        let mut streams = vec![first];
        for (token, length) in [(1, 3), (2, 6), (3, 3)] {
            streams.push(scheduler.generate(request([token, 7], length)).await.unwrap());
        }
        levers.release();
        for stream in streams {
            read(stream).await.unwrap();
        }
        assert_eq!(levers.steps.load(Ordering::SeqCst), steps, "{batching:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_and_serves_again_afterwards() {
    let levers: Arc<Levers> = Arc::default();
    let scheduler = start(Config { max_running: 1, max_waiting: 2, ..config() }, &levers).await;
    levers.hold();
    let running = scheduler.generate(request(prompt(0, 5), 2)).await.unwrap();
    levers.held().await;
    let waiting = [
        scheduler.generate(request(prompt(1, 5), 2)).await.unwrap(),
        scheduler.generate(request(prompt(2, 5), 2)).await.unwrap(),
    ];
    let error = scheduler.generate(request(prompt(3, 5), 2)).await.err().unwrap();
    assert_eq!(error.code, ErrorCode::ResourceExhausted);
    assert!(error.message.contains('2') && error.retry_after.is_some(), "{error:?}");
    levers.release();
    for stream in waiting.into_iter().chain([running]) {
        assert_eq!(read(stream).await.unwrap().tokens.len(), 2);
    }
    assert_eq!(generate(&scheduler, request(prompt(3, 5), 2)).await.unwrap().tokens.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_loses_nothing_and_stops_nobody() {
    let levers = Arc::default();
    let scheduler = start(Config { delivery_capacity: 1, ..config() }, &levers).await;
    let slow = request(prompt(1, 20), 300);
    let expected = generate(&scheduler, slow.clone()).await.unwrap();
    let unread = scheduler.generate(slow).await.unwrap();
    for n in 0..5 {
        generate(&scheduler, request(prompt(n + 2, 20), 100)).await.unwrap();
    }
    until_idle(&scheduler).await;
    moesaic_testkit::until("only the unread answer is left", || async { scheduler.in_flight() == 1 }).await;
    assert!(!scheduler.drain(Instant::now() + Duration::from_millis(10)).await);
    let found = read(unread).await.unwrap();
    assert_eq!(expected.tokens, found.tokens);
    assert!(scheduler.drain(Instant::now() + PATIENCE).await);
    let refused = scheduler.generate(request(prompt(1, 5), 1)).await.err().unwrap();
    assert_eq!(refused.code, ErrorCode::Unavailable);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_panics_comes_back_with_fresh_state() {
    let levers: Arc<Levers> = Arc::default();
    let scheduler = start(config(), &levers).await;
    let wanted = request(prompt(1, 200), 20);
    let expected = generate(&scheduler, wanted.clone()).await.unwrap();
    until(&scheduler, |s| s.kv_blocks_cached > 0).await;
    levers.hold();
    let streams = futures::future::try_join_all((0..3).map(|n| scheduler.generate(request(prompt(n, 9), 50)))).await;
    levers.held().await;
    scheduler.panic_engine();
    levers.release();
    for stream in streams.unwrap() {
        let error = read(stream).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Unavailable);
        assert!(error.message.contains("restarted"), "{error}");
    }
    until(&scheduler, |s| s.ready && s.restarts == 1 && s.kv_blocks_used == 0).await;
    assert_eq!(levers.built.load(Ordering::SeqCst), 2);
    assert_eq!(scheduler.snapshot().kv_blocks_cached, 0, "the cache is empty");
    let again = generate(&scheduler, wanted.clone()).await.unwrap();
    assert_eq!((expected.tokens, again.usage().cached_tokens), (again.tokens.clone(), 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_actor_that_panics_comes_back_with_an_engine() {
    let levers: Arc<Levers> = Arc::default();
    let scheduler = start(config(), &levers).await;
    levers.hold();
    let stream = scheduler.generate(request(prompt(1, 9), 500)).await.unwrap();
    levers.held().await;
    scheduler.panic_control().await;
    levers.release();
    let error = read(stream).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
    assert_eq!(scheduler.control_restarts(), 1);
    let deadline = Instant::now() + PATIENCE;
    let answer = loop {
        match generate(&scheduler, request(prompt(1, 9), 5)).await {
            Ok(answer) => break answer,
            Err(error) => assert!(error.code == ErrorCode::Unavailable && Instant::now() < deadline, "{error}"),
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(answer.tokens.len(), 5);
    assert_eq!(levers.built.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_step_fails_its_requests_only() {
    let levers: Arc<Levers> = Arc::default();
    let scheduler = start(config(), &levers).await;
    let wanted = request(prompt(1, 200), 20);
    let expected = generate(&scheduler, wanted.clone()).await.unwrap();
    levers.fail.store(1, Ordering::SeqCst);
    let error = generate(&scheduler, request(prompt(2, 200), 5)).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Internal);
    assert!(error.message.contains("told to fail"), "{error}");
    levers.nan.store(1, Ordering::SeqCst);
    let error = generate(&scheduler, request(prompt(3, 200), 5)).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Internal, "{error}");
    assert_eq!(generate(&scheduler, wanted).await.unwrap().tokens, expected.tokens);
    until_idle(&scheduler).await;
    assert_eq!(levers.built.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_cannot_be_loaded_is_an_error() {
    let factory: moesaic_scheduler::RunnerFactory = Arc::new(|| Err(moesaic_model::Error::Text("no such file".into())));
    let error = Scheduler::start(config(), factory, vocabulary(), hasher(), None, None).await.err().unwrap();
    assert!(error.message.contains("no such file"), "{error}");
    let bad = Config { token_budget: 1, ..config() };
    let error = Scheduler::start(bad, common::factory(&Arc::default()), vocabulary(), hasher(), None, None).await;
    assert_eq!(error.err().unwrap().field.as_deref(), Some("token_budget"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_prefix_cache_serves_blocks_within_a_tenant() {
    let levers: Arc<Levers> = Arc::default();
    let scheduler = start(config(), &levers).await;
    let wanted = request(prompt(1, 256), 70);
    let first = generate(&scheduler, wanted.clone()).await.unwrap();
    assert_eq!(first.usage().cached_tokens, 0);
    let before = levers.computed.load(Ordering::SeqCst);
    let second = generate(&scheduler, wanted.clone()).await.unwrap();
    assert_eq!((second.usage().cached_tokens, &second.tokens), (192, &first.tokens), "never the last token's block");
    assert_eq!(levers.computed.load(Ordering::SeqCst) - before, 64 + 69);
    // The answer's blocks are cached too.
    let mut next = wanted.clone();
    next.prompt = wanted.prompt.iter().copied().chain(first.ids()).chain([1, 2, 3]).collect();
    assert_eq!(generate(&scheduler, next).await.unwrap().usage().cached_tokens, 320);
    let mut other = wanted.clone();
    other.salt = TenantSalt::derive(b"s", "other");
    assert_eq!(generate(&scheduler, other).await.unwrap().usage().cached_tokens, 0);
    let mut logprobs = wanted;
    logprobs.prompt_logprobs = true;
    let logprobs = generate(&scheduler, logprobs).await.unwrap();
    assert_eq!((logprobs.usage().cached_tokens, logprobs.prompt_logprobs.unwrap().len()), (0, 255));
}

#[tokio::test(flavor = "multi_thread")]
async fn sequences_end_where_they_should() {
    let scheduler = start(config(), &Arc::default()).await;
    let base = request(prompt(7, 30), 40);
    let ids = generate(&scheduler, base.clone()).await.unwrap().ids();
    let mut stopped = base.clone();
    stopped.stop.stop_token_ids = vec![ids[20]];
    let first = ids.iter().position(|id| *id == ids[20]).unwrap();
    let answer = generate(&scheduler, stopped.clone()).await.unwrap();
    assert_eq!((answer.ids(), answer.finish.unwrap().0), (ids[..=first].to_vec(), FinishReason::Stop));
    stopped.stop.min_tokens = first + 2;
    assert!(generate(&scheduler, stopped).await.unwrap().tokens.len() > first + 1);
    let mut ended = base.clone();
    ended.sampling.logit_bias.insert(EOS, 100.0);
    assert_eq!(generate(&scheduler, ended.clone()).await.unwrap().tokens.len(), 40, "ignore_eos");
    ended.stop.ignore_eos = false;
    let answer = generate(&scheduler, ended).await.unwrap();
    assert_eq!((answer.ids(), answer.finish.unwrap().0), (vec![EOS], FinishReason::Stop));
    let long = generate(&scheduler, request(prompt(8, CONTEXT - 3), 50)).await.unwrap();
    assert_eq!((long.tokens.len(), long.finish.unwrap().0), (3, FinishReason::Length));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_ends_an_answer_before_min_tokens() {
    let scheduler = start(config(), &Arc::default()).await;
    let mut eager = request(prompt(7, 30), 40);
    eager.stop = StopConditions { min_tokens: 6, stop_token_ids: vec![65], ignore_eos: false, ..eager.stop };
    eager.sampling.logit_bias = [(EOS, 100.0), (65, 60.0)].into();
    for (stop, end) in [(EOS, vec![EOS]), (65, vec![65])] {
        if stop == 65 {
            eager.sampling.logit_bias.remove(&EOS);
        }
        let ids = generate(&scheduler, eager.clone()).await.unwrap().ids();
        assert_eq!((ids.len(), &ids[6..]), (7, &end[..]), "{ids:?}");
        assert!(ids[..6].iter().all(|id| *id != EOS && *id != 65), "{ids:?}");
    }
    // Another replica goes on after two tokens: it is asked for the rest of the minimum.
    let ids = generate(&scheduler, eager.clone()).await.unwrap().ids();
    let mut rest = eager.clone();
    rest.prompt = eager.prompt.iter().chain(&ids[..2]).copied().collect();
    rest.resumed_tokens = 2;
    rest.stop.min_tokens -= 2;
    assert_eq!(generate(&scheduler, rest).await.unwrap().ids(), ids[2..]);
    // A grammar that allows the end everywhere, and one that is complete earlier.
    eager.grammar = Some(Grammar::Regex("[a-d]*".into()));
    eager.sampling.logit_bias = [(EOS, 100.0)].into();
    let answer = generate(&scheduler, eager.clone()).await.unwrap();
    assert_eq!((answer.tokens.len(), answer.ids()[6]), (7, EOS), "{answer:?}");
    eager.grammar = Some(Grammar::Regex("[a-d]{3}".into()));
    let answer = generate(&scheduler, eager).await.unwrap();
    assert_eq!((answer.tokens.len(), answer.finish.unwrap().0), (3, FinishReason::Stop), "the grammar's end");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_led_to_unusable_logits_is_shared_with_nobody() {
    let levers: Arc<Levers> = Arc::default();
    let scheduler = start(Config { max_chunk: 100, ..config() }, &levers).await;
    let healthy = request(prompt(2, 150), 40);
    let expected = generate(&scheduler, healthy.clone()).await.unwrap();
    let wanted = request(prompt(1, 300), 30);
    // The first chunk, which asks for no logits, spoils its keys and values.
    levers.poison.store(1, Ordering::SeqCst);
    levers.hold();
    let poisoned = scheduler.generate(wanted.clone()).await.unwrap();
    levers.held().await;
    let other = scheduler.generate(healthy).await.unwrap();
    levers.release();
    let error = read(poisoned).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Internal);
    assert!(error.message.contains("position 299") && error.message.contains("NaN"), "{error}");
    assert_eq!(read(other).await.unwrap().tokens, expected.tokens, "others in the batch are untouched");
    let again = generate(&scheduler, wanted.clone()).await.unwrap();
    let clean = start(config(), &Arc::default()).await;
    let clean = generate(&clean, wanted).await.unwrap();
    assert_eq!((again.usage().cached_tokens, again.tokens), (0, clean.tokens));
    until_idle(&scheduler).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn impossible_requests_name_the_field_and_the_limit() {
    let scheduler = start(Config { kv_blocks: Some(4), ..config() }, &Arc::default()).await;
    let with = |change: &dyn Fn(&mut moesaic_types::GenerateRequest)| {
        let mut request = request(prompt(1, 10), 5);
        change(&mut request);
        request
    };
    let cases = [
        ("prompt", with(&|r| r.prompt = [].into())),
        ("prompt", with(&|r| r.prompt = [9999].into())),
        ("prompt", with(&|r| r.prompt = prompt(1, CONTEXT).into())),
        ("prompt", with(&|r| r.prompt = prompt(1, 300).into())),
        ("max_tokens", with(&|r| r.stop.max_tokens = 300)),
        ("max_tokens", with(&|r| r.stop.max_tokens = 0)),
        ("temperature", with(&|r| r.sampling.temperature = f32::NAN)),
        ("temperature", with(&|r| r.sampling.temperature = -1.0)),
        ("top_p", with(&|r| r.sampling.top_p = 0.0)),
        ("top_k", with(&|r| r.sampling.top_k = Some(0))),
        ("min_p", with(&|r| r.sampling.min_p = 1.0)),
        ("repetition_penalty", with(&|r| r.sampling.repetition_penalty = 0.0)),
        ("presence_penalty", with(&|r| r.sampling.presence_penalty = 3.0)),
        ("logit_bias", with(&|r| r.sampling.logit_bias = [(1, f32::INFINITY)].into())),
        ("logit_bias", with(&|r| r.sampling.logit_bias = [(9999, 1.0)].into())),
        ("top_logprobs", with(&|r| r.top_logprobs = Some(21))),
        ("resumed_tokens", with(&|r| r.resumed_tokens = 10)),
    ];
    for (field, request) in cases {
        let error = scheduler.generate(request).await.err().unwrap_or_else(|| panic!("{field} was accepted"));
        assert_eq!((error.code, error.field.as_deref()), (ErrorCode::InvalidArgument, Some(field)), "{error}");
    }
    let too_long = [with(&|r| r.prompt = prompt(1, 256).into()), with(&|r| r.stop.max_tokens = 247)];
    for request in too_long {
        let error = scheduler.generate(request).await.err().unwrap();
        assert!(error.message.contains("KV pool of 4 blocks, 256 tokens"), "{error}");
    }
    // The router and the gateway see the lower limit.
    until(&scheduler, |s| s.max_context == 256).await;
    assert_eq!(scheduler.in_flight(), 0);
    let fits = generate(&scheduler, with(&|r| r.stop.max_tokens = 246)).await.unwrap();
    assert_eq!(fits.tokens.len(), 246);
    assert_eq!(generate(&scheduler, request(prompt(1, 100), 100)).await.unwrap().tokens.len(), 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_clients_that_come_and_go_leave_nothing_behind() {
    let scheduler = start(Config { kv_blocks: Some(40), delivery_capacity: 2, ..config() }, &Arc::default()).await;
    let clients = (0..64u64).map(|client| {
        let scheduler = Arc::clone(&scheduler);
        tokio::spawn(async move {
            for n in 0..12 {
                let draw = client * 31 + n * 17;
                let tokens = prompt(draw % 5, 20 + (draw % 150) as usize);
                let mut stream = scheduler.generate(request(tokens, 1 + (draw % 90) as usize)).await.unwrap();
                // A third reads to the end; the others leave after some pieces.
                let pieces = if draw % 3 == 0 { usize::MAX } else { (draw % 7) as usize };
                let mut read = 0;
                while read < pieces {
                    match tokio::time::timeout(PATIENCE, stream.next()).await.expect("a piece in time") {
                        Some(delta) => drop(delta.unwrap()),
                        None => break,
                    }
                    read += 1;
                }
            }
        })
    });
    for client in futures::future::join_all(clients.collect::<Vec<_>>()).await {
        client.unwrap();
    }
    until_idle(&scheduler).await;
    assert!(scheduler.drain(Instant::now() + PATIENCE).await);
    let end = scheduler.snapshot();
    assert_eq!((end.kv_blocks_free + end.kv_blocks_cached, end.restarts), (40, 0));
    assert!(end.preemptions > 0, "the pool was never short");
}
