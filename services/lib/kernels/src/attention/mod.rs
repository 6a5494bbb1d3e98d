//! Paged attention: blocks of 64 tokens, keys and values in f32, bf16 or int8 (one f32 scale a token and head).
//!
//! Shapes: q `[queries, heads, k_dim]`, out `[queries, heads, v_dim]`; the blocks' bytes are described in `layout`.
//! Every KV head's keys and values are read once for all its heads, and for several queries of a sequence.
//!
//! A *line* is one (query, head). Each line takes the context in chunks on a grid that starts at position 0; a chunk has
//! an ordinary softmax, and the chunks' results are joined in order. The order of a line's operations depends on its own
//! position only, so its bits do not depend on chunking of the prompt, batch, tile or threads, nor on whether its chunks
//! were computed on one thread or on several.
//!
//! That is so for finite keys and values. With f32 and bf16 a value (with `v_in_k` one of the key's) that is not finite
//! may also reach a line that does not see its token, where another line of the tile sees it (a later query, or an
//! earlier one that has it in its window) or it is the other of a seen token's pair: the line weighs it with 0, and 0
//! times an infinity or NaN is NaN. Keys on their own reach nobody who does not see them. With int8 neither does: codes
//! are finite, a token that is not finite has a scale of NaN, and a scale is left out by who does not see it; who sees it
//! gives NaN.
//!
//! Numbers: scores, weights and sums are f32. With f32 keys and values all else is too (`{isa}-f32`), and all
//! instruction sets agree to the bit. With bf16 and int8 the queries and the weights are rounded to bf16, and products
//! run on pairs: by `vdpbf16ps` where the CPU has it (`avx512-bf16-pairs`), which takes denormals for zero, otherwise by
//! fused multiply-add in the same order (`{isa}-pairs`). Against attention in f64 over the stored keys and values the
//! error of an output is at most 2⁻⁸ of the largest value for the weights, and what a relative error of 2⁻⁸ in each
//! product of q and k makes of the scores.
//! Source: Dao et al., FlashAttention (2022); Kwon et al., PagedAttention (2023); DeepSeek-AI, DeepSeek-V2 (2024) for
//! the latent form.
#[cfg(target_arch = "x86_64")]
mod bf16;
#[cfg(target_arch = "x86_64")]
mod codes;
mod dots;
mod expand;
mod layout;
mod plan;
mod softmax;
mod tile;
mod write;

pub use layout::{BLOCK, KvFormat, KvLayer, KvShape};

use crate::gemm::{Kernels, Shared};
use layout::LANES;
use plan::Plan;
use std::cell::RefCell;
use tile::{Buffer, Context, Workspace};

/// Tokens of a chunk at most.
const CHUNK: usize = 512;
/// From one line's scores to the next's, and of its weights in f32: off a power of two, so that lines do not share sets
/// of the cache.
const ROW: usize = CHUNK + LANES;
/// From one line's weights in pairs to the next's.
const PAIR_ROW: usize = CHUNK / 2 + LANES;

/// Tokens of a chunk: its keys and values stay in the second-level cache.
fn chunk_tokens(shape: &KvShape) -> usize {
    if shape.k_dim > 256 { CHUNK / 2 } else { CHUNK }
}

thread_local! {
    static SPACE: RefCell<Workspace> = RefCell::default();
    static PLAN: RefCell<(Plan, Buffer)> = RefCell::default();
}

/// What all sequences of a layer share.
#[derive(Clone, Copy, Debug)]
pub struct AttentionCall<'a> {
    /// Query heads; a multiple of the KV heads.
    pub heads: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// A query sees this many positions, its own among them.
    pub window: Option<usize>,
    /// A logit for each head that takes part in the softmax and has no value.
    pub sinks: Option<&'a [f32]>,
    /// A slope for each head: `slope · (key position - query position)` is added to the score.
    pub alibi: Option<&'a [f32]>,
}

/// One sequence's queries.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSequence<'a> {
    /// Its blocks in order; keys and values of all queries are written already.
    pub blocks: &'a [u32],
    /// Position of the first query.
    pub start: usize,
    /// Queries.
    pub queries: usize,
}

impl Kernels {
    /// Attention of every query over the positions up to its own.
    ///
    /// # Panics
    /// When a slice's length or a block is not what the shapes say.
    pub fn attention(
        &self,
        kv: &KvLayer,
        call: &AttentionCall<'_>,
        sequences: &[AttentionSequence<'_>],
        q: &[f32],
        out: &mut [f32],
    ) {
        let shape = kv.shape();
        let total: usize = sequences.iter().map(|s| s.queries).sum();
        assert_eq!(call.heads % shape.kv_heads, 0, "heads are a multiple of the KV heads");
        assert_eq!(q.len(), total * call.heads * shape.k_dim, "q is [queries, heads, k_dim]");
        assert_eq!(out.len(), total * call.heads * shape.v_dim, "out is [queries, heads, v_dim]");
        assert!(call.sinks.is_none_or(|s| s.len() == call.heads) && call.alibi.is_none_or(|a| a.len() == call.heads));
        PLAN.with_borrow_mut(|(plan, partial)| {
            plan.make(kv, call, sequences, self.pool.threads());
            let plan = &*plan;
            let partial = Shared::new(partial.floats(plan.partial));
            let context = Context { isa: self.isa, kv, call, sequences, q, out: Shared::new(out), partial, plan };
            self.pool.run(plan.ends.len(), &|dispatch| {
                let first = if dispatch == 0 { 0 } else { plan.ends[dispatch - 1] };
                SPACE.with_borrow_mut(|space| {
                    for task in &plan.tasks[first..plan.ends[dispatch]] {
                        context.work(task, space);
                    }
                });
            });
        });
    }
}
