//! The scheduler's metrics: the names that vLLM's dashboards and autoscalers read, and Moesaic's own.
use crate::engine::Snapshot;
use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use moesaic_telemetry::metrics as names;
use moesaic_types::{ErrorCode, FinishReason};
use std::time::Duration;

fn labels(model: &str, replica: &str) -> [(&'static str, String); 2] {
    [("model_name", model.to_owned()), ("replica", replica.to_owned())]
}

/// Counts how requests end.
pub struct Ends {
    /// `None`: nothing is counted.
    labels: Option<[(&'static str, String); 2]>,
    stopped: Counter,
    cut: Counter,
    cancelled: Counter,
    end_to_end: Histogram,
}

impl Ends {
    /// Registers the metrics under `model_name` and `replica`.
    pub fn new(model: &str, replica: &str) -> Self {
        let l = labels(model, replica);
        let success = |reason: &str| {
            let reason = ("finished_reason", reason.to_owned());
            counter!(names::REQUEST_SUCCESS_TOTAL, &l.iter().cloned().chain([reason]).collect::<Vec<_>>())
        };
        Self {
            stopped: success("stop"),
            cut: success("length"),
            cancelled: counter!(names::REQUESTS_CANCELLED_TOTAL, &l),
            end_to_end: histogram!(names::E2E_REQUEST_LATENCY_SECONDS, &l),
            labels: Some(l),
        }
    }

    /// Counts nothing: for canaries.
    pub fn uncounted() -> Self {
        let (stopped, cut, cancelled) = (Counter::noop(), Counter::noop(), Counter::noop());
        Self { labels: None, stopped, cut, cancelled, end_to_end: Histogram::noop() }
    }

    /// A request was answered, so long after it came.
    pub fn answered(&self, reason: FinishReason, time: Duration) {
        if reason == FinishReason::Length { &self.cut } else { &self.stopped }.increment(1);
        self.end_to_end.record(time.as_secs_f64());
    }

    /// A request was refused or ended with an error.
    pub fn failed(&self, code: ErrorCode) {
        let Some(labels) = &self.labels else { return };
        let reason = ("reason", code.name().to_owned());
        let labels: Vec<_> = labels.iter().cloned().chain([reason]).collect();
        counter!(names::REQUEST_FAILURES_TOTAL, &labels).increment(1);
    }

    /// A reader went away before the end.
    pub fn cancelled(&self) {
        self.cancelled.increment(1);
    }
}

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
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    step: Histogram,
    phases: [Histogram; 3],
    /// Tokens computed in a step.
    pub step_tokens: Histogram,
    /// Sequences that lost their blocks.
    pub preemptions: Counter,
    /// Steps run again because experts did not answer.
    pub step_retries: Counter,
    /// Blocks read from the prefix store.
    pub store_fetched: Counter,
    /// Blocks that the prefix store has and that were computed: that was estimated to be faster, or memory had no room.
    pub store_skipped: Counter,
    /// Blocks of the prefix store that were not as they were offered.
    pub store_corrupt: Counter,
    /// Blocks offered to the prefix store.
    pub store_offered: Counter,
    /// Evicted blocks dropped because too many were on their way.
    pub store_dropped: Counter,
}

impl Metrics {
    /// Registers the metrics under `model_name` and `replica`.
    pub fn new(model: &str, replica: &str) -> Self {
        let l = labels(model, replica);
        Self {
            running: gauge!(names::NUM_REQUESTS_RUNNING, &l),
            waiting: gauge!(names::NUM_REQUESTS_WAITING, &l),
            kv_usage: gauge!(names::KV_CACHE_USAGE_PERC, &l),
            kv_cached: gauge!(names::KV_BLOCKS_CACHED, &l),
            prefix_queries: counter!(names::PREFIX_CACHE_QUERIES, &l),
            prefix_hits: counter!(names::PREFIX_CACHE_HITS, &l),
            prompt_tokens: counter!(names::PROMPT_TOKENS_TOTAL, &l),
            generation_tokens: counter!(names::GENERATION_TOKENS_TOTAL, &l),
            first_token: histogram!(names::TIME_TO_FIRST_TOKEN_SECONDS, &l),
            inter_token: histogram!(names::INTER_TOKEN_LATENCY_SECONDS, &l),
            queue: histogram!(names::REQUEST_QUEUE_TIME_SECONDS, &l),
            prefill: histogram!(names::REQUEST_PREFILL_TIME_SECONDS, &l),
            decode: histogram!(names::REQUEST_DECODE_TIME_SECONDS, &l),
            step: histogram!(names::STEP_SECONDS, &l),
            phases: ["plan", "forward", "collect"].map(|phase| {
                let labels: Vec<_> = l.iter().cloned().chain([("phase", phase.to_owned())]).collect();
                histogram!(names::STEP_PHASE_SECONDS, &labels)
            }),
            step_tokens: histogram!(names::STEP_TOKENS, &l),
            preemptions: counter!(names::PREEMPTIONS_TOTAL, &l),
            step_retries: counter!(names::STEP_RETRIES_TOTAL, &l),
            store_fetched: counter!(names::PREFIX_STORE_FETCHED_BLOCKS_TOTAL, &l),
            store_skipped: counter!(names::PREFIX_STORE_SKIPPED_BLOCKS_TOTAL, &l),
            store_offered: counter!(names::PREFIX_STORE_OFFERED_BLOCKS_TOTAL, &l),
            store_corrupt: counter!(names::PREFIX_STORE_CORRUPT_BLOCKS_TOTAL, &l),
            store_dropped: counter!(names::PREFIX_STORE_DROPPED_BLOCKS_TOTAL, &l),
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

    /// A request's first token came this long after its first step began.
    pub fn prefilled(&self, time: Duration) {
        self.prefill.record(time.as_secs_f64());
    }

    /// A request's last token came this long after its first.
    pub fn decoded(&self, time: Duration) {
        self.decode.record(time.as_secs_f64());
    }

    /// The model took this long for a step, whose plan was made before.
    pub fn step(&self, plan: Duration, forward: Duration, tokens: usize) {
        self.step.record(forward.as_secs_f64());
        self.step_tokens.record(tokens as f64);
        self.phases[0].record(plan.as_secs_f64());
        self.phases[1].record(forward.as_secs_f64());
    }

    /// It took this long to make tokens of a step's logits.
    pub fn collected(&self, time: Duration) {
        self.phases[2].record(time.as_secs_f64());
    }
}
