//! What an operator can set.
use moesaic_config::HumanDuration;
use moesaic_proto::WireDType;
use moesaic_transport::subjects::Subject;
use moesaic_types::{BLOCK_TOKENS, Error, ReplicaId, Result};
use serde::{Deserialize, Serialize};

/// Who executes a replica's experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExpertsAt {
    /// The replica's own process.
    #[default]
    Own,
    /// The cluster's expert-shards.
    Shards,
}

/// The configuration of one replica.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address of the scheduler's own process; its /metrics, /live and /ready are 1000 ports above.
    pub grpc: String,
    /// How long running requests may go on after the signal to stop; 0s..=24h.
    pub drain_timeout: HumanDuration,
    /// The replica's name; in a cluster its process's own, `cluster.id`. 1 to 128 bytes without control characters.
    pub replica: String,
    /// The `model_name` label of the metrics.
    pub model_name: String,
    /// Tokens of one step at most, over all sequences; at least `max_running`.
    pub token_budget: usize,
    /// Prompt tokens that one sequence may take of a step.
    pub max_chunk: usize,
    /// Sequences in the batch at most.
    pub max_running: usize,
    /// Requests that may wait for their first step; further ones are refused.
    pub max_waiting: usize,
    /// KV blocks of 64 tokens. `None`: as many as `kv_memory_bytes` holds. Where the pool cannot hold one request of
    /// the model's context, the context is cut to the pool, with a warning at start.
    pub kv_blocks: Option<usize>,
    /// Bytes for the KV pool where `kv_blocks` is not set.
    pub kv_memory_bytes: u64,
    /// Reuse blocks of earlier requests that start with the same tokens.
    pub prefix_cache: bool,
    /// How long a request waits for blocks of the prefix store, in milliseconds.
    pub prefix_store_timeout_ms: u64,
    /// Evicted blocks that may be on their way to the prefix store at once; more are dropped.
    pub prefix_store_offers: usize,
    /// Deltas that wait for a slow reader before its tokens are gathered into one.
    pub delivery_capacity: usize,
    /// A request that waits longer than this is admitted before those of higher priority, in milliseconds.
    pub promote_after_ms: u64,
    /// Longest schema, regular expression or grammar, in bytes.
    pub max_grammar_bytes: usize,
    /// Grammars that are compiled at once; others wait.
    pub grammar_workers: usize,
    /// How long a grammar may wait for its compilation, and how long that may take, in milliseconds.
    pub grammar_timeout_ms: u64,
    /// Compiled grammars that are kept for further requests; 0 keeps none.
    pub grammar_cache: usize,
    /// A step that takes longer than this makes the replica not ready until it ends, in milliseconds. Above the
    /// longest step that the hardware needs for `token_budget` tokens.
    pub step_stalled_after_ms: u64,
    /// A step that takes longer than this makes the replica not live, so that the process is restarted, and ends the
    /// requests in flight so that they go on elsewhere; in milliseconds, at least `step_stalled_after_ms`.
    pub step_dead_after_ms: u64,
    /// Who executes the experts: `own`, this process; `shards`, the cluster's expert-shards.
    pub experts: ExpertsAt,
    /// How tokens travel to shards, and their experts' sums back: `f32` loses nothing, `bf16` halves and `int8` quarters
    /// the bytes.
    pub expert_activations: WireDType,
    /// How sums come back.
    pub expert_outputs: WireDType,
    /// Longest wait for one layer's experts, in milliseconds; then the step is run again. 100..=600000.
    pub expert_timeout_ms: u64,
    /// Experts that do not answer are asked again until a request's deadline. A request without one fails after this
    /// time, in milliseconds; and a replica whose experts have not answered for so long is not ready.
    pub experts_patience_ms: u64,
    /// The first pause before a crashed engine is started again, in milliseconds; doubles up to 30 s.
    pub restart_backoff_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            grpc: "127.0.0.1:9020".into(),
            drain_timeout: HumanDuration::from_secs(30),
            replica: "0".into(),
            model_name: "moesaic".into(),
            token_budget: 512,
            max_chunk: 512,
            max_running: 64,
            max_waiting: 1024,
            kv_blocks: None,
            kv_memory_bytes: 512 << 20,
            prefix_cache: true,
            prefix_store_timeout_ms: 2_000,
            prefix_store_offers: 16,
            delivery_capacity: 32,
            promote_after_ms: 60_000,
            max_grammar_bytes: 64 << 10,
            grammar_workers: 2,
            grammar_timeout_ms: 10_000,
            grammar_cache: 64,
            step_stalled_after_ms: 120_000,
            step_dead_after_ms: 600_000,
            experts: ExpertsAt::Own,
            expert_activations: WireDType::F32,
            expert_outputs: WireDType::F32,
            expert_timeout_ms: 30_000,
            experts_patience_ms: 30_000,
            restart_backoff_ms: 100,
        }
    }
}

impl Config {
    /// Checks bounds; the error names the key and the limit.
    pub fn validate(&self) -> Result<()> {
        let positive = [
            ("max_chunk", self.max_chunk),
            ("max_running", self.max_running),
            ("max_waiting", self.max_waiting),
            ("delivery_capacity", self.delivery_capacity),
            ("grammar_workers", self.grammar_workers),
        ];
        for (key, value) in positive {
            if value == 0 {
                return Err(Error::invalid(key, format!("{key} must be at least 1")));
            }
        }
        if self.token_budget < self.max_running {
            let message =
                format!("token_budget {} must be at least max_running {}", self.token_budget, self.max_running);
            return Err(Error::invalid("token_budget", message));
        }
        let milliseconds =
            [("grammar_timeout_ms", self.grammar_timeout_ms), ("step_stalled_after_ms", self.step_stalled_after_ms)];
        for (key, value) in milliseconds {
            if value == 0 {
                return Err(Error::invalid(key, format!("{key} must be at least 1")));
            }
        }
        if self.step_dead_after_ms < self.step_stalled_after_ms {
            let message = format!(
                "step_dead_after_ms {} must be at least step_stalled_after_ms {}",
                self.step_dead_after_ms, self.step_stalled_after_ms
            );
            return Err(Error::invalid("step_dead_after_ms", message));
        }
        if !(100..=600_000).contains(&self.expert_timeout_ms) {
            let message = format!("expert_timeout_ms is {}; use 100 to 600000", self.expert_timeout_ms);
            return Err(Error::invalid("expert_timeout_ms", message));
        }
        if self.kv_blocks == Some(0) {
            return Err(Error::invalid("kv_blocks", "kv_blocks must be at least 1"));
        }
        if !(1..=128).contains(&self.replica.len()) || self.replica.contains(char::is_control) {
            return Err(Error::invalid("replica", "replica must be 1 to 128 bytes without control characters"));
        }
        moesaic_service::check_drain("scheduler", self.drain_timeout)
    }

    /// How many blocks the pool has, when a block takes this many bytes.
    pub fn blocks(&self, block_bytes: usize) -> Result<usize> {
        let blocks = self.kv_blocks.unwrap_or((self.kv_memory_bytes / block_bytes.max(1) as u64) as usize);
        if blocks == 0 {
            let message = format!(
                "kv_memory_bytes {} holds no block of {BLOCK_TOKENS} tokens, which takes {block_bytes} bytes",
                self.kv_memory_bytes
            );
            return Err(Error::invalid("kv_memory_bytes", message));
        }
        Ok(blocks.min(u32::MAX as usize))
    }

    /// The replica's id.
    pub fn replica_id(&self) -> ReplicaId {
        ReplicaId::new(self.replica.as_str())
    }

    /// The subject of this replica's KV events.
    pub fn kv_subject(&self) -> String {
        Subject::kv(&self.replica).to_string()
    }
}
