//! Paged attention: blocks of 64 tokens, keys and values in f32, bf16 or int8 (one f32 scale a token and head).
//!
//! Shapes: q `[queries, heads, k_dim]`, out `[queries, heads, v_dim]`. A block holds, for each KV head, its keys as
//! `[k_dim][64]` (so that 64 scores are made side by side) and its values as `[64][v_dim]`; int8 has 64 scales in front
//! of each. Scores and sums are f32. Each (query, head) walks the blocks in position order with an online softmax that
//! is updated once a block, so its bits depend on its own keys only: not on chunking, batch or threads.
//! Outline: a task is one KV head of one sequence and a tile of queries, which share each block's expansion to f32.
//! Source: Dao et al., FlashAttention (2022); Kwon et al., PagedAttention (2023).
use crate::Error;
use crate::gemm::{Kernels, Shared};
use crate::isa::for_each_isa;
use half::bf16;

/// Tokens of a block.
pub const BLOCK: usize = 64;
/// Queries that share a block's expansion.
const TILE: usize = 16;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvFormat {
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// int8 with an f32 scale for each token and head.
    Int8,
}

/// One layer's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// KV heads.
    pub kv_heads: usize,
    /// Values of a key.
    pub k_dim: usize,
    /// Values of a value.
    pub v_dim: usize,
    /// The value is the key's first `v_dim` values (latent attention) and is not stored.
    pub v_in_k: bool,
    /// Storage.
    pub format: KvFormat,
}

impl KvShape {
    /// Bytes of one head's keys or values of a block, scales included.
    fn head_bytes(&self, dim: usize) -> usize {
        BLOCK
            * match self.format {
                KvFormat::F32 => dim * 4,
                KvFormat::Bf16 => dim * 2,
                KvFormat::Int8 => dim + 4,
            }
    }

    fn k_bytes(&self) -> usize {
        self.kv_heads * self.head_bytes(self.k_dim)
    }

    /// Bytes of one block of this layer.
    pub fn block_len(&self) -> usize {
        self.k_bytes() + if self.v_in_k { 0 } else { self.kv_heads * self.head_bytes(self.v_dim) }
    }
}

/// The blocks of one layer.
pub struct KvLayer {
    shape: KvShape,
    blocks: usize,
    bytes: Vec<u8>,
}

impl KvLayer {
    /// Zeroed blocks.
    ///
    /// # Errors
    /// `Memory` when so many bytes cannot be had.
    pub fn new(shape: KvShape, blocks: usize) -> Result<Self, Error> {
        let memory = || Error::Memory { blocks, block_len: shape.block_len() };
        let len = shape.block_len().checked_mul(blocks).ok_or_else(memory)?;
        // `vec!` takes pages that are zero already, but aborts where there are none: ask first
        Vec::<u8>::new().try_reserve_exact(len).map_err(|_| memory())?;
        Ok(Self { shape, blocks, bytes: vec![0; len] })
    }

    /// The shape.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Bytes of one block.
    pub fn block_len(&self) -> usize {
        self.shape.block_len()
    }

    fn block(&self, block: u32) -> &[u8] {
        let len = self.block_len();
        &self.bytes[block as usize * len..][..len]
    }

    /// Writes one token's keys `[kv_heads, k_dim]` and values `[kv_heads, v_dim]` (empty with `v_in_k`).
    ///
    /// # Panics
    /// When the block or slot does not exist or a length is wrong.
    pub fn write(&mut self, block: u32, slot: usize, k: &[f32], v: &[f32]) {
        let shape = self.shape;
        assert!((block as usize) < self.blocks && slot < BLOCK, "block {block}, slot {slot} of {}", self.blocks);
        assert_eq!(k.len(), shape.kv_heads * shape.k_dim, "k is [kv_heads, k_dim]");
        let len = shape.block_len();
        let bytes = &mut self.bytes[block as usize * len..][..len];
        let (keys, values) = bytes.split_at_mut(shape.k_bytes());
        write_token(&shape, keys, slot, k, shape.k_dim, |i| i * BLOCK + slot);
        if !shape.v_in_k {
            assert_eq!(v.len(), shape.kv_heads * shape.v_dim, "v is [kv_heads, v_dim]");
            write_token(&shape, values, slot, v, shape.v_dim, |i| slot * shape.v_dim + i);
        }
    }

    /// Appends one block's bytes.
    pub fn export(&self, block: u32, out: &mut Vec<u8>) {
        out.extend_from_slice(self.block(block));
    }

    /// Fills one block.
    ///
    /// # Errors
    /// `Block` when the length is wrong.
    pub fn import(&mut self, block: u32, bytes: &[u8]) -> Result<(), Error> {
        let len = self.block_len();
        if bytes.len() != len {
            return Err(Error::Block { expected: len, actual: bytes.len() });
        }
        self.bytes[block as usize * len..][..len].copy_from_slice(bytes);
        Ok(())
    }
}

/// Writes one token's values of all heads; value i of a head goes to element `place(i)`.
fn write_token(
    shape: &KvShape,
    bytes: &mut [u8],
    slot: usize,
    values: &[f32],
    dim: usize,
    place: impl Fn(usize) -> usize,
) {
    let heads = bytes.chunks_exact_mut(shape.head_bytes(dim));
    for (bytes, values) in heads.zip(values.chunks_exact(dim)) {
        match shape.format {
            KvFormat::F32 => {
                let elements = bytes.as_chunks_mut::<4>().0;
                values.iter().enumerate().for_each(|(i, v)| elements[place(i)] = v.to_le_bytes());
            }
            KvFormat::Bf16 => {
                let elements = bytes.as_chunks_mut::<2>().0;
                values.iter().enumerate().for_each(|(i, v)| elements[place(i)] = bf16::from_f32(*v).to_le_bytes());
            }
            KvFormat::Int8 => {
                let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
                let scale = largest / 127.0;
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                // the inverse of a denormal overflows
                let quantize = |v: f32| if inverse.is_finite() { v * inverse } else { v / scale };
                let (scales, elements) = bytes.split_at_mut(BLOCK * 4);
                scales[slot * 4..][..4].copy_from_slice(&scale.to_le_bytes());
                for (i, v) in values.iter().enumerate() {
                    elements[place(i)] = quantize(*v).round().clamp(-127.0, 127.0) as i8 as u8;
                }
            }
        }
    }
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
        let shape = kv.shape;
        let total: usize = sequences.iter().map(|s| s.queries).sum();
        assert_eq!(call.heads % shape.kv_heads, 0, "heads are a multiple of the KV heads");
        assert_eq!(q.len(), total * call.heads * shape.k_dim, "q is [queries, heads, k_dim]");
        assert_eq!(out.len(), total * call.heads * shape.v_dim, "out is [queries, heads, v_dim]");
        assert!(call.sinks.is_none_or(|s| s.len() == call.heads) && call.alibi.is_none_or(|a| a.len() == call.heads));
        let mut first = 0;
        let mut tasks = Vec::new();
        for (index, sequence) in sequences.iter().enumerate() {
            assert!(sequence.blocks.len() * BLOCK >= sequence.start + sequence.queries, "blocks cover the positions");
            assert!(sequence.blocks.iter().all(|b| (*b as usize) < kv.blocks), "blocks exist");
            for query in (0..sequence.queries).step_by(TILE) {
                let rows = TILE.min(sequence.queries - query);
                tasks.extend((0..shape.kv_heads).map(|kv_head| (index, first, query, rows, kv_head)));
            }
            first += sequence.queries;
        }
        let chunk = tasks.len().div_ceil(self.pool.threads() * 8).max(1);
        let out = Shared::new(out);
        let group = call.heads / shape.kv_heads;
        self.pool.run(tasks.len().div_ceil(chunk), &|task| {
            let mut scratch = Scratch::default();
            for &(index, first, query, rows, kv_head) in &tasks[task * chunk..((task + 1) * chunk).min(tasks.len())] {
                let sequence = &sequences[index];
                let tile = Tile { blocks: sequence.blocks, position: sequence.start + query, rows, kv_head };
                let first_head = kv_head * group;
                scratch.start(&shape, call, &tile, group);
                for row in 0..rows {
                    let from = ((first + query + row) * call.heads + first_head) * shape.k_dim;
                    scratch.q[row * group * shape.k_dim..][..group * shape.k_dim]
                        .copy_from_slice(&q[from..][..group * shape.k_dim]);
                }
                attend(self.isa, kv, call, &tile, &mut scratch);
                for row in 0..rows {
                    let to = ((first + query + row) * call.heads + first_head) * shape.v_dim;
                    let width = group * shape.v_dim;
                    // SAFETY: each (row, KV head) is one task's, and its heads' outputs are that range alone.
                    let out = unsafe { out.slice(to, width) };
                    out.copy_from_slice(&scratch.out[row * width..][..width]);
                }
            }
        });
    }
}

/// Consecutive queries of one sequence and one KV head.
struct Tile<'a> {
    blocks: &'a [u32],
    /// Of the first query.
    position: usize,
    rows: usize,
    kv_head: usize,
}

/// A task's working space; a line is one (query, head) of the tile.
#[derive(Default)]
struct Scratch {
    /// `[lines][k_dim]`.
    q: Vec<f32>,
    /// One block's keys in f32, `[k_dim][64]`.
    keys: Vec<f32>,
    /// One block's values in f32, `[64][v_dim]`.
    values: Vec<f32>,
    /// Largest score so far, for each line.
    max: Vec<f32>,
    /// Sum of the exponentials so far, for each line.
    sum: Vec<f32>,
    /// `[lines][v_dim]`.
    out: Vec<f32>,
}

impl Scratch {
    fn start(&mut self, shape: &KvShape, call: &AttentionCall<'_>, tile: &Tile<'_>, group: usize) {
        let lines = tile.rows * group;
        self.q.resize(lines * shape.k_dim, 0.0);
        self.keys.resize(BLOCK * shape.k_dim, 0.0);
        self.values.resize(BLOCK * shape.v_dim, 0.0);
        self.out.clear();
        self.out.resize(lines * shape.v_dim, 0.0);
        self.max.clear();
        self.sum.clear();
        for line in 0..lines {
            // a sink is a key without a value that is there from the start
            let sink = call.sinks.map(|sinks| sinks[tile.kv_head * group + line % group]);
            self.max.push(sink.unwrap_or(f32::NEG_INFINITY));
            self.sum.push(if sink.is_some() { 1.0 } else { 0.0 });
        }
    }
}

for_each_isa! {
    /// All lines of a tile; `scratch` holds the queries and takes the outputs.
    fn attend(kv: &KvLayer, call: &AttentionCall<'_>, tile: &Tile<'_>, scratch: &mut Scratch) => attend_body
}

#[inline(always)]
fn attend_body(kv: &KvLayer, call: &AttentionCall<'_>, tile: &Tile<'_>, scratch: &mut Scratch) {
    let shape = kv.shape;
    let group = call.heads / shape.kv_heads;
    let Scratch { q, keys, values, max, sum, out } = scratch;
    let oldest_of = |position: usize| call.window.map_or(0, |window| (position + 1).saturating_sub(window));
    let last = tile.position + tile.rows - 1;
    for index in oldest_of(tile.position) / BLOCK..=last / BLOCK {
        let base = index * BLOCK;
        let (k, v) = kv.block(tile.blocks[index]).split_at(shape.k_bytes());
        let head = shape.head_bytes(shape.k_dim);
        expand_keys(&shape, &k[tile.kv_head * head..][..head], keys);
        if shape.v_in_k {
            for (d, line) in keys.as_chunks::<BLOCK>().0[..shape.v_dim].iter().enumerate() {
                for (slot, value) in line.iter().enumerate() {
                    values[slot * shape.v_dim + d] = *value;
                }
            }
        } else {
            let head = shape.head_bytes(shape.v_dim);
            expand_values(&shape, &v[tile.kv_head * head..][..head], values);
        }
        for row in 0..tile.rows {
            let position = tile.position + row;
            // a query of the tile may end before this block, or see nothing of it any more
            let from = oldest_of(position).saturating_sub(base);
            let to = (position + 1).saturating_sub(base).min(BLOCK);
            if from >= to {
                continue;
            }
            for line in row * group..(row + 1) * group {
                let slope = call.alibi.map_or(0.0, |a| a[tile.kv_head * group + line % group]);
                let mut scores = score(&q[line * shape.k_dim..][..shape.k_dim], keys);
                let mut largest = max[line];
                for (slot, score) in scores.iter_mut().enumerate().take(to).skip(from) {
                    *score = *score * call.scale + slope * ((base + slot) as f32 - position as f32);
                    largest = largest.max(*score);
                }
                let correction = if max[line] == largest { 1.0 } else { (max[line] - largest).exp() };
                let mut total = sum[line] * correction;
                for score in &mut scores[from..to] {
                    *score = (*score - largest).exp();
                    total += *score;
                }
                max[line] = largest;
                sum[line] = total;
                let out = &mut out[line * shape.v_dim..][..shape.v_dim];
                if correction != 1.0 {
                    out.iter_mut().for_each(|o| *o *= correction);
                }
                for slot in from..to {
                    let weight = scores[slot];
                    for (o, v) in out.iter_mut().zip(&values[slot * shape.v_dim..][..shape.v_dim]) {
                        *o = weight.mul_add(*v, *o);
                    }
                }
            }
        }
    }
    for (out, sum) in out.chunks_exact_mut(shape.v_dim).zip(sum) {
        let inverse = 1.0 / *sum;
        out.iter_mut().for_each(|o| *o *= inverse);
    }
}

/// The scores of a query with the 64 keys of a block; each is summed over the dimensions in order.
#[inline(always)]
fn score(q: &[f32], keys: &[f32]) -> [f32; BLOCK] {
    let mut scores = [0f32; BLOCK];
    for (value, line) in q.iter().zip(keys.as_chunks::<BLOCK>().0) {
        for (score, key) in scores.iter_mut().zip(line) {
            *score = value.mul_add(*key, *score);
        }
    }
    scores
}

/// One head's keys of a block to f32, `[k_dim][64]`.
#[inline(always)]
fn expand_keys(shape: &KvShape, bytes: &[u8], keys: &mut [f32]) {
    if shape.format != KvFormat::Int8 {
        return widen(shape.format, bytes, keys);
    }
    let (scales, elements) = bytes.split_at(BLOCK * 4);
    let scales = scales.as_chunks::<4>().0;
    for (line, bytes) in keys.as_chunks_mut::<BLOCK>().0.iter_mut().zip(elements.as_chunks::<BLOCK>().0) {
        for ((v, b), s) in line.iter_mut().zip(bytes).zip(scales) {
            *v = f32::from(*b as i8) * f32::from_le_bytes(*s);
        }
    }
}

/// One head's values of a block to f32, `[64][v_dim]`.
#[inline(always)]
fn expand_values(shape: &KvShape, bytes: &[u8], values: &mut [f32]) {
    if shape.format != KvFormat::Int8 {
        return widen(shape.format, bytes, values);
    }
    let (scales, elements) = bytes.split_at(BLOCK * 4);
    let rows = values.chunks_exact_mut(shape.v_dim).zip(elements.chunks_exact(shape.v_dim));
    for ((row, bytes), scale) in rows.zip(scales.as_chunks::<4>().0) {
        let scale = f32::from_le_bytes(*scale);
        for (v, b) in row.iter_mut().zip(bytes) {
            *v = f32::from(*b as i8) * scale;
        }
    }
}

#[inline(always)]
fn widen(format: KvFormat, bytes: &[u8], out: &mut [f32]) {
    if format == KvFormat::F32 {
        for (v, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *v = f32::from_le_bytes(*b);
        }
    } else {
        for (v, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *v = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
        }
    }
}
