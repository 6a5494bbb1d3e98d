//! Paged attention: blocks of 64 tokens, keys and values in f32, bf16 or int8 (one f32 scale a token and head).
//!
//! Shapes: q `[queries, heads, k_dim]`, out `[queries, heads, v_dim]`; a block holds, for each KV head, 64 keys and 64
//! values. Scores and sums are f32. Each (query, head) walks the blocks in position order with an online softmax that
//! is updated once a block, so its bits depend on its own keys only: not on chunking, batch or threads.
//! Source: Dao et al., FlashAttention (2022); Kwon et al., PagedAttention (2023).
use crate::Error;
use crate::gemm::{Kernels, Shared};
use crate::isa::for_each_isa;
use half::bf16;

/// Tokens of a block.
pub const BLOCK: usize = 64;
const LANES: usize = 16;

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
    fn row_bytes(&self, dim: usize) -> usize {
        match self.format {
            KvFormat::F32 => dim * 4,
            KvFormat::Bf16 => dim * 2,
            KvFormat::Int8 => dim + 4,
        }
    }

    fn k_bytes(&self) -> usize {
        self.kv_heads * BLOCK * self.row_bytes(self.k_dim)
    }

    /// Bytes of one block of this layer.
    pub fn block_len(&self) -> usize {
        self.k_bytes() + if self.v_in_k { 0 } else { self.kv_heads * BLOCK * self.row_bytes(self.v_dim) }
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
    pub fn new(shape: KvShape, blocks: usize) -> Self {
        Self { shape, blocks, bytes: vec![0; shape.block_len() * blocks] }
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
        write_rows(&shape, keys, slot, k, shape.k_dim);
        if !shape.v_in_k {
            assert_eq!(v.len(), shape.kv_heads * shape.v_dim, "v is [kv_heads, v_dim]");
            write_rows(&shape, values, slot, v, shape.v_dim);
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

fn write_rows(shape: &KvShape, bytes: &mut [u8], slot: usize, values: &[f32], dim: usize) {
    let row_bytes = shape.row_bytes(dim);
    for (head, values) in values.chunks_exact(dim).enumerate() {
        let row = &mut bytes[(head * BLOCK + slot) * row_bytes..][..row_bytes];
        match shape.format {
            KvFormat::F32 => {
                row.as_chunks_mut::<4>().0.iter_mut().zip(values).for_each(|(b, v)| *b = v.to_le_bytes());
            }
            KvFormat::Bf16 => {
                let pairs = row.as_chunks_mut::<2>().0.iter_mut();
                pairs.zip(values).for_each(|(b, v)| *b = bf16::from_f32(*v).to_le_bytes());
            }
            KvFormat::Int8 => {
                let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
                let scale = largest / 127.0;
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                let (head, rest) = row.split_at_mut(4);
                head.copy_from_slice(&scale.to_le_bytes());
                for (b, v) in rest.iter_mut().zip(values) {
                    *b = (v * inverse).round().clamp(-127.0, 127.0) as i8 as u8;
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
            for query in 0..sequence.queries {
                tasks.extend((0..shape.kv_heads).map(|kv_head| (index, first + query, query, kv_head)));
            }
            first += sequence.queries;
        }
        let chunk = tasks.len().div_ceil(self.pool.threads() * 8).max(1);
        let out = Shared::new(out);
        let group = call.heads / shape.kv_heads;
        self.pool.run(tasks.len().div_ceil(chunk), &|task| {
            let mut scratch = Scratch::new(group, shape.k_dim.max(shape.v_dim));
            for &(index, row, query, kv_head) in &tasks[task * chunk..((task + 1) * chunk).min(tasks.len())] {
                let first_head = kv_head * group;
                let q = &q[(row * call.heads + first_head) * shape.k_dim..][..group * shape.k_dim];
                let start = (row * call.heads + first_head) * shape.v_dim;
                // SAFETY: each (row, KV head) is one task's, and its heads' outputs are that range alone.
                let out = unsafe { out.slice(start, group * shape.v_dim) };
                let sequence = &sequences[index];
                attend(self.isa, kv, call, sequence.blocks, sequence.start + query, kv_head, q, out, &mut scratch);
            }
        });
    }
}

/// A task's working space.
struct Scratch {
    /// One block's keys, then values, in f32.
    rows: Vec<f32>,
    /// Scores `[group][64]`.
    scores: Vec<[f32; BLOCK]>,
    max: Vec<f32>,
    sum: Vec<f32>,
}

impl Scratch {
    fn new(group: usize, dim: usize) -> Self {
        Self {
            rows: vec![0.0; BLOCK * dim],
            scores: vec![[0.0; BLOCK]; group],
            max: vec![0.0; group],
            sum: vec![0.0; group],
        }
    }
}

for_each_isa! {
    /// All heads of one KV head for one query.
    fn attend(
        kv: &KvLayer,
        call: &AttentionCall<'_>,
        blocks: &[u32],
        position: usize,
        kv_head: usize,
        q: &[f32],
        out: &mut [f32],
        scratch: &mut Scratch,
    ) => attend_body
}

#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "a kernel's inner call")]
fn attend_body(
    kv: &KvLayer,
    call: &AttentionCall<'_>,
    blocks: &[u32],
    position: usize,
    kv_head: usize,
    q: &[f32],
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let shape = kv.shape;
    let group = call.heads / shape.kv_heads;
    let first_head = kv_head * group;
    let Scratch { rows, scores, max, sum } = scratch;
    for head in 0..group {
        // a sink is a key without a value that is there from the start
        let sink = call.sinks.map(|s| s[first_head + head]);
        max[head] = sink.unwrap_or(f32::NEG_INFINITY);
        sum[head] = if sink.is_some() { 1.0 } else { 0.0 };
    }
    out.fill(0.0);
    let oldest = call.window.map_or(0, |window| (position + 1).saturating_sub(window));
    let first = oldest / BLOCK;
    for (index, block) in blocks[first..=position / BLOCK].iter().enumerate() {
        let base = (first + index) * BLOCK;
        let from = oldest.saturating_sub(base);
        let to = (position + 1 - base).min(BLOCK);
        let bytes = kv.block(*block);
        let (keys, values) = bytes.split_at(shape.k_bytes());
        load_rows(&shape, keys, kv_head, shape.k_dim, from, to, rows);
        for head in 0..group {
            let q = &q[head * shape.k_dim..][..shape.k_dim];
            let slope = call.alibi.map_or(0.0, |a| a[first_head + head]);
            let mut largest = max[head];
            for slot in from..to {
                let mut score = dot(q, &rows[slot * shape.k_dim..][..shape.k_dim]) * call.scale;
                score += slope * ((base + slot) as f32 - position as f32);
                scores[head][slot] = score;
                largest = largest.max(score);
            }
            let correction = if max[head] == largest { 1.0 } else { (max[head] - largest).exp() };
            let mut total = sum[head] * correction;
            for score in &mut scores[head][from..to] {
                *score = (*score - largest).exp();
                total += *score;
            }
            max[head] = largest;
            sum[head] = total;
            if correction != 1.0 {
                for o in &mut out[head * shape.v_dim..][..shape.v_dim] {
                    *o *= correction;
                }
            }
        }
        let stride = if shape.v_in_k {
            shape.k_dim
        } else {
            load_rows(&shape, values, kv_head, shape.v_dim, from, to, rows);
            shape.v_dim
        };
        for head in 0..group {
            let out = &mut out[head * shape.v_dim..][..shape.v_dim];
            for slot in from..to {
                let weight = scores[head][slot];
                for (o, v) in out.iter_mut().zip(&rows[slot * stride..][..shape.v_dim]) {
                    *o = weight.mul_add(*v, *o);
                }
            }
        }
    }
    for head in 0..group {
        let inverse = 1.0 / sum[head];
        for o in &mut out[head * shape.v_dim..][..shape.v_dim] {
            *o *= inverse;
        }
    }
}

/// Expands slots `from..to` of one head to f32.
#[inline(always)]
fn load_rows(shape: &KvShape, bytes: &[u8], head: usize, dim: usize, from: usize, to: usize, rows: &mut [f32]) {
    let row_bytes = shape.row_bytes(dim);
    let bytes = &bytes[(head * BLOCK + from) * row_bytes..(head * BLOCK + to) * row_bytes];
    let rows = &mut rows[from * dim..to * dim];
    match shape.format {
        KvFormat::F32 => {
            for (v, b) in rows.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *v = f32::from_le_bytes(*b);
            }
        }
        KvFormat::Bf16 => {
            for (v, b) in rows.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *v = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
            }
        }
        KvFormat::Int8 => {
            for (row, bytes) in rows.chunks_exact_mut(dim).zip(bytes.chunks_exact(row_bytes)) {
                let scale = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                for (v, b) in row.iter_mut().zip(&bytes[4..]) {
                    *v = f32::from(*b as i8) * scale;
                }
            }
        }
    }
}

/// A dot product in 16 lanes, then pairwise: the order depends on the length only.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    let mut lanes = [0f32; LANES];
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for lane in 0..LANES {
            lanes[lane] = a[lane].mul_add(b[lane], lanes[lane]);
        }
    }
    for (lane, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[lane] = a.mul_add(*b, lanes[lane]);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}
