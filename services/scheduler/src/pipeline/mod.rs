//! Pipeline stages in other processes: a replica's later layers run in schedulers that take no requests of their own.
//!
//! The replica's engine ([`RemoteStages`]) has a stream to each stage ([`StageServer`]). A micro-batch goes through them
//! one after another, and while it is in one the others work on those before and behind it. A stage keeps keys and
//! values for one life of the engine: when a stream ends, or nothing comes of a stage any longer, the engine begins a new
//! life, and its requests go on at another replica, or here again. A stage goes to later lives only.
mod client;
mod fence;
mod peers;
mod relay;
mod server;

pub use client::{RemoteStages, StageOptions, StageOwner, StagePeer};
pub use peers::{Generation, Stages};
pub use server::{LateStage, StageFactory, StageServer, stage_service};
