//! Every metric's name, and the recorder that Prometheus reads.
//!
//! Code records with the macros of the `metrics` crate and these names; labels stand in the descriptions. The names
//! that begin with `vllm:` are those that vLLM's dashboards and autoscalers read. [`render`] adds what Prometheus' own
//! clients say of a process (`process_resident_memory_bytes`, `process_start_time_seconds` and so on).
use crate::Error;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

macro_rules! names {
    ($($kind:ident $constant:ident = $name:literal, $help:literal;)*) => {
        $(#[doc = $help] pub const $constant: &str = $name;)*

        /// All metrics: name, kind (`counter`, `gauge` or `histogram`) and meaning.
        pub const ALL: &[(&str, &str, &str)] = &[$(($name, stringify!($kind), $help)),*];

        fn describe() {
            $(names!(@describe $kind $constant $help);)*
        }
    };
    (@describe counter $constant:ident $help:literal) => { metrics::describe_counter!($constant, $help) };
    (@describe gauge $constant:ident $help:literal) => { metrics::describe_gauge!($constant, $help) };
    (@describe histogram $constant:ident $help:literal) => { metrics::describe_histogram!($constant, $help) };
}

names! {
    gauge NUM_REQUESTS_RUNNING = "vllm:num_requests_running", "Sequences in the running batch.";
    gauge NUM_REQUESTS_WAITING = "vllm:num_requests_waiting", "Sequences that wait for the batch.";
    gauge KV_CACHE_USAGE_PERC = "vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.";
    counter PREFIX_CACHE_QUERIES = "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.";
    counter PREFIX_CACHE_HITS = "vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.";
    counter PROMPT_TOKENS_TOTAL = "vllm:prompt_tokens_total", "Prompt tokens processed.";
    counter GENERATION_TOKENS_TOTAL = "vllm:generation_tokens_total", "Tokens generated.";
    histogram TIME_TO_FIRST_TOKEN_SECONDS = "vllm:time_to_first_token_seconds", "From arrival to the first token.";
    histogram INTER_TOKEN_LATENCY_SECONDS = "vllm:inter_token_latency_seconds", "Between two tokens of a sequence.";
    histogram E2E_REQUEST_LATENCY_SECONDS = "vllm:e2e_request_latency_seconds", "From arrival to the last token.";
    histogram REQUEST_QUEUE_TIME_SECONDS = "vllm:request_queue_time_seconds", "From arrival to the batch.";
    histogram REQUEST_PREFILL_TIME_SECONDS = "vllm:request_prefill_time_seconds", "From the batch to the first token.";
    histogram REQUEST_DECODE_TIME_SECONDS = "vllm:request_decode_time_seconds", "From the first token to the last.";

    counter REQUEST_SUCCESS_TOTAL = "moesaic_request_success_total", "Sequences finished, by `finished_reason`.";
    counter REQUEST_FAILURES_TOTAL = "moesaic_request_failures_total",
        "Sequences that were refused or ended with an error, by `reason`: the error's code.";
    counter REQUESTS_CANCELLED_TOTAL = "moesaic_requests_cancelled_total", "Sequences whose reader went away.";
    counter PREEMPTIONS_TOTAL = "moesaic_preemptions_total", "Sequences put back because KV blocks ran out.";
    histogram STEP_SECONDS = "moesaic_step_seconds", "Duration of an engine step.";
    histogram STEP_PHASE_SECONDS = "moesaic_step_phase_seconds",
        "Parts of an engine step, by `phase`: plan (blocks and what each sequence computes), forward (the model), collect (tokens from logits).";
    histogram STEP_TOKENS = "moesaic_step_tokens", "Tokens of an engine step.";
    counter STEP_RETRIES_TOTAL = "moesaic_step_retries_total", "Steps run again because experts did not answer.";
    gauge KV_BLOCKS_CACHED = "moesaic_kv_blocks_cached", "Unused KV blocks that hold reusable tokens.";
    counter PREFIX_STORE_FETCHED_BLOCKS_TOTAL = "moesaic_prefix_store_fetched_blocks_total",
        "Blocks read from the prefix store.";
    counter PREFIX_STORE_CORRUPT_BLOCKS_TOTAL = "moesaic_prefix_store_corrupt_blocks_total",
        "Blocks of the prefix store that were not as they were offered; they are dropped and computed.";
    counter PREFIX_STORE_OFFERED_BLOCKS_TOTAL = "moesaic_prefix_store_offered_blocks_total",
        "Blocks offered to the prefix store.";
    counter PREFIX_STORE_SKIPPED_BLOCKS_TOTAL = "moesaic_prefix_store_skipped_blocks_total",
        "Blocks that the prefix store has and that were computed: that was estimated to be faster, or memory had no room.";
    counter PREFIX_STORE_DROPPED_BLOCKS_TOTAL = "moesaic_prefix_store_dropped_blocks_total",
        "Evicted blocks dropped because too many were on their way to the prefix store.";
    counter ENGINE_RESTARTS_TOTAL = "moesaic_engine_restarts_total", "Engines started again after a failure.";

    counter HTTP_REQUESTS_TOTAL = "moesaic_http_requests_total", "HTTP requests, by `route` and `status`.";
    histogram HTTP_REQUEST_SECONDS = "moesaic_http_request_seconds", "Until the response's head, by `route`.";
    counter GRPC_REQUESTS_TOTAL = "moesaic_grpc_requests_total", "gRPC requests, by `method` and `code`.";
    counter MIGRATIONS_TOTAL = "moesaic_migrations_total", "Requests that went on at another replica.";

    counter ROUTER_PLACEMENTS_TOTAL = "moesaic_router_placements_total", "Requests placed, by `replica`.";
    counter ROUTER_REFUSALS_TOTAL = "moesaic_router_refusals_total", "Requests that no replica was ready for.";
    counter ROUTER_OVERLAP_BLOCKS_TOTAL = "moesaic_router_overlap_blocks_total",
        "Prompt blocks that the chosen replicas were believed to have.";
    gauge ROUTER_REPLICAS_READY = "moesaic_router_replicas_ready", "Replicas that can take requests.";
    gauge ROUTER_INDEX_BLOCKS = "moesaic_router_index_blocks", "Entries of the prefix index.";
    gauge ROUTER_QUEUE_WAITING = "moesaic_router_queue_waiting", "Requests that wait for a replica with room.";
    histogram ROUTER_QUEUE_SECONDS = "moesaic_router_queue_seconds", "How long requests waited for a replica with room.";
    counter ROUTER_QUEUE_REFUSALS_TOTAL = "moesaic_router_queue_refusals_total",
        "Requests that found the queue full or whose time in it ended, by `reason`: the error's code.";
    counter ROUTER_CANARIES_TOTAL = "moesaic_router_canaries_total",
        "Canaries by `outcome`: works, failed or refused.";
    counter ROUTER_CANARY_DISAGREEMENTS_TOTAL = "moesaic_router_canary_disagreements_total",
        "Canaries that a replica answered otherwise than most replicas of its model.";
    counter ROUTER_EVENT_GAPS_TOTAL = "moesaic_router_event_gaps_total",
        "Gaps in KV events; each clears what is known of the replica's blocks.";

    gauge PLACEMENT_LEADER = "moesaic_placement_leader", "1 where this router leads the placement of experts.";
    gauge PLACEMENT_EPOCH = "moesaic_placement_epoch",
        "Epoch of the placement of experts, by `model`; recorded by the router that leads.";
    gauge PLACEMENT_IMBALANCE = "moesaic_placement_imbalance",
        "Load of the busiest group of each layer over the average group's, by `model`; 1 is even.";
    gauge PLACEMENT_GROUPS = "moesaic_placement_groups", "Groups of which all shards answer, by `model`.";
    counter PLACEMENT_MOVES_TOTAL = "moesaic_placement_moves_total",
        "Experts that groups loaded for a new placement, a layer's each counted.";
    counter PLACEMENT_CHANGES_TOTAL = "moesaic_placement_changes_total",
        "New placements, by `outcome`: done or failed.";

    counter KV_STORE_HITS_TOTAL = "moesaic_kv_store_hits_total", "Blocks asked for and found.";
    counter KV_STORE_MISSES_TOTAL = "moesaic_kv_store_misses_total", "Chains asked for that ended early.";
    counter KV_STORE_EVICTIONS_TOTAL = "moesaic_kv_store_evictions_total", "Blocks dropped from the last tier that had them, to make room.";
    gauge KV_STORE_BYTES = "moesaic_kv_store_bytes", "Bytes of the blocks in RAM.";
    gauge KV_STORE_DISK_BYTES = "moesaic_kv_store_disk_bytes", "Bytes of the blocks on disk.";
    counter KV_STORE_DISK_HITS_TOTAL = "moesaic_kv_store_disk_hits_total", "Of the blocks found, those on disk.";
    counter KV_STORE_DISK_FAILURES_TOTAL = "moesaic_kv_store_disk_failures_total",
        "Blocks that could not be written to disk.";
    counter KV_STORE_CORRUPT_TOTAL = "moesaic_kv_store_corrupt_total",
        "Blocks whose file was not intact; they are dropped, never served.";
    counter KV_STORE_REPLICATED_TOTAL = "moesaic_kv_store_replicated_total", "Copies of blocks sent to other nodes.";
    counter KV_STORE_REPLICATION_DROPPED_TOTAL = "moesaic_kv_store_replication_dropped_total",
        "Copies that were not made, for too many were on their way or the node did not take them.";

    counter EXPERT_TOKENS_TOTAL = "moesaic_expert_tokens_total", "Tokens sent to experts, a token once for each, by `layer`.";
    histogram EXPERT_DISPATCH_SECONDS = "moesaic_expert_dispatch_seconds", "Duration of one layer's experts.";
    histogram EXPERT_BATCH_TOKENS = "moesaic_expert_batch_tokens",
        "Tokens of one computation of a shard, of all schedulers together.";
    counter EXPERT_SENT_BYTES_TOTAL = "moesaic_expert_sent_bytes_total", "Bytes of activations sent to shards.";
    counter EXPERT_RECEIVED_BYTES_TOTAL = "moesaic_expert_received_bytes_total", "Bytes of sums that came from shards.";
    histogram EXPERT_ROUND_TRIP_SECONDS = "moesaic_expert_round_trip_seconds",
        "From sending a layer's tokens to having their sums, at the scheduler.";
    counter EXPERT_RETRIES_TOTAL = "moesaic_expert_retries_total", "Layers that were sent again under another view.";
    counter EXPERT_FAILURES_TOTAL = "moesaic_expert_failures_total", "Dispatches that failed, by `layer`.";

    gauge BUILD_INFO = "moesaic_build_info", "Always 1; `version` and `commit` say which build this is.";
    counter ACTOR_RESTARTS_TOTAL = "moesaic_actor_restarts_total", "Actors built again after a failure, by `actor`.";
}

/// Counters whose names vLLM declares without `_total`, which Prometheus clients add: dashboards read the longer name.
const ALSO_WITH_TOTAL: &[&str] = &[PREFIX_CACHE_QUERIES, PREFIX_CACHE_HITS];

/// Buckets of durations, from a token's to a long answer's.
const SECONDS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0,
];

/// Buckets of everything else: powers of two.
const COUNTS: &[f64] =
    &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// Histograms keep each sample until someone collects it; this often we do, whether or not Prometheus comes.
const UPKEEP: Duration = Duration::from_secs(5);

/// What this build calls itself; the commit is known where the build was told.
const VERSION: &str = env!("CARGO_PKG_VERSION");
const COMMIT: &str = match option_env!("MOESAIC_COMMIT") {
    Some(commit) => commit,
    None => "unknown",
};

struct Recorder {
    prometheus: PrometheusHandle,
    process: metrics_process::Collector,
}

static RECORDER: OnceLock<Recorder> = OnceLock::new();

/// Starts the recording of metrics in this process. A second call changes nothing.
pub fn install() -> Result<(), Error> {
    static INSTALLING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
    if RECORDER.get().is_some() {
        return Ok(());
    }
    let recorder = PrometheusBuilder::new()
        .set_buckets(COUNTS)
        .and_then(|builder| builder.set_buckets_for_metric(Matcher::Suffix("_seconds".into()), SECONDS))
        .map_err(Error::Buckets)?
        .build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).map_err(|_| Error::AlreadySet("a metrics recorder"))?;
    describe();
    metrics::gauge!(BUILD_INFO, "version" => VERSION, "commit" => COMMIT).set(1.0);
    let process = metrics_process::Collector::default();
    process.describe();
    let upkeep = handle.clone();
    std::thread::Builder::new()
        .name("metrics-upkeep".into())
        .spawn(move || {
            loop {
                std::thread::sleep(UPKEEP);
                upkeep.run_upkeep();
            }
        })
        .map_err(Error::Thread)?;
    RECORDER.get_or_init(|| Recorder { prometheus: handle, process });
    Ok(())
}

/// All metrics in Prometheus's text format; empty before [`install`].
pub fn render() -> String {
    let Some(recorder) = RECORDER.get() else { return String::new() };
    recorder.process.collect();
    let mut text = recorder.prometheus.render();
    for name in ALSO_WITH_TOTAL {
        let again: Vec<String> = text
            .lines()
            .filter(|line| is_of(line, name))
            .map(|line| line.replacen(name, &format!("{name}_total"), 1))
            .collect();
        for line in again {
            text.push_str(&line);
            text.push('\n');
        }
    }
    text
}

/// Whether a line is a sample or a comment of this metric.
fn is_of(line: &str, name: &str) -> bool {
    let line = line.strip_prefix("# HELP ").or_else(|| line.strip_prefix("# TYPE ")).unwrap_or(line);
    line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']))
}
