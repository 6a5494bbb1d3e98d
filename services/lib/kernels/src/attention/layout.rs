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
//!
//! int8: a number is scale times code, the code from -127 to 127; -128 never stands there, also not in a slot that is
//! not written ([`KvLayer::import`] refuses it). The scale is max|x| / 127, and NaN where a value is infinite or no
//! number: codes cannot say so, and the attention that sees the token must not give a plausible result.
use crate::Error;
use crate::storage::map_zeroed;
use memmap2::MmapMut;
use std::ops::Range;

/// Tokens of a block.
pub const BLOCK: usize = 64;
/// Lanes of a vector: the tokens of a run of keys, the dimensions of a tile of values.
pub(super) const LANES: usize = 16;

/// What a vector register takes: a line of a block in f32 or bf16.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u32; LANES]);

/// A line of int8.
pub(super) type Codes = [u8; 2 * LANES];

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

    /// Where some lines stand among the bytes of a head in a block, behind the scales.
    fn bytes_of(&self, lines: Range<usize>) -> Range<usize> {
        let at = |line: usize| match self.format {
            KvFormat::F32 | KvFormat::Bf16 => line * size_of::<Line>(),
            KvFormat::Int8 => BLOCK * 4 + line * size_of::<Line>() / 2,
        };
        at(lines.start)..at(lines.end)
    }

    /// Where a run's keys of dimensions 16 · `dims` and on, 16 of them at most, stand among a head's.
    pub(super) fn key_square(&self, run: usize, dims: usize) -> Range<usize> {
        let (all, lines) = (self.key_lines(), self.square_lines());
        self.bytes_of(run * all + dims * lines..run * all + ((dims + 1) * lines).min(all))
    }

    /// Where a run's values of one tile stand among a head's.
    pub(super) fn value_square(&self, run: usize, tile: usize) -> Range<usize> {
        let first = tile * self.tile_lines() + run * self.square_lines();
        self.bytes_of(first..first + self.square_lines())
    }

    /// Lines of 16 tokens' 16 dimensions.
    fn square_lines(&self) -> usize {
        self.tile_lines() * LANES / BLOCK
    }

    /// Bytes of one head's keys in a block.
    pub(super) fn key_bytes(&self) -> usize {
        self.bytes_of(0..BLOCK / LANES * self.key_lines()).end
    }

    /// Bytes of one head's values in a block.
    pub(super) fn value_bytes(&self) -> usize {
        if self.v_in_k { 0 } else { self.bytes_of(0..self.tiles() * self.tile_lines()).end }
    }

    /// Bytes of one block of this layer.
    pub fn block_len(&self) -> usize {
        self.kv_heads * (self.key_bytes() + self.value_bytes())
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

    /// All blocks.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
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

    /// Appends one block's bytes.
    pub fn export(&self, block: u32, out: &mut Vec<u8>) {
        out.extend_from_slice(self.block(block));
    }

    /// Fills one block.
    ///
    /// # Errors
    /// `Block` when the length is wrong; `Code` when an int8 number is -128, which no writer makes and which instruction
    /// sets would widen to different numbers.
    pub fn import(&mut self, block: u32, bytes: &[u8]) -> Result<(), Error> {
        let len = self.block_len();
        if bytes.len() != len {
            return Err(Error::Block { expected: len, actual: bytes.len() });
        }
        if self.codes(bytes).any(|codes| codes.contains(&0x80)) {
            return Err(Error::Code);
        }
        self.bytes[block as usize * len..][..len].copy_from_slice(bytes);
        Ok(())
    }

    /// The int8 numbers in a block's bytes, without their scales.
    fn codes<'a>(&self, bytes: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
        let shape = self.shape;
        let (keys, values) = bytes.split_at(shape.kv_heads * shape.key_bytes());
        let heads = keys.chunks_exact(shape.key_bytes()).chain(values.chunks_exact(shape.value_bytes().max(1)));
        heads.take_while(move |_| shape.format == KvFormat::Int8).map(|head| &head[BLOCK * 4..])
    }
}
