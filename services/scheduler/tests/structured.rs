//! Structured output through the engine.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use moesaic_types::boundary::Replica;
use moesaic_types::{ErrorCode, FinishReason, Grammar};
use std::sync::Arc;
use std::time::{Duration, Instant};

fn text(answer: &Answer) -> String {
    let bytes = answer.ids().into_iter().filter(|&id| id < 256).map(|id| id as u8).collect();
    String::from_utf8(bytes).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_follow_their_grammar_and_stop_at_its_end() {
    let scheduler = start(config(), &Arc::default()).await;
    let schema = r#"{"type":"object","properties":{"n":{"type":"integer","minimum":0,"maximum":999},
        "ok":{"type":"boolean"}},"required":["n","ok"],"additionalProperties":false}"#;
    for seed in 0..12 {
        let mut wanted = request(prompt(seed, 20), 400);
        wanted.sampling.seed = seed;
        wanted.grammar = Some(Grammar::JsonSchema(schema.into()));
        let answer = generate(&scheduler, wanted.clone()).await.unwrap();
        assert_eq!(answer.finish.unwrap().0, FinishReason::Stop);
        let value: serde_json::Value = serde_json::from_str(&text(&answer)).unwrap();
        assert!(value["n"].as_u64().unwrap() <= 999 && value["ok"].is_boolean(), "{value}");
        wanted.grammar = Some(Grammar::Regex("(yes|no|maybe[0-9]{2})".into()));
        let answer = generate(&scheduler, wanted.clone()).await.unwrap();
        assert_eq!(answer.finish.unwrap().0, FinishReason::Stop);
        let answer = text(&answer);
        assert!(answer == "yes" || answer == "no" || (answer.len() == 7 && answer.starts_with("maybe")), "{answer}");
        wanted.grammar = Some(Grammar::Lark("start: \"<\" /[ab]{2,4}/ \">\"".into()));
        let answer = text(&generate(&scheduler, wanted).await.unwrap());
        assert!(answer.starts_with('<') && answer.ends_with('>'), "{answer}");
    }
    until_idle(&scheduler).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mode_for_any_json_object_gives_objects() {
    let scheduler = start(config(), &Arc::default()).await;
    let mut longest = 0;
    for seed in 0..12 {
        let mut wanted = request(prompt(seed, 20), 600);
        wanted.sampling.seed = seed;
        // Random text would never close what it opens.
        wanted.sampling.logit_bias = [(u32::from(b'"'), 5.0), (u32::from(b'}'), 4.0), (u32::from(b']'), 4.0)].into();
        wanted.grammar = Some(Grammar::JsonObject);
        let answer = generate(&scheduler, wanted).await.unwrap();
        assert_eq!(answer.finish.unwrap().0, FinishReason::Stop);
        let value: serde_json::Value = serde_json::from_str(&text(&answer)).unwrap();
        longest = longest.max(value.as_object().unwrap().len());
    }
    assert!(longest > 0, "only empty objects");
    until_idle(&scheduler).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_grammars_are_refused_and_leave_the_server_serving() {
    let scheduler = start(config(), &Arc::default()).await;
    let deep: Arc<str> = format!("{}1{}", "[".repeat(4000), "]".repeat(4000)).into();
    for (grammar, field) in [
        (Grammar::JsonSchema("nonsense".into()), "response_format"),
        (Grammar::JsonSchema(deep), "response_format"),
        (Grammar::Regex("[".into()), "regex"),
        (Grammar::Lark("start: (".into()), "grammar"),
        (Grammar::Lark("x".repeat(100_000).into()), "grammar"),
        (Grammar::Regex(r"[^\s\S]".into()), "regex"),
        (Grammar::JsonSchema(r##"{"$ref":"#"}"##.into()), "response_format"),
    ] {
        let mut wanted = request(prompt(1, 5), 5);
        wanted.grammar = Some(grammar);
        let error = generate(&scheduler, wanted).await.unwrap_err();
        assert_eq!((error.code, error.field.as_deref()), (ErrorCode::InvalidArgument, Some(field)), "{error}");
    }
    assert_eq!(scheduler.in_flight(), 0);
    let mut huge = request(prompt(1, 5), 5);
    huge.grammar = Some(Grammar::Regex("(a{1000}){1000}{1000}".into()));
    assert_eq!(text(&generate(&scheduler, huge).await.unwrap()), "aaaaa");
    assert_eq!(generate(&scheduler, request(prompt(1, 5), 5)).await.unwrap().tokens.len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_holds_while_a_grammar_is_compiled() {
    let scheduler = start(config(), &Arc::default()).await;
    let words: Vec<String> = (0..3000u64).map(|n| format!("{:x}", n.wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect();
    let mut wanted = request(prompt(1, 5), 5);
    wanted.grammar = Some(Grammar::JsonSchema(serde_json::json!({ "enum": words }).to_string().into()));
    wanted.deadline = Some(Instant::now() + Duration::from_millis(2));
    let error = scheduler.generate(wanted).await.err().expect("refused before it is queued");
    assert_eq!(error.code, ErrorCode::DeadlineExceeded, "{error}");
}
