//! What an operator can set.
use moesaic_config::{ByteSize, HumanDuration};
use moesaic_model::memory::Memory;
use moesaic_proto::WireDType;
use moesaic_transport::subjects::Subject;
use moesaic_types::{BLOCK_TOKENS, Error, ReplicaId, Result};
use serde::{Deserialize, Serialize};

/// The KV pool's least default, in bytes.
const DEFAULT_KV_BYTES: u64 = 512 << 20;
/// Requests of the model's context that the default pool holds, where memory allows.
const DEFAULT_CONTEXTS: usize = 2;
/// Blocks at most: a billion tokens.
const MAX_KV_BLOCKS: usize = 1 << 24;
/// The longest time that can be set, in milliseconds: a year.
const MAX_MS: u64 = 365 * 24 * 3600 * 1000;
/// The most for blocks of the prefix store.
const MAX_FETCHED: ByteSize = ByteSize::gib(1024);

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

/// When blocks that the prefix store has are fetched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FetchPolicy {
    /// When that is estimated to take less time than computing them, by what both took before.
    #[default]
    Estimated,
    /// Whenever it has any.
    Always,
    /// Not at all.
    Never,
}

/// Which blocks are offered to the prefix store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OfferPolicy {
    /// Those of prompts as soon as they are full where other replicas use the store as well, otherwise evicted ones.
    #[default]
    Auto,
    /// Those that the replica has no room for any longer.
    Evicted,
    /// Those of prompts as soon as they are full, and evicted ones that were not offered then.
    Full,
}

/// When waiting requests join the batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Batching {
    /// At every step.
    #[default]
    Continuous,
    /// When the batch before has ended; for comparison.
    Static,
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
    /// When waiting requests join the batch: `continuous`, at every step; `static`, when all of the batch before have
    /// ended, which is there for comparison.
    pub batching: Batching,
    /// Requests that may wait for their first step; further ones are refused.
    pub max_waiting: usize,
    /// KV blocks of 64 tokens. `None`: as many as `kv_memory_bytes` holds. Where the pool cannot hold one request of
    /// the model's context, the context is cut to the pool, with a warning at start.
    pub kv_blocks: Option<usize>,
    /// Memory for the KV pool where `kv_blocks` is not set, as `"8GiB"` or a number of bytes. `None`: what two requests
    /// of the model's context need, but no more than half of what the machine has available when the weights are
    /// loaded; never less than 512 MiB.
    pub kv_memory_bytes: Option<ByteSize>,
    /// Reuse blocks of earlier requests that start with the same tokens.
    pub prefix_cache: bool,
    /// How long a request waits for blocks of the prefix store, in milliseconds.
    pub prefix_store_timeout_ms: u64,
    /// Bytes of blocks of the prefix store that are on their way to sequences that wait for a place in the batch, or are
    /// there: as `"1GiB"` or a number of bytes, at most 1 TiB. Blocks beyond it are computed; less than one block takes
    /// fetches none.
    pub prefix_store_memory: ByteSize,
    /// When blocks of the prefix store are fetched: `estimated`, `always`, `never`.
    pub prefix_store_fetch: FetchPolicy,
    /// Which blocks are offered to the prefix store: `auto`, `evicted`, `full`.
    pub prefix_store_offer: OfferPolicy,
    /// Blocks that may be on their way to the prefix store at once. Of full blocks further ones wait, of evicted ones
    /// they are dropped.
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
    /// A step that does not get on for so long hangs: the replica is not ready until it does, and the requests in flight
    /// end so that they go on elsewhere; in milliseconds, 500..=600000. With the native backend its kernels tell how far
    /// they are; with candle it must be above the time that one layer takes for `token_budget` tokens. Waits for shards
    /// and stages do not count, for they have their own ends.
    pub step_silence_ms: u64,
    /// A step that takes longer than this makes the replica not live, so that the process is restarted, and ends the
    /// requests in flight so that they go on elsewhere; in milliseconds, at least `step_stalled_after_ms`.
    pub step_dead_after_ms: u64,
    /// Processes that the replica's layers are split over (pipeline stages); 1..=64.
    pub stages: usize,
    /// Which of them this one is. 0 takes requests; the others, with the same `[model]` and `stages`, serve it.
    pub stage: usize,
    /// The `cluster.id` of the process that has stage 0; for the others.
    pub stage_of: String,
    /// Who executes the experts: `own`, this process; `shards`, the cluster's expert-shards.
    pub experts: ExpertsAt,
    /// How tokens travel to shards, and their experts' sums back: `f32` loses nothing, `bf16` halves and `int8` quarters
    /// the bytes.
    pub expert_activations: WireDType,
    /// How sums come back.
    pub expert_outputs: WireDType,
    /// Longest wait for one layer's experts, in milliseconds; then the step is run again. 100..=600000.
    pub expert_timeout_ms: u64,
    /// A shard of which nothing came for so long, neither an answer nor a pulse of its computing thread, hangs or is cut
    /// off: experts that others hold too are asked there, in milliseconds. A pulse comes every 200 ms. 500..=60000.
    pub expert_silence_ms: u64,
    /// The same of a later stage, whose keys and values are lost with it: the replica's requests go on elsewhere, and it
    /// waits for the stage; in milliseconds, 500..=60000.
    pub stage_silence_ms: u64,
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
            batching: Batching::default(),
            max_waiting: 1024,
            kv_blocks: None,
            kv_memory_bytes: None,
            prefix_cache: true,
            prefix_store_timeout_ms: 2_000,
            prefix_store_memory: ByteSize::gib(1),
            prefix_store_fetch: FetchPolicy::default(),
            prefix_store_offer: OfferPolicy::default(),
            prefix_store_offers: 16,
            delivery_capacity: 32,
            promote_after_ms: 60_000,
            max_grammar_bytes: 64 << 10,
            grammar_workers: 2,
            grammar_timeout_ms: 10_000,
            grammar_cache: 64,
            step_stalled_after_ms: 120_000,
            step_silence_ms: 10_000,
            step_dead_after_ms: 600_000,
            stages: 1,
            stage: 0,
            stage_of: String::new(),
            experts: ExpertsAt::Own,
            expert_activations: WireDType::F32,
            expert_outputs: WireDType::F32,
            expert_timeout_ms: 30_000,
            expert_silence_ms: 1_500,
            stage_silence_ms: 3_000,
            experts_patience_ms: 30_000,
            restart_backoff_ms: 100,
        }
    }
}

impl Config {
    /// What is rounded between this replica and the shards; `None` where nothing is. Replicas that round otherwise have
    /// other keys and values for the same tokens, and an answer cannot go on from one at the other.
    pub fn rounding(&self) -> Option<String> {
        let exact = (WireDType::F32, WireDType::F32);
        let formats = (self.expert_activations, self.expert_outputs);
        (self.experts == ExpertsAt::Shards && formats != exact).then(|| format!("experts by {formats:?}"))
    }

    /// Checks bounds; the error names the key and the limit.
    pub fn validate(&self) -> Result<()> {
        let counts = [
            ("token_budget", self.token_budget, 1, 1 << 20),
            ("max_chunk", self.max_chunk, 1, 1 << 20),
            ("max_running", self.max_running, 1, 1 << 16),
            ("max_waiting", self.max_waiting, 1, 1 << 20),
            ("prefix_store_offers", self.prefix_store_offers, 0, 1 << 16),
            ("delivery_capacity", self.delivery_capacity, 1, 1 << 16),
            ("max_grammar_bytes", self.max_grammar_bytes, 0, 1 << 30),
            ("grammar_workers", self.grammar_workers, 1, 1024),
            ("grammar_cache", self.grammar_cache, 0, 1 << 20),
            ("stages", self.stages, 1, 64),
            ("stage", self.stage, 0, self.stages.max(1) - 1),
            ("kv_blocks", self.kv_blocks.unwrap_or(1), 1, MAX_KV_BLOCKS),
        ];
        for (key, value, least, most) in counts {
            if !(least..=most).contains(&value) {
                return Err(Error::invalid(key, format!("{key} is {value}; it must be from {least} to {most}")));
            }
        }
        if self.prefix_store_memory > MAX_FETCHED {
            let message = format!("prefix_store_memory is {}; use {MAX_FETCHED} at most", self.prefix_store_memory);
            return Err(Error::invalid("prefix_store_memory", message));
        }
        if self.token_budget < self.max_running {
            let message =
                format!("token_budget {} must be at least max_running {}", self.token_budget, self.max_running);
            return Err(Error::invalid("token_budget", message));
        }
        let milliseconds = [
            ("prefix_store_timeout_ms", self.prefix_store_timeout_ms, 0),
            ("promote_after_ms", self.promote_after_ms, 0),
            ("grammar_timeout_ms", self.grammar_timeout_ms, 1),
            ("step_stalled_after_ms", self.step_stalled_after_ms, 1),
            ("step_dead_after_ms", self.step_dead_after_ms, 1),
            ("experts_patience_ms", self.experts_patience_ms, 0),
            ("restart_backoff_ms", self.restart_backoff_ms, 0),
        ];
        for (key, value, least) in milliseconds {
            if !(least..=MAX_MS).contains(&value) {
                return Err(Error::invalid(key, format!("{key} is {value}; it must be from {least} to {MAX_MS}")));
            }
        }
        if self.step_dead_after_ms < self.step_stalled_after_ms {
            let message = format!(
                "step_dead_after_ms {} must be at least step_stalled_after_ms {}",
                self.step_dead_after_ms, self.step_stalled_after_ms
            );
            return Err(Error::invalid("step_dead_after_ms", message));
        }
        if self.stage > 0 && self.stage_of.is_empty() {
            let message = "stage_of is empty; name the cluster.id of the process that has stage 0";
            return Err(Error::invalid("stage_of", message));
        }
        let of_peers = [
            ("step_silence_ms", self.step_silence_ms, 500, 600_000),
            ("expert_timeout_ms", self.expert_timeout_ms, 100, 600_000),
            ("expert_silence_ms", self.expert_silence_ms, 500, 60_000),
            ("stage_silence_ms", self.stage_silence_ms, 500, 60_000),
        ];
        for (key, value, least, most) in of_peers {
            if !(least..=most).contains(&value) {
                return Err(Error::invalid(key, format!("{key} is {value}; use {least} to {most}")));
            }
        }
        if !(1..=128).contains(&self.replica.len()) || self.replica.contains(char::is_control) {
            return Err(Error::invalid("replica", "replica must be 1 to 128 bytes without control characters"));
        }
        moesaic_service::check_drain("scheduler", self.drain_timeout)
    }

    /// How many blocks the pool has, when a block takes this many bytes, for a model of this context.
    pub fn blocks(&self, block_bytes: usize, model_context: usize, memory: Memory) -> Result<usize> {
        let block = (block_bytes as u64).max(1);
        let (key, blocks) = match (self.kv_blocks, self.kv_memory_bytes) {
            (Some(blocks), _) => ("kv_blocks", blocks as u64),
            (None, Some(bytes)) => ("kv_memory_bytes", bytes.bytes() / block),
            (None, None) => {
                let wanted = (model_context.div_ceil(BLOCK_TOKENS) * DEFAULT_CONTEXTS) as u64;
                let bytes = wanted.saturating_mul(block).min(memory.available / 2).max(DEFAULT_KV_BYTES);
                ("kv_memory_bytes", bytes / block)
            }
        };
        if blocks == 0 {
            let message = format!("{key} holds no block of {BLOCK_TOKENS} tokens, which takes {block_bytes} bytes");
            return Err(Error::invalid(key, message));
        }
        let bytes = blocks.saturating_mul(block);
        if bytes > memory.total {
            let message = format!(
                "{key} asks for {blocks} blocks of {block_bytes} bytes, which is {bytes} bytes; the machine has {}",
                memory.total
            );
            return Err(Error::invalid(key, message));
        }
        Ok(usize::try_from(blocks).unwrap_or(usize::MAX).min(MAX_KV_BLOCKS))
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    const GIB: u64 = 1 << 30;

    fn machine(total: u64, available: u64) -> Memory {
        Memory { total, available }
    }

    #[test]
    fn rounding_on_the_way_to_shards_is_told() {
        let shards = Config { experts: ExpertsAt::Shards, ..Config::default() };
        let rounded = Config { expert_outputs: WireDType::Bf16, ..shards.clone() };
        assert_eq!((Config::default().rounding(), shards.rounding()), (None, None));
        assert_eq!(Config { experts: ExpertsAt::Own, ..rounded.clone() }.rounding(), None, "nothing travels");
        let other = Config { expert_activations: WireDType::Int8, ..rounded.clone() };
        assert!(rounded.rounding().is_some() && rounded.rounding() != other.rounding());
    }

    #[test]
    fn values_that_nothing_can_hold_are_refused_by_name_and_limit() {
        assert_eq!(Config::default().validate(), Ok(()));
        let most = usize::MAX;
        let cases = [
            (Config { kv_blocks: Some(4_000_000_000), ..Config::default() }, "kv_blocks", "16777216"),
            (Config { kv_blocks: Some(0), ..Config::default() }, "kv_blocks", "from 1"),
            (Config { max_waiting: most, ..Config::default() }, "max_waiting", "1048576"),
            (Config { delivery_capacity: most, ..Config::default() }, "delivery_capacity", "65536"),
            (Config { prefix_store_offers: most, ..Config::default() }, "prefix_store_offers", "65536"),
            (Config { grammar_workers: most, ..Config::default() }, "grammar_workers", "1024"),
            (Config { prefix_store_memory: ByteSize::gib(1025), ..Config::default() }, "prefix_store_memory", "1TiB"),
            (Config { token_budget: most, ..Config::default() }, "token_budget", "1048576"),
            (Config { max_running: most, ..Config::default() }, "max_running", "65536"),
            (Config { promote_after_ms: u64::MAX, ..Config::default() }, "promote_after_ms", "31536000000"),
            (Config { grammar_timeout_ms: 0, ..Config::default() }, "grammar_timeout_ms", "from 1"),
            (Config { expert_timeout_ms: 99, ..Config::default() }, "expert_timeout_ms", "100"),
            (Config { expert_silence_ms: 499, ..Config::default() }, "expert_silence_ms", "500"),
            (Config { stage_silence_ms: 60_001, ..Config::default() }, "stage_silence_ms", "60000"),
        ];
        for (config, key, limit) in cases {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(key) && error.contains(limit), "{error}");
        }
    }

    #[test]
    fn a_pool_that_the_machine_does_not_hold_is_refused() {
        let config = Config { kv_memory_bytes: Some(ByteSize::gib(1)), ..Config::default() };
        assert_eq!(config.blocks(1 << 20, 1000, machine(2 * GIB, GIB)), Ok(1024));
        let error = config.blocks(1 << 20, 1000, machine(GIB / 2, GIB)).unwrap_err().to_string();
        assert!(error.contains("kv_memory_bytes") && error.contains(&(GIB / 2).to_string()), "{error}");
        let error = config.blocks(2 << 30, 1000, machine(2 * GIB, GIB)).unwrap_err().to_string();
        assert!(error.contains("holds no block"), "{error}");
        let config = Config { kv_blocks: Some(1 << 24), ..Config::default() };
        for block in [1 << 20, usize::MAX] {
            let error = config.blocks(block, 1000, machine(2 * GIB, GIB)).unwrap_err().to_string();
            assert!(error.contains("kv_blocks") && error.contains(&block.to_string()), "{error}");
        }
    }

    #[test]
    fn the_default_pool_holds_two_contexts_where_memory_allows() {
        let blocks = |block: usize, context, available| {
            Config::default().blocks(block, context, machine(64 * GIB, available)).unwrap()
        };
        // a model of 98 KiB a token and a context of 40,960
        let block = 64 * (98 << 10);
        assert_eq!(blocks(block, 40_960, 60 * GIB), 2 * 40_960 / 64);
        assert_eq!(blocks(block, 40_960, 4 * GIB), (2 * GIB) as usize / block);
        assert_eq!(
            blocks(block, 40_960, 0),
            (512 << 20) / block,
            "what the machine has bounds it from above only so far"
        );
        assert_eq!(blocks(1 << 20, 4096, 60 * GIB), 512, "a small model has 512 MiB");
    }
}
