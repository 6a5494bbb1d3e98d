//! The scheduler: one replica. Continuous batching over a paged KV cache with prefix reuse, sampling, structured
//! output, preemption, priorities and deadlines.
//!
//! [`Scheduler`] is the door. [`planner`], [`pool`], [`sampler`] and [`health`] are pure; [`engine`] is the thread that joins
//! them with a model; [`actors`] keep that thread alive.
#![forbid(unsafe_code)]

pub mod actors;
pub mod admission;
mod answer;
mod app;
pub mod config;
pub mod engine;
pub mod experts;
pub mod grammar;
pub mod health;
pub mod metrics;
pub mod model;
mod outcome;
pub mod pipeline;
pub mod planner;
pub mod pool;
pub mod prefix;
pub mod process;
pub mod sampler;
mod telling;
mod vocabulary;
mod watchdog;

pub use app::Scheduler;
pub use config::Config;
pub use engine::{Info, RunnerFactory, Snapshot};
pub use process::SchedulerProcess;
pub use vocabulary::Vocabulary;
