//! A shard over a reference checkpoint's experts.
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use moesaic_expert_shard::{Config, ExpertShard};
use moesaic_model::backend::native::NativeBackend;
use moesaic_model::decoder::{load_decoder, load_experts};
use moesaic_model::{LoadOptions, LogitsWanted, Runner, SequenceChunk, source, spec};
use std::path::Path;
use std::sync::Arc;

#[tokio::test]
async fn a_shard_computes_what_the_store_does_and_counts_each_expert() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/mixtral");
    let source = source::open(&path).unwrap();
    let model = spec::read(&path, &*source).unwrap();
    let backend = Arc::new(NativeBackend::new(1));
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

    let report = shard.report().await.unwrap();
    assert_eq!(report.load.len(), 3, "all three layers have experts");
    for counts in report.load.values() {
        assert_eq!(counts.len(), 8);
        assert_eq!(counts.iter().sum::<u64>(), tokens.len() as u64 * 2, "two experts a token");
    }
    assert!(shard.follow(3).await.unwrap());
    assert!(!shard.follow(2).await.unwrap(), "a stale epoch is refused");
    assert_eq!(shard.report().await.unwrap().epoch, 3);
}

#[test]
fn settings_out_of_bounds_name_the_field() {
    let error = Config { load_windows: 0, ..Config::default() }.validate().unwrap_err();
    assert_eq!(error.field.as_deref(), Some("expert_shard.load_windows"));
}
