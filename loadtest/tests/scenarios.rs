//! The measurements themselves, small: real processes of a tiny model, and numbers that fit together.
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use moesaic_loadtest::model::{self, Preset};
use moesaic_loadtest::scenarios::distribution::{self, Distribution};
use moesaic_loadtest::scenarios::gateway::{self, GatewayCost};
use moesaic_loadtest::scenarios::prefix::{self, Prefix};
use serde_json::Value;
use std::path::PathBuf;

fn tiny(folder: &tempfile::TempDir) -> Option<PathBuf> {
    let path = folder.path().join("tiny.gguf");
    model::write(&Preset::MoeTiny.shape(), 1, &path, &|_, _| ()).unwrap();
    Some(path)
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn distribution_gives_rates_of_both_sides_and_the_bytes_that_the_shape_says() {
    let folder = tempfile::tempdir().unwrap();
    let args = Distribution {
        model: tiny(&folder),
        clients: 3,
        prompt_tokens: 40,
        // long enough that all are written at once, however late a client begins
        output_tokens: 400,
        runs: 1,
        shards: 2,
        scheduler_threads: 1,
        embedded_threads: 2,
        wire: "f32".into(),
    };
    let section = distribution::run(&args).await.unwrap();
    for phase in ["prompt", "generation"] {
        let values = &section.values[phase];
        let (embedded, cluster) = (number(&values["embedded_tok_s"][0]), number(&values["cluster_tok_s"][0]));
        assert!(embedded > 0.0 && cluster > 0.0, "{values}");
        assert!((number(&values["ratio"]["median"]) - cluster / embedded).abs() < 1e-9, "{values}");
        // a token's two experts of each layer are in one group or in two, which get and send its row of 64 floats each
        let (sent, received) = (&values["bytes_a_token"]["sent"], &values["bytes_a_token"]["received"]);
        assert_eq!(sent, received);
        assert!((2.0 * 256.0..=4.0 * 256.0).contains(&number(sent)), "{values}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prefixes_are_computed_once_fetched_once_and_found_again_and_policies_replayed() {
    let folder = tempfile::tempdir().unwrap();
    let args = Prefix {
        model: tiny(&folder),
        prefix_tokens: 600,
        prefixes: 2,
        // what is estimated depends on how busy the machine is
        fetch: "always".into(),
        requests: 12,
        groups: 3,
        group_tokens: 128,
        kv_blocks: 40,
        clients: 3,
        below: 0.5,
    };
    let values = prefix::run(&args).await.unwrap().values;
    let count = |what: &str| number(&values["fetch"][what]["count"]);
    // each prefix: one miss, one that can be fetched, two that are there
    assert_eq!(count("miss_s") + count("fetched_s") + count("local_s"), 8.0, "{values}");
    assert!(count("fetched_s") >= 1.0 && count("miss_s") >= 2.0, "{values}");
    let policies = values["policies"].as_array().unwrap();
    assert_eq!(policies.len(), 6);
    for policy in policies {
        // all but the first request of each group could hit two blocks of its 176 tokens
        let (hit_rate, best) = (number(&policy["hit_rate"]), 9.0 * 128.0 / (12.0 * 176.0));
        assert!(hit_rate > 0.0 && hit_rate <= best + 1e-9, "{policy}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_gateway_is_measured_against_its_replica_alone() {
    let model = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy/models/demo-moe");
    let args =
        GatewayCost { model, prompt_bytes: 200, output_tokens: 4, requests: 40, clients: 4, runs: 1, unpinned: true };
    let values = gateway::run(&args).await.unwrap().values;
    for load in ["alone", "full"] {
        let p50 = &values[load]["whole answer p50"];
        assert!(number(&p50["through"]) > 0.0 && number(&p50["direct"]) > 0.0, "{values}");
    }
    assert!(number(&values["gateway_cpu_s"]) > 0.0, "{values}");
}
