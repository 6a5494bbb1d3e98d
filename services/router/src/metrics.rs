//! What the router records; the names stand in `moesaic-telemetry`.
use metrics::{counter, gauge};
use moesaic_telemetry::metrics as names;
use moesaic_types::boundary::Placed;

pub(crate) fn placed(placed: &Placed) {
    counter!(names::ROUTER_PLACEMENTS_TOTAL, "replica" => placed.replica.to_string()).increment(1);
    counter!(names::ROUTER_OVERLAP_BLOCKS_TOTAL).increment(placed.overlap_blocks as u64);
}

pub(crate) fn refused() {
    counter!(names::ROUTER_REFUSALS_TOTAL).increment(1);
}

pub(crate) fn replicas_ready(count: usize) {
    gauge!(names::ROUTER_REPLICAS_READY).set(count as f64);
}

pub(crate) fn index_entries(count: usize) {
    gauge!(names::ROUTER_INDEX_BLOCKS).set(count as f64);
}

pub(crate) fn event_gap() {
    counter!(names::ROUTER_EVENT_GAPS_TOTAL).increment(1);
}
