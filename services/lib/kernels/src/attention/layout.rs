//! The blocks of a layer's cache and the order of their bytes, which is the same on all instruction sets: blocks
//! travel between hosts.
//!
//! A block of 64 tokens holds the keys of KV head 0, 1, .. and then their values (none with `v_in_k`). All numbers are
//! little-endian; a *line* is what one 64-byte vector takes at a time (32 bytes of int8).
//!
//! | | keys of a head | values of a head |
//! | --- | --- | --- |
//! | f32 | 4 runs of 16 tokens, `[k_dim][16 tokens]` | tiles of 16 dimensions, `[64 tokens][16 dimensions]` |
//! | bf16 | 4 runs, `[k_dim / 2][16 tokens][2 dimensions]` | tiles, `[32 pairs of tokens][16 dimensions][2 tokens]` |
//! | int8 | 64 f32 scales, then as bf16 | 64 f32 scales, then as bf16 |
//!
//! So a vector of keys is multiplied with one value (or pair) of a query to 16 tokens' scores, and a vector of values
//! with one weight (or pair of weights) to 16 dimensions of the output. An odd `k_dim` is filled up with a zero; the
//! dimensions that fill up the last tile of values are never read into a result. Slots that are not written may hold
//! anything: attention does not let them into a result either.
use crate::Error;
use crate::storage::map_zeroed;
use half::bf16;
use memmap2::MmapMut;

/// Tokens of a block.
pub const BLOCK: usize = 64;
/// Lanes of a vector: the tokens of a run of keys, the dimensions of a tile of values.
pub(super) const LANES: usize = 16;

/// What a vector register takes: a line of a block in f32 or bf16.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u32; LANES]);

impl Line {
    pub(super) const ZERO: Self = Self([0; LANES]);
}

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
    /// Lines of a run of keys: a dimension each in f32, otherwise a pair.
    pub(super) fn key_lines(&self) -> usize {
        if self.format == KvFormat::F32 { self.k_dim } else { self.k_dim.div_ceil(2) }
    }

    /// Tiles of values.
    pub(super) fn tiles(&self) -> usize {
        self.v_dim.div_ceil(LANES)
    }

    /// Lines of a block's tile of values: a token each in f32, otherwise a pair.
    pub(super) fn tile_lines(&self) -> usize {
        if self.format == KvFormat::F32 { BLOCK } else { BLOCK / 2 }
    }

    /// Bytes of so many lines of a head in a block, scales included.
    fn bytes_of(&self, lines: usize) -> usize {
        match self.format {
            KvFormat::F32 | KvFormat::Bf16 => lines * size_of::<Line>(),
            KvFormat::Int8 => BLOCK * 4 + lines * size_of::<Line>() / 2,
        }
    }

    /// Bytes of one head's keys in a block.
    pub(super) fn key_bytes(&self) -> usize {
        self.bytes_of(BLOCK / LANES * self.key_lines())
    }

    /// Bytes of one head's values in a block.
    pub(super) fn value_bytes(&self) -> usize {
        if self.v_in_k { 0 } else { self.bytes_of(self.tiles() * self.tile_lines()) }
    }

    /// Bytes of one block of this layer.
    pub fn block_len(&self) -> usize {
        self.kv_heads * (self.key_bytes() + self.value_bytes())
    }

    /// Where dimension `d` of the key of `slot` stands among its head's numbers.
    fn key_place(&self, slot: usize, d: usize) -> usize {
        let (run, lane) = (slot / LANES, slot % LANES);
        match self.format {
            KvFormat::F32 => (run * self.k_dim + d) * LANES + lane,
            KvFormat::Bf16 | KvFormat::Int8 => ((run * self.key_lines() + d / 2) * LANES + lane) * 2 + d % 2,
        }
    }

    /// Where dimension `d` of the value of `slot` stands among its head's numbers.
    fn value_place(&self, slot: usize, d: usize) -> usize {
        let (tile, lane) = (d / LANES, d % LANES);
        match self.format {
            KvFormat::F32 => (tile * BLOCK + slot) * LANES + lane,
            KvFormat::Bf16 | KvFormat::Int8 => ((tile * BLOCK / 2 + slot / 2) * LANES + lane) * 2 + slot % 2,
        }
    }
}

/// The blocks of one layer.
pub struct KvLayer {
    shape: KvShape,
    blocks: usize,
    bytes: MmapMut,
}

impl KvLayer {
    /// Zeroed blocks, whose memory is taken when they are first written.
    ///
    /// # Errors
    /// `Memory` when so many bytes cannot be had.
    pub fn new(shape: KvShape, blocks: usize) -> Result<Self, Error> {
        let memory = || Error::Memory { blocks, block_len: shape.block_len() };
        let len = shape.block_len().checked_mul(blocks).filter(|len| *len <= isize::MAX as usize).ok_or_else(memory)?;
        // a mapping starts on a page's bound, and so do its lines on their own
        let bytes = map_zeroed(len.max(1)).map_err(|_| memory())?;
        Ok(Self { shape, blocks, bytes })
    }

    /// The shape.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Bytes of one block.
    pub fn block_len(&self) -> usize {
        self.shape.block_len()
    }

    /// How many there are.
    pub(super) fn blocks(&self) -> usize {
        self.blocks
    }

    fn block(&self, block: u32) -> &[u8] {
        let len = self.block_len();
        &self.bytes[block as usize * len..][..len]
    }

    /// One head's keys of a block.
    pub(super) fn keys(&self, block: u32, head: usize) -> &[u8] {
        let len = self.shape.key_bytes();
        &self.block(block)[head * len..][..len]
    }

    /// One head's values of a block.
    pub(super) fn values(&self, block: u32, head: usize) -> &[u8] {
        let len = self.shape.value_bytes();
        &self.block(block)[self.shape.kv_heads * self.shape.key_bytes() + head * len..][..len]
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
        let (keys, values) = bytes.split_at_mut(shape.kv_heads * shape.key_bytes());
        for (bytes, k) in keys.chunks_exact_mut(shape.key_bytes()).zip(k.chunks_exact(shape.k_dim)) {
            let place = |d| shape.key_place(slot, d);
            write_token(shape.format, bytes, slot, k, place);
            if shape.format != KvFormat::F32 && !shape.k_dim.is_multiple_of(2) {
                // the pair's other half: the query has a zero there, which must not meet a NaN
                let zero = place(shape.k_dim);
                match shape.format {
                    KvFormat::Int8 => bytes[BLOCK * 4 + zero] = 0,
                    _ => bytes[zero * 2..][..2].fill(0),
                }
            }
        }
        if !shape.v_in_k {
            assert_eq!(v.len(), shape.kv_heads * shape.v_dim, "v is [kv_heads, v_dim]");
            for (bytes, v) in values.chunks_exact_mut(shape.value_bytes()).zip(v.chunks_exact(shape.v_dim)) {
                write_token(shape.format, bytes, slot, v, |d| shape.value_place(slot, d));
            }
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

/// Writes one token's key or value of one head; dimension d goes to number `place(d)`.
fn write_token(format: KvFormat, bytes: &mut [u8], slot: usize, values: &[f32], place: impl Fn(usize) -> usize) {
    match format {
        KvFormat::F32 => {
            let numbers = bytes.as_chunks_mut::<4>().0;
            values.iter().enumerate().for_each(|(d, v)| numbers[place(d)] = v.to_le_bytes());
        }
        KvFormat::Bf16 => {
            let numbers = bytes.as_chunks_mut::<2>().0;
            values.iter().enumerate().for_each(|(d, v)| numbers[place(d)] = bf16::from_f32(*v).to_le_bytes());
        }
        KvFormat::Int8 => {
            let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
            let scale = largest / 127.0;
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            // the inverse of a denormal overflows
            let quantize = |v: f32| if inverse.is_finite() { v * inverse } else { v / scale };
            let (scales, numbers) = bytes.split_at_mut(BLOCK * 4);
            scales[slot * 4..][..4].copy_from_slice(&scale.to_le_bytes());
            for (d, v) in values.iter().enumerate() {
                numbers[place(d)] = quantize(*v).round().clamp(-127.0, 127.0) as i8 as u8;
            }
        }
    }
}
