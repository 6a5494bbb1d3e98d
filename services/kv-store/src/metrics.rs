//! Names of the store's metrics.

/// Counter: blocks that were asked for and found.
pub const HITS_TOTAL: &str = "moesaic_kv_store_hits_total";
/// Counter: chains that were asked for and ended early.
pub const MISSES_TOTAL: &str = "moesaic_kv_store_misses_total";
/// Counter: blocks that were put out for others.
pub const EVICTIONS_TOTAL: &str = "moesaic_kv_store_evictions_total";
/// Gauge: bytes of the blocks that are kept.
pub const BYTES: &str = "moesaic_kv_store_bytes";
