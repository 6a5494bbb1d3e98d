//! CPU kernels: packed weight matrices, matrix products, experts, paged attention, and the small operations between.
//!
//! The only crate with `unsafe`. Every kernel computes an output element in an order that depends on that element's
//! own inputs only, never on the batch, the tile or the thread: a row's result is the same bits alone and in a batch.
//! The bodies are portable loops over fixed lanes with fused multiply-add, compiled once for each instruction set and
//! chosen at run time; those written for one instruction set do the same operations in the same order (or exact ones of
//! integers in any), so that all instruction sets agree to the bit. Two exceptions: with `avx512-bf16` products of bf16
//! numbers take denormals for zeros (bf16 weights, and attention over bf16 and int8 keys and values); and which of its
//! bit patterns a NaN has. That a row does not see the others holds in attention for finite keys and values (`attention`
//! says what else may happen).
#![allow(unsafe_code)]

mod activation;
mod activations;
pub mod attention;
mod bf16;
mod by_head;
pub mod ceilings;
pub mod elementwise;
mod few;
#[cfg(target_arch = "x86_64")]
mod fused;
pub mod gemm;
mod inputs;
mod int8;
pub mod isa;
pub mod likelihood;
pub mod moe;
pub mod packed;
pub mod pool;
mod rows;
mod runs;
pub mod storage;

pub use activation::Activation;
pub use activations::ActivationFormat;
pub use attention::{AttentionCall, AttentionSequence, KvFormat, KvLayer, KvShape};
pub use gemm::{Kernels, Product};
pub use isa::Isa;
pub use moe::ExpertWeights;
pub use packed::{Format, PackedMatrix};
pub use pool::Pool;
pub use storage::{AlignedBytes, MappedFile, Storage};

/// What can be wrong with a kernel's inputs.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Packed bytes have the wrong length.
    #[error("packed {rows} x {cols} matrix needs {expected} bytes, has {actual}")]
    Length {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// Bytes that the format needs.
        expected: usize,
        /// Bytes that are there.
        actual: usize,
    },
    /// Packed bytes do not start on a 64-byte bound.
    #[error("packed matrix starts at byte {offset}, which is no multiple of 64")]
    Alignment {
        /// Where it starts.
        offset: usize,
    },
    /// A 4-bit format has groups of a length that no kernel reads.
    #[error("groups of {group} 4-bit values are not supported: use 32, 64 or 128")]
    Group {
        /// Values of a group.
        group: u16,
    },
    /// A token is routed to an expert that is not held here.
    #[error("expert {expert} is not held here")]
    Expert {
        /// The expert.
        expert: u32,
    },
    /// The blocks of a layer do not fit in memory.
    #[error("{blocks} kv blocks of {block_len} bytes in a layer cannot be allocated")]
    Memory {
        /// Blocks.
        blocks: usize,
        /// Bytes of a block in one layer.
        block_len: usize,
    },
    /// A KV block's bytes have the wrong length.
    #[error("a kv block needs {expected} bytes, has {actual}")]
    Block {
        /// Bytes of a block.
        expected: usize,
        /// Bytes that are there.
        actual: usize,
    },
    /// A KV block has an int8 number that no writer makes.
    #[error("a kv block has an int8 number of -128")]
    Code,
}
