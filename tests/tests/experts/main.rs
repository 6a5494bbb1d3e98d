//! Expert parallel x tensor parallel over real gRPC streams: the same model, wherever its experts are.
#![allow(clippy::unwrap_used, reason = "a test fails there")]

mod cluster;
mod faults;
mod wire;

use cluster::{Cluster, Grid, on_a_thread};
use moesaic_model::backend::TensorSlice;
use moesaic_model::backend::native::NativeBackend;
use moesaic_model::decoder::Decoder;
use moesaic_model::{LogitsWanted, Runner, SequenceChunk};
use moesaic_transport::ExpertsOptions;
use moesaic_types::WeightFormat;
use std::path::PathBuf;
use std::time::Duration;

const F32: WeightFormat = WeightFormat::F32;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("goldens").join(name)
}

/// A prompt and its last token's logits.
type Case = (Vec<u32>, Vec<f32>);

/// A golden's cases, and how far logits may differ.
fn cases(name: &str) -> (Vec<Case>, f32) {
    let text = std::fs::read(golden(name).join("golden.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let numbers = |value: &serde_json::Value| -> Vec<f64> {
        value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    };
    let case = |case: &serde_json::Value| {
        let prompt = numbers(&case["prompt_ids"]).iter().map(|id| *id as u32).collect();
        (prompt, numbers(&case["last_logits"]).iter().map(|x| *x as f32).collect())
    };
    let tolerance = 2e-3 * (json["logit_std"].as_f64().unwrap() as f32).max(1.0);
    (json["cases"].as_array().unwrap().iter().map(case).collect(), tolerance)
}

/// All logits of a prompt in chunks of `size`.
fn run(model: &mut Decoder<NativeBackend>, tokens: &[u32], size: usize) -> moesaic_model::Result<Vec<f32>> {
    let (mut logits, blocks) = (Vec::new(), [3, 1, 2, 0]);
    for (index, tokens) in tokens.chunks(size).enumerate() {
        let chunk = SequenceChunk { tokens, start: index * size, blocks: &blocks, logits: LogitsWanted::All };
        model.forward(&[chunk], &mut logits)?;
    }
    Ok(logits)
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| if (a - b).is_nan() { f32::INFINITY } else { (a - b).abs() }).fold(0.0, f32::max)
}

/// A grid of shards gives the reference's logits, and the same bits in every chunking.
async fn grid_matches(name: &'static str, grid: Grid) {
    let cluster = Cluster::start(&golden(name), F32, grid, |expert| vec![expert % grid.groups]).await;
    let mut model = cluster.decoder(cluster.experts(ExpertsOptions::default()).await);
    on_a_thread(move || {
        model.allocate_kv(4).unwrap();
        let vocab = model.spec().vocab;
        let (cases, tolerance) = cases(name);
        for (prompt, expected) in cases {
            let whole = run(&mut model, &prompt, prompt.len()).unwrap();
            let worst = worst(&whole[whole.len() - vocab..], &expected);
            assert!(worst <= tolerance, "{name} on {grid:?}: logits differ by {worst}");
            for size in [1, 7] {
                let chunked = run(&mut model, &prompt, size).unwrap();
                assert!(chunked == whole, "{name} on {grid:?}: chunks of {size} change bits");
            }
        }
    })
    .await;
    for shard in &cluster.shards {
        let held: usize = shard.shares().values().map(Vec::len).sum();
        let all: usize =
            cluster.model.moe_layers().filter_map(|layer| cluster.model.moe(layer)).map(|moe| moe.experts).sum();
        assert!(
            held <= all.div_ceil(grid.groups) + cluster.model.layers.len(),
            "a shard holds {held} of {all} experts"
        );
    }
}

/// The families whose models have experts.
const FAMILIES: [&str; 9] =
    ["deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "granite_moe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"];

/// Every family on one grid.
async fn families_match(groups: usize, ranks: usize) {
    for name in FAMILIES {
        grid_matches(name, Grid { groups, ranks }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_shard_gives_the_reference_s_logits() {
    families_match(1, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_groups_give_the_reference_s_logits() {
    families_match(2, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn four_groups_give_the_reference_s_logits() {
    families_match(4, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_group_of_two_ranks_gives_the_reference_s_logits() {
    families_match(1, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_groups_of_two_ranks_give_the_reference_s_logits() {
    families_match(2, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn packed_weights_are_sliced_and_spread_like_others() {
    let grid = Grid { groups: 2, ranks: 2 };
    let weights = WeightFormat::Q8;
    let cluster = Cluster::start(&golden("mixtral"), weights, grid, |expert| vec![expert % 2]).await;
    let (mut model, mut embedded) =
        (cluster.decoder(cluster.experts(ExpertsOptions::default()).await), cluster.embedded());
    on_a_thread(move || {
        for model in [&mut model, &mut embedded] {
            model.allocate_kv(4).unwrap();
        }
        let (cases, tolerance) = cases("mixtral");
        for (prompt, _) in cases {
            let (spread, whole) = (run(&mut model, &prompt, 9).unwrap(), run(&mut embedded, &prompt, 9).unwrap());
            let worst = worst(&spread, &whole);
            assert!(worst <= 10.0 * tolerance, "logits differ by {worst}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_shard_s_replicas_serve_and_without_replicas_it_is_said_and_waited_for() {
    let grid = Grid { groups: 2, ranks: 1 };
    let name = "qwen3_moe";
    // even experts are in both groups, odd ones in group 1 alone
    let place = |expert: usize| if expert.is_multiple_of(2) { vec![0, 1] } else { vec![1] };
    let mut cluster = Cluster::start(&golden(name), F32, grid, place).await;
    let quick = ExpertsOptions { patience: Duration::from_millis(200), ..ExpertsOptions::default() };
    let experts = cluster.experts(quick).await;
    let mut model = cluster.decoder(experts.clone());
    let (cases, tolerance) = cases(name);
    let (prompt, expected) = cases[0].clone();
    let mut model = on_a_thread(move || {
        model.allocate_kv(4).unwrap();
        model
    })
    .await;
    let runs = move |mut model: Decoder<NativeBackend>| {
        let (prompt, expected) = (prompt.clone(), expected.clone());
        on_a_thread(move || {
            let result = run(&mut model, &prompt, prompt.len());
            let worst = result.map(|logits| worst(&logits[logits.len() - expected.len()..], &expected));
            (worst, model)
        })
    };
    // its connections break, its place in the cluster stands still
    cluster.shards[0].kill();
    let (result, same) = runs(model).await;
    model = same;
    let worst = result.unwrap();
    assert!(worst <= tolerance, "logits differ by {worst}");
    experts.ready().unwrap();

    cluster.shards[1].kill();
    moesaic_testkit::until("the loss is noticed", || async { experts.ready().is_err() }).await;
    let (result, same) = runs(model).await;
    model = same;
    let error = result.unwrap_err();
    assert!(matches!(error, moesaic_model::Error::Experts { .. }), "{error}");
    assert!(error.to_string().contains("shard-1-0") || error.to_string().contains("group 1"), "{error}");

    cluster.shards.clear();
    cluster.shards.push(cluster.shard(1, TensorSlice::WHOLE).await);
    cluster.place(2, 2, |_| vec![1]);
    moesaic_testkit::until("it is back", || async { experts.ready().is_ok() }).await;
    let (result, _) = runs(model).await;
    assert!(result.unwrap() <= tolerance);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_placement_is_switched_between_layers_without_a_failure() {
    let grid = Grid { groups: 2, ranks: 1 };
    let name = "qwen3_moe";
    let cluster = Cluster::start(&golden(name), F32, grid, |expert| vec![expert % 2]).await;
    let mut model = cluster.decoder(cluster.experts(ExpertsOptions::default()).await);
    let (cases, tolerance) = cases(name);
    let (prompt, expected) = cases[0].clone();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let running = tokio::task::spawn_blocking(move || {
        model.allocate_kv(4).unwrap();
        let mut runs = 0;
        while !*stopped.borrow() {
            let logits = run(&mut model, &prompt, 5).unwrap();
            let worst = worst(&logits[logits.len() - expected.len()..], &expected);
            assert!(worst <= tolerance, "run {runs}: logits differ by {worst}");
            runs += 1;
        }
        runs
    });
    for epoch in 2..12 {
        cluster.place(epoch, 2, |expert| vec![(expert + epoch as usize) % 2]);
        let follows = || cluster.shards.iter().all(|shard| shard.shard.shelf().current().epoch == epoch);
        moesaic_testkit::until("the shards are asked at the new epoch", || async { follows() }).await;
    }
    stop.send_replace(true);
    assert!(running.await.unwrap() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn several_schedulers_share_the_shards() {
    let grid = Grid { groups: 2, ranks: 1 };
    let name = "qwen3_moe";
    let cluster = Cluster::start(&golden(name), F32, grid, |expert| vec![expert % 2]).await;
    let (cases, _) = cases(name);
    let mut models = Vec::new();
    for _ in 0..4 {
        models.push(cluster.decoder(cluster.experts(ExpertsOptions::default()).await));
    }
    let alone = |mut model: Decoder<NativeBackend>| {
        let cases = cases.clone();
        tokio::task::spawn_blocking(move || {
            model.allocate_kv(4).unwrap();
            let all = || cases.iter().map(|(prompt, _)| prompt);
            let first: Vec<_> = all().map(|prompt| run(&mut model, prompt, 6).unwrap()).collect();
            for _ in 0..5 {
                let again: Vec<_> = all().map(|prompt| run(&mut model, prompt, 6).unwrap()).collect();
                assert!(again == first, "another scheduler's tokens change bits");
            }
            first
        })
    };
    let running: Vec<_> = models.into_iter().map(alone).collect();
    let mut results = Vec::new();
    for run in running {
        results.push(run.await.unwrap());
    }
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
}
