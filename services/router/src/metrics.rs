//! What the router records; the names stand in `moesaic-telemetry`.
use crate::canary::Outcome;
use metrics::{counter, gauge, histogram};
use moesaic_telemetry::metrics as names;
use moesaic_types::boundary::Placed;
use moesaic_types::cluster::Placement;
use moesaic_types::{Digest, Error};
use std::time::Duration;

pub(crate) fn placed(placed: &Placed) {
    counter!(names::ROUTER_PLACEMENTS_TOTAL, "replica" => placed.replica.to_string()).increment(1);
    counter!(names::ROUTER_OVERLAP_BLOCKS_TOTAL).increment(placed.overlap_blocks as u64);
}

pub(crate) fn refused() {
    counter!(names::ROUTER_REFUSALS_TOTAL).increment(1);
}

/// Requests stand in line.
pub(crate) fn line(count: usize) {
    gauge!(names::ROUTER_QUEUE_WAITING).set(count as f64);
}

/// A request was taken out of the line after so long.
pub(crate) fn waited(time: Duration) {
    histogram!(names::ROUTER_QUEUE_SECONDS).record(time.as_secs_f64());
}

/// A request found the line full, or its time in line ended.
pub(crate) fn turned_away(error: &Error) {
    counter!(names::ROUTER_QUEUE_REFUSALS_TOTAL, "reason" => error.code.name()).increment(1);
}

pub(crate) fn canary(outcome: &Outcome) {
    let outcome = match outcome {
        Outcome::Works(_) => "works",
        Outcome::Failed(_) => "failed",
        Outcome::Unclear(_) => "refused",
    };
    counter!(names::ROUTER_CANARIES_TOTAL, "outcome" => outcome).increment(1);
}

pub(crate) fn canary_disagrees() {
    counter!(names::ROUTER_CANARY_DISAGREEMENTS_TOTAL).increment(1);
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

pub(crate) fn leads_placement(leads: bool) {
    gauge!(names::PLACEMENT_LEADER).set(u8::from(leads));
}

pub(crate) fn placement(model: &Digest, placement: Option<&Placement>, imbalance: Option<f64>, groups: usize) {
    let label = model.0[..6].iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    gauge!(names::PLACEMENT_GROUPS, "model" => label.clone()).set(groups as f64);
    if let Some(placement) = placement {
        gauge!(names::PLACEMENT_EPOCH, "model" => label.clone()).set(placement.epoch as f64);
    }
    if let Some(imbalance) = imbalance {
        gauge!(names::PLACEMENT_IMBALANCE, "model" => label).set(imbalance);
    }
}

pub(crate) fn expert_moves(count: usize) {
    counter!(names::PLACEMENT_MOVES_TOTAL).increment(count as u64);
}

pub(crate) fn placement_changed(is_done: bool) {
    let outcome = if is_done { "done" } else { "failed" };
    counter!(names::PLACEMENT_CHANGES_TOTAL, "outcome" => outcome).increment(1);
}
