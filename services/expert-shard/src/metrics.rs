//! Names of the shard's metrics.

/// Counter: tokens sent to experts, a token once for each of its experts; label `layer`.
pub const EXPERT_TOKENS_TOTAL: &str = "moesaic_expert_tokens_total";
/// Counter: dispatches that failed; label `layer`.
pub const EXPERT_FAILURES_TOTAL: &str = "moesaic_expert_failures_total";
/// Histogram: seconds that a layer's experts took for one dispatch.
pub const EXPERT_SECONDS: &str = "moesaic_expert_dispatch_seconds";
