//! Words that every Moesaic service shares: ids, requests, errors, block hashes and the boundary traits.
//!
//! This crate knows no runtime (tokio), no wire format (tonic) and no tensors (candle).
#![forbid(unsafe_code)]

pub mod boundary;
pub mod cluster;
pub mod error;
pub mod hash;
pub mod ids;
pub mod request;
pub mod routing;
pub mod weights;

pub use error::{Error, ErrorCode, Result};
pub use hash::{BlockHash, BlockHasher, Digest, GROUP_BLOCKS, Link, TenantId, TenantSalt};
pub use ids::{ReplicaId, RequestId, TokenId};
pub use request::{
    Delta, FinishReason, GenerateRequest, Grammar, Priority, SampledToken, SamplingParams, StopConditions, Usage,
};
pub use routing::Routing;
pub use weights::{KvFormat, WeightFormat};

/// Tokens in one KV block (the page of the paged KV cache).
pub const BLOCK_TOKENS: usize = 64;
