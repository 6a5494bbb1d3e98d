//! The scheduler's actors.
pub mod engine_control;
