//! A shard over a reference checkpoint's experts.
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use moesaic_expert_shard::load::Counts;
use moesaic_expert_shard::{Config, ExpertShard};
use moesaic_model::backend::Backend;
use moesaic_model::backend::native::NativeBackend;
use moesaic_model::decoder::{load_decoder, load_experts};
use moesaic_model::expert_pool::ExpertPool;
use moesaic_model::{LoadOptions, LogitsWanted, Runner, SequenceChunk, source, spec};
use moesaic_types::Routing;
use std::path::Path;
use std::sync::Arc;

#[tokio::test]
async fn a_shard_computes_what_the_store_does_and_counts_each_expert() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/mixtral");
    let source = source::open(&path).unwrap();
    let model = spec::read(&path, &*source).unwrap();
    let backend = Arc::new(NativeBackend::new(1, moesaic_model::Activations::Int8));
    let options = LoadOptions { threads: 1, ..LoadOptions::default() };
    let load = || load_experts(&*source, &model, backend.clone(), &options).unwrap();
    let shard = ExpertShard::start(&Config::default(), &model, load()).unwrap();
    let tokens = [5, 6, 7, 8, 9];
    let run = |mut decoder: moesaic_model::decoder::Decoder<NativeBackend>| {
        let mut logits = Vec::new();
        decoder.allocate_kv(1).unwrap();
        let chunk = SequenceChunk { tokens: &tokens, start: 0, blocks: &[0], logits: LogitsWanted::All };
        decoder.forward(&[chunk], &mut logits).unwrap();
        logits
    };
    let decoder = |pool| load_decoder(&*source, model.clone(), backend.clone(), &options, pool).unwrap();
    assert_eq!(run(decoder(shard.clone())), run(decoder(Arc::new(load()))));

    let load = shard.end_window().await.unwrap();
    assert_eq!(load.len(), 3, "all three layers have experts");
    for counts in load.values() {
        assert_eq!(counts.len(), 8);
        assert_eq!(counts.iter().sum::<u64>(), tokens.len() as u64 * 2, "two experts a token");
    }
}

#[tokio::test]
async fn load_is_kept_for_so_many_windows() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/mixtral");
    let source = source::open(&path).unwrap();
    let model = spec::read(&path, &*source).unwrap();
    let backend = Arc::new(NativeBackend::new(1, moesaic_model::Activations::Int8));
    let store = load_experts(&*source, &model, backend.clone(), &LoadOptions::default()).unwrap();
    let config = Config { load_windows: 2, ..Config::default() };
    let shard = ExpertShard::start(&config, &model, store).unwrap();
    let send = || {
        let mut routing = Routing::new();
        routing.push([(3, 1.0)]);
        let x = backend.to_device(vec![0.5; model.hidden], model.hidden).unwrap();
        shard.dispatch(0, &x, &routing).unwrap().combine().unwrap();
    };
    let of = |load: &Counts| load[&0][3];
    send();
    assert_eq!(of(&shard.load().await.unwrap()), 1);
    assert_eq!(of(&shard.end_window().await.unwrap()), 1);
    send();
    send();
    assert_eq!(of(&shard.load().await.unwrap()), 3, "the running window and the one before");
    assert_eq!(of(&shard.end_window().await.unwrap()), 3);
    assert_eq!(of(&shard.load().await.unwrap()), 2, "the first is over");
}

#[test]
fn settings_out_of_bounds_name_the_field() {
    let error = Config { load_windows: 0, ..Config::default() }.validate().unwrap_err();
    assert_eq!(error.field.as_deref(), Some("expert_shard.load_windows"));
}
