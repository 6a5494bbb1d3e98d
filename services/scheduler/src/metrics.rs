//! The scheduler's metrics: the names that vLLM's dashboards and autoscalers read, and Moesaic's own.
use crate::engine::Snapshot;
use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use std::time::Duration;

/// Handles of one replica's metrics.
pub struct Metrics {
    running: Gauge,
    waiting: Gauge,
    kv_usage: Gauge,
    kv_cached: Gauge,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: Counter,
    /// Of those, tokens that were found.
    pub prefix_hits: Counter,
    /// Prompt tokens of started requests.
    pub prompt_tokens: Counter,
    /// Tokens generated.
    pub generation_tokens: Counter,
    first_token: Histogram,
    inter_token: Histogram,
    end_to_end: Histogram,
    queue: Histogram,
    step: Histogram,
    /// Tokens computed in a step.
    pub step_tokens: Histogram,
    /// Sequences that lost their blocks.
    pub preemptions: Counter,
    /// Requests that ended without an answer because nobody read it any longer.
    pub cancelled: Counter,
    /// Blocks read from the prefix store.
    pub store_fetched: Counter,
    /// Evicted blocks offered to the prefix store.
    pub store_offered: Counter,
    /// Evicted blocks dropped because too many were on their way.
    pub store_dropped: Counter,
}

impl Metrics {
    /// Registers the metrics under `model_name` and `replica`.
    pub fn new(model: &str, replica: &str) -> Self {
        let l = [("model_name", model.to_owned()), ("replica", replica.to_owned())];
        Self {
            running: gauge!("vllm:num_requests_running", &l),
            waiting: gauge!("vllm:num_requests_waiting", &l),
            kv_usage: gauge!("vllm:kv_cache_usage_perc", &l),
            kv_cached: gauge!("moesaic_kv_blocks_cached", &l),
            prefix_queries: counter!("vllm:prefix_cache_queries", &l),
            prefix_hits: counter!("vllm:prefix_cache_hits", &l),
            prompt_tokens: counter!("vllm:prompt_tokens_total", &l),
            generation_tokens: counter!("vllm:generation_tokens_total", &l),
            first_token: histogram!("vllm:time_to_first_token_seconds", &l),
            inter_token: histogram!("vllm:inter_token_latency_seconds", &l),
            end_to_end: histogram!("vllm:e2e_request_latency_seconds", &l),
            queue: histogram!("vllm:request_queue_time_seconds", &l),
            step: histogram!("moesaic_step_seconds", &l),
            step_tokens: histogram!("moesaic_step_tokens", &l),
            preemptions: counter!("moesaic_preemptions_total", &l),
            cancelled: counter!("moesaic_requests_cancelled_total", &l),
            store_fetched: counter!("moesaic_prefix_store_fetched_blocks_total", &l),
            store_offered: counter!("moesaic_prefix_store_offered_blocks_total", &l),
            store_dropped: counter!("moesaic_prefix_store_dropped_blocks_total", &l),
        }
    }

    /// Sets the gauges.
    pub fn observe(&self, snapshot: &Snapshot) {
        self.running.set(snapshot.running as f64);
        self.waiting.set(snapshot.waiting as f64);
        self.kv_usage.set(snapshot.kv_blocks_used as f64 / snapshot.kv_blocks_total.max(1) as f64);
        self.kv_cached.set(snapshot.kv_blocks_cached as f64);
    }

    /// A request waited this long before its first step.
    pub fn queued(&self, time: Duration) {
        self.queue.record(time.as_secs_f64());
    }

    /// A token came: the first after `time` since the request, others since the token before.
    pub fn token(&self, first: bool, time: Duration) {
        if first { &self.first_token } else { &self.inter_token }.record(time.as_secs_f64());
        self.generation_tokens.increment(1);
    }

    /// A request was answered.
    pub fn answered(&self, time: Duration) {
        self.end_to_end.record(time.as_secs_f64());
    }

    /// A step took this long.
    pub fn step(&self, time: Duration, tokens: usize) {
        self.step.record(time.as_secs_f64());
        self.step_tokens.record(tokens as f64);
    }
}
