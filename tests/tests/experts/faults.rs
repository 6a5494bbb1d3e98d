//! Shards that hang, lag behind, leave or come back, and messages that are too long.
use crate::cluster::{Cluster, Grid, on_a_thread};
use crate::{Case, F32, cases, golden, run, worst};
use moesaic_model::Runner;
use moesaic_model::backend::TensorSlice;
use moesaic_model::backend::native::NativeBackend;
use moesaic_model::decoder::Decoder;
use moesaic_testkit::{soon, until};
use moesaic_transport::ExpertsOptions;
use moesaic_types::Routing;
use std::sync::Arc;
use std::time::{Duration, Instant};

const NAME: &str = "qwen3_moe";
const SILENCE: Duration = Duration::from_millis(600);

fn options() -> ExpertsOptions {
    ExpertsOptions { silence: SILENCE, ..ExpertsOptions::default() }
}

async fn two_groups(place: impl Fn(usize) -> Vec<usize>) -> Cluster {
    let cluster = Cluster::start(&golden(NAME), F32, Grid { groups: 2, ranks: 1 }, place).await;
    cluster.shards.iter().for_each(|shard| shard.switch(1));
    cluster
}

fn case() -> (Case, f32) {
    let (cases, tolerance) = cases(NAME);
    (cases.into_iter().next().unwrap(), tolerance)
}

/// Runs the reference's first prompt and checks its logits.
async fn check(mut model: Decoder<NativeBackend>, size: usize) -> Decoder<NativeBackend> {
    on_a_thread(move || {
        let ((prompt, expected), tolerance) = case();
        model.allocate_kv(4).unwrap();
        let logits = run(&mut model, &prompt, size.min(prompt.len())).unwrap();
        let worst = worst(&logits[logits.len() - expected.len()..], &expected);
        assert!(worst <= tolerance, "logits differ by {worst}");
        model
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_whose_thread_hangs_is_passed_over_and_taken_back() {
    let cluster = two_groups(|_| vec![0, 1]).await;
    let experts = cluster.experts(options()).await;
    let model = check(cluster.decoder(experts.clone()), usize::MAX).await;
    let counted = async || (cluster.shards[0].counted().await, cluster.shards[1].counted().await);
    let (mut model, deadline) = (model, Instant::now() + Duration::from_secs(60));
    while [counted().await.0, counted().await.1].contains(&0) {
        assert!(Instant::now() < deadline, "both are asked");
        model = many_tokens(model).await;
    }
    let before = counted().await;
    let model = many_tokens(model).await;
    let after = counted().await;
    let once = (after.0 - before.0, after.1 - before.1);
    assert!(once.0 > 0 && once.1 > 0, "both compute: {once:?}");
    let hang = cluster.shards[0].hang().await;
    // the stream was open, and the server answers: only the silence tells; it hangs all the time
    let model = many_tokens(model).await;
    experts.ready().unwrap();
    let later = counted().await;
    assert_eq!(later.0, after.0, "it hangs");
    let (all, of_other) = (once.0 + once.1, later.1 - after.1);
    assert!(of_other > once.1 && of_other <= all, "a layer that is sent again is counted twice: {of_other} of {all}");
    let mut model = check(model, usize::MAX).await;
    drop(hang);
    let deadline = Instant::now() + Duration::from_secs(60);
    while counted().await.0 == after.0 {
        assert!(Instant::now() < deadline, "it is not asked again");
        model = check(model, usize::MAX).await;
    }
}

/// Runs so many tokens that each layer has some for every group.
async fn many_tokens(mut model: Decoder<NativeBackend>) -> Decoder<NativeBackend> {
    on_a_thread(move || {
        let prompt: Vec<u32> = (1..=40).collect();
        run(&mut model, &prompt, prompt.len()).unwrap();
        model
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_names_a_shard_that_hangs_also_while_nothing_is_asked() {
    let cluster = two_groups(|expert| vec![expert % 2]).await;
    let experts = cluster.experts(options()).await;
    let hang = cluster.shards[1].hang().await;
    until("it is noticed", || async { experts.ready().is_err() }).await;
    let reason = || experts.ready().unwrap_err().message;
    until("it says why", || async { reason().contains("neither computed nor answered for 0.6 s") }).await;
    assert!(reason().contains("shard-1-0"), "{}", reason());
    let itself = &cluster.shards[1].served;
    until("it says so itself", || async { itself.ready().is_err() }).await;
    itself.live().unwrap();
    cluster.shards[0].served.ready().unwrap();
    drop(hang);
    until("it is back", || async { experts.ready().is_ok() }).await;
    itself.ready().unwrap();
    check(cluster.decoder(experts), 7).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_has_much_to_do_is_waited_for() {
    let cluster = two_groups(|expert| vec![expert % 2]).await;
    let patient = ExpertsOptions { silence: 2 * SILENCE, ..options() };
    let experts = cluster.experts(patient.clone()).await;
    let mut model = cluster.decoder(experts.clone());
    let (shard, caller) = (&cluster.shards[0], Arc::new(()));
    let mut tokens = 50_000;
    loop {
        let (told, outcome) = tokio::sync::oneshot::channel();
        let job = shard.job(tokens, &caller, move |outcome| drop(told.send(outcome)));
        shard.executor.submit(job).await.unwrap();
        // its layers are behind that job
        model = check(model, usize::MAX).await;
        experts.ready().unwrap();
        let outcome = soon("it is computed", outcome).await.unwrap();
        assert!(outcome.output.is_ok(), "{:?}", outcome.output);
        if outcome.computed > 2 * patient.silence {
            return;
        }
        tokens *= 2;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_waits_for_is_not_computed() {
    let mut cluster = two_groups(|_| vec![0]).await;
    let experts = cluster.experts(ExpertsOptions::default()).await;
    let hang = cluster.shards[0].hang().await;
    let (layer, hidden) = (cluster.model.moe_layers().next().unwrap(), cluster.model.hidden);
    let mut routing = Routing::new();
    routing.push([(0, 1.0)]);
    let sent = Arc::clone(&experts);
    let dispatched = on_a_thread(move || sent.dispatch(layer, vec![0.5; hidden], hidden, &routing)).await;
    let served = Arc::clone(&cluster.shards[0].served);
    let is_idle = || served.idle_by(Instant::now());
    until("the job is in the shard's queue", || async { !is_idle().await }).await;
    cluster.shards[0].cut_off().await;
    drop((hang, dispatched));
    until("the job is dropped", || async { is_idle().await }).await;
    assert_eq!(cluster.shards[0].counted().await, 0, "it was computed for nobody");
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_above_the_limit_are_cut_and_give_the_same_bits() {
    let grid = Grid { groups: 2, ranks: 2 };
    let cluster = Cluster::start(&golden(NAME), F32, grid, |expert| vec![expert % 2]).await;
    let limit = 5 * cluster.model.hidden * size_of::<f32>();
    let small = ExpertsOptions { max_message: limit, ..ExpertsOptions::default() };
    let models = [
        cluster.decoder(cluster.experts(ExpertsOptions::default()).await),
        cluster.decoder(cluster.experts(small).await),
    ];
    on_a_thread(move || {
        let prompt: Vec<u32> = (1..=40).collect();
        let [whole, cut] = models.map(|mut model| {
            model.allocate_kv(4).unwrap();
            run(&mut model, &prompt, prompt.len()).unwrap()
        });
        assert!(whole == cut, "the limit of a message changes bits");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_follows_a_later_placement_has_it_read_at_once() {
    let cluster = two_groups(|expert| vec![expert % 2]).await;
    let model = cluster.decoder(cluster.experts(ExpertsOptions::default()).await);
    let model = check(model, usize::MAX).await;
    let placement = cluster.prepare(2, 2, |expert| vec![(expert + 1) % 2]);
    cluster.shards.iter().for_each(|shard| shard.switch(2));
    let running = check(model, usize::MAX);
    let following = async {
        soon("it is told", cluster.outdated.notified()).await;
        cluster.publish(placement);
    };
    tokio::join!(running, following);
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_of_different_ranks_compute_one_layer() {
    let cluster = Cluster::start_uneven(&golden(NAME), F32, &[2, 1, 4], |expert| vec![expert % 3]).await;
    let model = cluster.decoder(cluster.experts(ExpertsOptions::default()).await);
    check(model, 5).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ranks_of_one_group_that_do_not_agree_are_named() {
    let mut cluster = two_groups(|expert| vec![expert % 2]).await;
    let experts = cluster.experts(ExpertsOptions::default()).await;
    let strange = cluster.shard(1, TensorSlice { rank: 1, ranks: 3 }).await;
    cluster.shards.push(strange);
    until("they do not agree", || async { experts.ready().is_err() }).await;
    let error = experts.ready().unwrap_err();
    assert!(error.message.contains("group 1") && error.message.contains("expert_shard.ranks"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_that_all_die_while_nothing_is_asked_and_come_back_are_used_again() {
    let mut cluster = two_groups(|expert| vec![expert % 2]).await;
    let experts = cluster.experts(options()).await;
    let model = check(cluster.decoder(experts.clone()), usize::MAX).await;
    cluster.shards.iter_mut().for_each(|shard| shard.kill());
    until("the loss is noticed", || async { experts.ready().is_err() }).await;
    cluster.shards.clear();
    for group in 0..2 {
        let shard = cluster.shard(group, TensorSlice::WHOLE).await;
        cluster.shards.push(shard);
    }
    // what the router that leads does with shards that came back empty
    cluster.place(2, 2, |expert| vec![expert % 2]);
    until("they are back", || async { experts.ready().is_ok() }).await;
    check(model, usize::MAX).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_of_several_schedulers_that_wait_for_one_layer_are_computed_together() {
    moesaic_telemetry::metrics::install().unwrap();
    let cluster = two_groups(|expert| vec![expert % 2]).await;
    let shard = &cluster.shards[0];
    let batches = || {
        let value = |suffix: &str| {
            let name = format!("{}_{suffix} ", moesaic_telemetry::metrics::EXPERT_BATCH_TOKENS);
            let text = moesaic_telemetry::metrics::render();
            text.lines().find_map(|line| line.strip_prefix(&name)?.parse::<f64>().ok()).unwrap_or(0.0)
        };
        [value("count"), value("sum")]
    };
    let hang = shard.hang().await;
    let before = batches();
    let schedulers = [Arc::new(()), Arc::new(())];
    let mut outcomes = Vec::new();
    for (caller, tokens) in schedulers.iter().zip([3, 5]) {
        let (told, outcome) = tokio::sync::oneshot::channel();
        let job = shard.job(tokens, caller, move |outcome| drop(told.send(outcome)));
        shard.executor.submit(job).await.unwrap();
        outcomes.push((tokens, outcome));
    }
    drop(hang);
    for (tokens, outcome) in outcomes {
        let output = soon("it is computed", outcome).await.unwrap().output.unwrap();
        assert_eq!(output.len(), tokens * shard.shard.hidden());
    }
    let after = batches();
    assert_eq!([after[0] - before[0], after[1] - before[1]], [1.0, 8.0], "one computation of all tokens");
}
