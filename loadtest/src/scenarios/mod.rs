//! What is measured: one module each.
pub mod ablation;
pub mod distribution;
pub mod gateway;
pub mod prefix;
