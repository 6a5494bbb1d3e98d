//! `Replica`: what is asked and answered arrives whole and as it comes, errors keep all that they say, and what is
//! dropped is cancelled.
use super::player::Player;
use crate::{soon, until};
use futures::StreamExt;
use moesaic_types::boundary::{DeltaStream, Replica, ReplicaLoad};
use moesaic_types::{
    Delta, Error, ErrorCode, GenerateRequest, Grammar, Priority, RequestId, SampledToken, SamplingParams,
    StopConditions, TenantSalt,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Checks a way to reach replicas: `reach` is given one in this process and returns the one under test, which leads
/// there.
pub async fn replica<F: Future<Output = Arc<dyn Replica>>>(reach: impl Fn(Arc<dyn Replica>) -> F) {
    let player = Arc::new(Player::new());
    let replica = reach(player.clone()).await;
    requests_arrive_whole(&*replica, &player).await;
    answers_are_those_of_the_replica(&*replica, &player).await;
    tokens_come_when_they_are_made(&*replica, &player).await;
    errors_keep_what_they_say(&*replica, &player).await;
    a_stream_that_breaks_off_just_ends(&*replica, &player).await;
    what_is_dropped_is_cancelled(&*replica, &player).await;
    deadlines_hold(&*replica, &player).await;
    load_is_told(&*replica, &player).await;
    player.until_open(0).await;
}

/// A request with something in every field; `script` is what the player does with it.
fn request(script: &str) -> GenerateRequest {
    GenerateRequest {
        id: RequestId::new(script),
        prompt: vec![3, 1, 4, 1, 5].into(),
        resumed_tokens: 2,
        sampling: SamplingParams {
            temperature: 0.7,
            top_k: Some(40),
            top_p: 0.95,
            min_p: 0.05,
            repetition_penalty: 1.1,
            presence_penalty: 0.2,
            frequency_penalty: -0.3,
            logit_bias: BTreeMap::from([(7, -100.0), (9, 1.5)]),
            seed: u64::MAX,
        },
        stop: StopConditions { max_tokens: 6, min_tokens: 1, stop_token_ids: vec![2, 8], ignore_eos: true },
        top_logprobs: Some(2),
        prompt_logprobs: true,
        grammar: Some(Grammar::JsonSchema("{}".into())),
        priority: Priority(-4),
        deadline: None,
        salt: TenantSalt([7; 16]),
        traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
    }
}

async fn generate(replica: &dyn Replica, request: GenerateRequest) -> DeltaStream {
    soon("the request is accepted", replica.generate(request)).await.expect("it is accepted")
}

async fn next(stream: &mut DeltaStream) -> Option<Result<Delta, Error>> {
    soon("a piece", stream.next()).await
}

async fn all(mut stream: DeltaStream) -> Vec<Result<Delta, Error>> {
    let mut pieces = Vec::new();
    while let Some(piece) = next(&mut stream).await {
        pieces.push(piece);
    }
    pieces
}

/// All of a request but its deadline, which is told as the time that is left.
fn plain(request: &GenerateRequest) -> String {
    format!("{:?}", GenerateRequest { deadline: None, ..request.clone() })
}

async fn requests_arrive_whole(replica: &dyn Replica, player: &Player) {
    let deadline = Some(Instant::now() + Duration::from_secs(600));
    // over the 4 MiB that gRPC's libraries take by default
    let long = vec![u32::MAX; 1_200_000];
    let requests = [
        request("answer"),
        GenerateRequest { deadline, ..request("answer") },
        GenerateRequest { prompt: long.into(), ..request("answer") },
        GenerateRequest { top_logprobs: None, grammar: None, traceparent: None, ..request("answer") },
    ];
    for sent in requests {
        all(generate(replica, sent.clone()).await).await;
        let got = player.seen();
        assert_eq!(plain(&got), plain(&sent));
        assert_eq!(got.deadline.is_some(), sent.deadline.is_some());
        if let (Some(got), Some(sent)) = (got.deadline, sent.deadline) {
            let apart = got.max(sent) - got.min(sent);
            assert!(apart < Duration::from_secs(5), "the deadline is {apart:?} off");
        }
    }
}

async fn answers_are_those_of_the_replica(replica: &dyn Replica, player: &Player) {
    let long =
        GenerateRequest { stop: StopConditions { max_tokens: 5000, ..StopConditions::default() }, ..request("answer") };
    for asked in [request("answer"), GenerateRequest { prompt_logprobs: false, ..request("answer") }, long] {
        let expected = all(generate(player, asked.clone()).await).await;
        assert_eq!(expected.len(), asked.stop.max_tokens, "the player sends a piece for each token");
        assert_eq!(all(generate(replica, asked).await).await, expected);
    }
}

async fn tokens_come_when_they_are_made(replica: &dyn Replica, player: &Player) {
    let mut stream = generate(replica, request("step")).await;
    for step in 0..4 {
        player.allow_step();
        let piece = next(&mut stream).await.expect("it goes on").expect("no error");
        let ids: Vec<_> = piece.tokens.iter().map(|token: &SampledToken| token.id).collect();
        assert_eq!(ids, [step], "a token comes before the next one is made");
    }
}

async fn errors_keep_what_they_say(replica: &dyn Replica, player: &Player) {
    let codes = [
        ErrorCode::InvalidArgument,
        ErrorCode::Unauthenticated,
        ErrorCode::PermissionDenied,
        ErrorCode::NotFound,
        ErrorCode::PayloadTooLarge,
        ErrorCode::ResourceExhausted,
        ErrorCode::Cancelled,
        ErrorCode::DeadlineExceeded,
        ErrorCode::Unavailable,
        ErrorCode::Unimplemented,
        ErrorCode::Internal,
    ];
    let bare = codes.map(|code| Error::new(code, format!("it is {}", code.name())));
    let full = codes.map(|code| Error {
        field: Some("prompt".into()),
        retry_after: Some(Duration::from_millis(1234)),
        ..Error::new(code, "caf\u{e9}: 100% of \"it\"\n is full")
    });
    for error in bare.into_iter().chain(full) {
        player.fail_with(error.clone());
        let refused = soon("the refusal", replica.generate(request("refuse"))).await;
        assert_eq!(refused.err(), Some(error.clone()));
        let pieces = all(generate(replica, request("fail")).await).await;
        assert_eq!(pieces.len(), 3, "two tokens, then the error, then the end");
        assert!(pieces[..2].iter().all(Result::is_ok));
        assert_eq!(pieces[2], Err(error));
    }
}

async fn a_stream_that_breaks_off_just_ends(replica: &dyn Replica, player: &Player) {
    let pieces = all(generate(replica, request("break-off")).await).await;
    assert_eq!(pieces, all(generate(player, request("break-off")).await).await);
    assert!(pieces.len() == 2 && pieces.iter().all(|piece| piece.as_ref().is_ok_and(|delta| delta.finish.is_none())));
}

async fn what_is_dropped_is_cancelled(replica: &dyn Replica, player: &Player) {
    player.until_open(0).await;
    let mut hanging = generate(replica, request("hang")).await;
    next(&mut hanging).await.expect("a token comes").expect("no error");
    player.until_open(1).await;
    drop(hanging);
    player.until_open(0).await;
    let mut endless = generate(replica, request("endless")).await;
    next(&mut endless).await.expect("a token comes").expect("no error");
    player.until_open(1).await;
    drop(endless);
    player.until_open(0).await;
    {
        let mut silent = replica.generate(request("silent"));
        let reached = player.until_open(1);
        tokio::pin!(reached);
        tokio::select! {
            _ = &mut silent => panic!("it neither accepts nor refuses"),
            () = &mut reached => {}
        }
    }
    player.until_open(0).await;
}

async fn deadlines_hold(replica: &dyn Replica, player: &Player) {
    let soon_over = || Some(Instant::now() + Duration::from_millis(100));
    let pieces = all(generate(replica, GenerateRequest { deadline: soon_over(), ..request("until-deadline") }).await);
    let last = pieces.await.pop().expect("it says why it ended");
    assert_eq!(last.expect_err("it ends with an error").code, ErrorCode::DeadlineExceeded);
    player.until_open(0).await;
}

async fn load_is_told(replica: &dyn Replica, player: &Player) {
    let load =
        ReplicaLoad { running: 1, waiting: 2, kv_blocks_total: 3, kv_blocks_used: 4, max_context: 5, max_running: 6 };
    player.set_load(Ok(load.clone()));
    assert_eq!(soon("the load", replica.load()).await, Ok(load));
    let draining = Error::unavailable("it drains");
    player.set_load(Err(draining.clone()));
    assert_eq!(soon("the load", replica.load()).await, Err(draining));
    player.set_load(Ok(ReplicaLoad::default()));
    until("it is told anew each time", || async { replica.load().await == Ok(ReplicaLoad::default()) }).await;
}
