//! What travels in fewer bytes than f32, and in two micro-batches.
use crate::cluster::{Cluster, Grid, on_a_thread};
use crate::{F32, cases, golden, run, worst};
use moesaic_model::backend::native::NativeBackend;
use moesaic_model::expert_pool::ExpertPool;
use moesaic_model::{Activations, Runner};
use moesaic_proto::WireDType;
use moesaic_scheduler::experts::RemotePool;
use moesaic_transport::ExpertsOptions;
use std::sync::Arc;

const NAME: &str = "qwen3_moe";

/// The reference's logits to within `bound` times their deviation, and other bits than those of f32.
async fn grid_is_near(dtype: WireDType, bound: f32) {
    let grid = Grid { groups: 2, ranks: 2 };
    let cluster = Cluster::start(&golden(NAME), F32, grid, |expert| vec![expert % 2]).await;
    let narrow = ExpertsOptions { activations: dtype, outputs: dtype, ..ExpertsOptions::default() };
    let mut model = cluster.decoder(cluster.experts(narrow).await);
    let mut exact = cluster.decoder(cluster.experts(ExpertsOptions::default()).await);
    on_a_thread(move || {
        for model in [&mut model, &mut exact] {
            model.allocate_kv(4).unwrap();
        }
        let vocab = model.spec().vocab;
        for (prompt, expected) in cases(NAME).0 {
            let found = run(&mut model, &prompt, prompt.len()).unwrap();
            let mean = expected.iter().sum::<f32>() / vocab as f32;
            let deviation = (expected.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / vocab as f32).sqrt();
            let worst = worst(&found[found.len() - vocab..], &expected) / deviation;
            assert!(worst <= bound, "{dtype:?}: logits differ by {worst} of their deviation");
            assert!(found != run(&mut exact, &prompt, prompt.len()).unwrap(), "{dtype:?} was not used");
            assert!(run(&mut model, &prompt, 7).unwrap() == found, "{dtype:?}: chunks change bits");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bf16_on_the_wire_is_near_the_reference() {
    grid_is_near(WireDType::Bf16, 0.05).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn int8_on_the_wire_is_near_the_reference() {
    grid_is_near(WireDType::Int8, 0.2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_step_is_cut_into_two_micro_batches() {
    let grid = Grid { groups: 1, ranks: 1 };
    let cluster = Cluster::start(&golden(NAME), F32, grid, |_| vec![0]).await;
    let backend = Arc::new(NativeBackend::new(1, Activations::F32));
    let pool = RemotePool::new(cluster.experts(ExpertsOptions::default()).await, backend, cluster.model.hidden);
    assert_eq!([1, 4096].map(|tokens| pool.micro_batches(tokens)), [1, 2]);
}
