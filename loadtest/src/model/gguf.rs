//! Writes GGUF version 3: metadata, the tensors' names and shapes, then their bytes one after another.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>
use crate::random::Random;
use half::f16;
use std::io::{self, Write};

/// Values of a Q4_0 block.
pub const BLOCK: usize = 32;
/// Bytes of a Q4_0 block: an f16 scale, then 16 bytes of two codes each.
const BLOCK_BYTES: usize = 18;
/// Bytes of a Q8_0 block of as many values: an f16 scale, then a signed byte for each.
const BYTE_BLOCK_BYTES: usize = 34;
/// What every tensor's bytes begin at a multiple of.
const ALIGNMENT: u64 = 32;
/// Bytes that are made before they are written.
const CHUNK: usize = 1 << 18;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
}

/// What a tensor is filled with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fill {
    /// f32, all 1.
    Ones,
    /// f32, normally distributed around 0.
    Normal { deviation: f32 },
    /// Q4_0, evenly distributed around 0, with scales that differ.
    Blocks { deviation: f32 },
    /// Q8_0, in the same way.
    ByteBlocks { deviation: f32 },
}

/// A tensor in the making.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub name: String,
    /// Row-major: the last is the length of a row.
    pub shape: Vec<usize>,
    pub fill: Fill,
}

/// All but the tensors' bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    pub metadata: Vec<(String, Value)>,
    pub tensors: Vec<Tensor>,
}

fn put_text(out: &mut impl Write, text: &str) -> io::Result<()> {
    out.write_all(&(text.len() as u64).to_le_bytes())?;
    out.write_all(text.as_bytes())
}

impl Value {
    /// The number of its type in a file.
    fn kind(&self) -> u32 {
        match self {
            Self::U32(_) => 4,
            Self::F32(_) => 6,
            Self::Bool(_) => 7,
            Self::Text(_) => 8,
            Self::Texts(_) | Self::I32s(_) => 9,
        }
    }

    fn write(&self, out: &mut impl Write) -> io::Result<()> {
        out.write_all(&self.kind().to_le_bytes())?;
        let array = |out: &mut dyn Write, kind: u32, len: usize| -> io::Result<()> {
            out.write_all(&kind.to_le_bytes())?;
            out.write_all(&(len as u64).to_le_bytes())
        };
        match self {
            Self::U32(value) => out.write_all(&value.to_le_bytes()),
            Self::F32(value) => out.write_all(&value.to_le_bytes()),
            Self::Bool(value) => out.write_all(&[u8::from(*value)]),
            Self::Text(text) => put_text(out, text),
            Self::Texts(texts) => {
                array(out, 8, texts.len())?;
                texts.iter().try_for_each(|text| put_text(out, text))
            }
            Self::I32s(values) => {
                array(out, 5, values.len())?;
                values.iter().try_for_each(|value| out.write_all(&value.to_le_bytes()))
            }
        }
    }
}

impl Header {
    /// Bytes of all tensors, the gaps between them included.
    pub fn data_bytes(&self) -> u64 {
        self.tensors.iter().map(Tensor::padded_bytes).sum()
    }

    /// Writes it, up to where the first tensor's bytes begin.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let mut head = Vec::new();
        head.write_all(b"GGUF")?;
        head.write_all(&3u32.to_le_bytes())?;
        head.write_all(&(self.tensors.len() as u64).to_le_bytes())?;
        head.write_all(&(self.metadata.len() as u64).to_le_bytes())?;
        for (key, value) in &self.metadata {
            put_text(&mut head, key)?;
            value.write(&mut head)?;
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            put_text(&mut head, &tensor.name)?;
            head.write_all(&(tensor.shape.len() as u32).to_le_bytes())?;
            // the format has the length of a row first
            for dim in tensor.shape.iter().rev() {
                head.write_all(&(*dim as u64).to_le_bytes())?;
            }
            head.write_all(&tensor.fill.kind().to_le_bytes())?;
            head.write_all(&offset.to_le_bytes())?;
            offset += tensor.padded_bytes();
        }
        head.resize(head.len().next_multiple_of(ALIGNMENT as usize), 0);
        out.write_all(&head)
    }
}

impl Fill {
    /// The number of the tensor's type in a file.
    fn kind(self) -> u32 {
        match self {
            Self::Ones | Self::Normal { .. } => 0,
            Self::Blocks { .. } => 2,
            Self::ByteBlocks { .. } => 8,
        }
    }
}

impl Tensor {
    pub fn new(name: &str, shape: &[usize], fill: Fill) -> Self {
        Self { name: name.to_owned(), shape: shape.to_vec(), fill }
    }

    fn values(&self) -> usize {
        self.shape.iter().product()
    }

    /// Its size in a file.
    pub fn bytes(&self) -> u64 {
        match self.fill {
            Fill::Ones | Fill::Normal { .. } => self.values() as u64 * 4,
            Fill::Blocks { .. } => (self.values() / BLOCK * BLOCK_BYTES) as u64,
            Fill::ByteBlocks { .. } => (self.values() / BLOCK * BYTE_BLOCK_BYTES) as u64,
        }
    }

    fn padded_bytes(&self) -> u64 {
        self.bytes().next_multiple_of(ALIGNMENT)
    }

    /// Makes and writes its bytes; `written` is told of every piece.
    pub fn write(&self, random: &mut Random, out: &mut impl Write, written: &mut dyn FnMut(u64)) -> io::Result<()> {
        let mut left = self.values();
        let mut piece = Vec::with_capacity(CHUNK + BYTE_BLOCK_BYTES);
        while left > 0 {
            piece.clear();
            while left > 0 && piece.len() < CHUNK {
                left -= match self.fill {
                    Fill::Ones => put_f32(&mut piece, 1.0),
                    Fill::Normal { deviation } => put_f32(&mut piece, random.normal() as f32 * deviation),
                    Fill::Blocks { deviation } => put_block(&mut piece, random, deviation),
                    Fill::ByteBlocks { deviation } => put_byte_block(&mut piece, random, deviation),
                };
            }
            if left == 0 {
                piece.resize(piece.len() + (self.padded_bytes() - self.bytes()) as usize, 0);
            }
            out.write_all(&piece)?;
            written(piece.len() as u64);
        }
        Ok(())
    }
}

fn put_f32(out: &mut Vec<u8>, value: f32) -> usize {
    out.extend(value.to_le_bytes());
    1
}

/// Two codes of 16 random bits, each from 1 to 15: of Q4_0's values -8 to 7 those that are as likely with either sign.
fn two_codes(bits: u16) -> u8 {
    let both = ((u32::from(bits) * 225) >> 16) as u8;
    (both % 15 + 1) | (both / 15 + 1) << 4
}

/// Standard deviation of -7 to 7, all as likely: the root of (15 * 15 - 1) / 12.
const CODE_DEVIATION: f32 = 4.3205;

/// Standard deviation of -127 to 127, all as likely: the root of (255 * 255 - 1) / 12.
const BYTE_DEVIATION: f32 = 73.6116;

/// A block's scale: from 3/4 to 5/4 of what gives the deviation.
fn put_scale(out: &mut Vec<u8>, random: &mut Random, scale: f32) {
    out.extend(f16::from_f32(scale * (0.75 + 0.5 * random.unit() as f32)).to_le_bytes());
}

fn put_byte_block(out: &mut Vec<u8>, random: &mut Random, deviation: f32) -> usize {
    put_scale(out, random, deviation / BYTE_DEVIATION);
    out.extend((0..BLOCK).map(|_| (random.below(255) as i32 - 127) as i8 as u8));
    BLOCK
}

fn put_block(out: &mut Vec<u8>, random: &mut Random, deviation: f32) -> usize {
    put_scale(out, random, deviation / CODE_DEVIATION);
    for _ in 0..4 {
        let bits = random.bits();
        out.extend([0, 16, 32, 48].map(|shift| two_codes((bits >> shift) as u16)));
    }
    BLOCK
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    #[test]
    fn blocks_have_the_deviation_that_was_asked_for_and_no_bias() {
        let tensor = Tensor::new("t", &[64, 1024], Fill::Blocks { deviation: 0.25 });
        let (mut bytes, mut told) = (Vec::new(), 0);
        tensor.write(&mut Random::new(3), &mut bytes, &mut |piece| told += piece).unwrap();
        assert_eq!((bytes.len() as u64, told), (tensor.padded_bytes(), tensor.padded_bytes()));
        let mut values = Vec::new();
        for block in bytes.chunks_exact(BLOCK_BYTES) {
            let scale = f16::from_le_bytes([block[0], block[1]]).to_f64();
            for byte in &block[2..] {
                values.extend([byte & 15, byte >> 4].map(|code| (f64::from(code) - 8.0) * scale));
            }
        }
        assert_eq!(values.len(), 64 * 1024);
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let deviation = (values.iter().map(|x| x * x).sum::<f64>() / values.len() as f64).sqrt();
        assert!(mean.abs() < 0.005 && (deviation - 0.25).abs() < 0.01, "{mean} {deviation}");
    }

    #[test]
    fn blocks_of_bytes_have_it_too() {
        let tensor = Tensor::new("t", &[64, 512], Fill::ByteBlocks { deviation: 0.5 });
        let mut bytes = Vec::new();
        tensor.write(&mut Random::new(3), &mut bytes, &mut |_| ()).unwrap();
        assert_eq!((bytes.len(), tensor.fill.kind()), (64 * 512 / 32 * 34, 8));
        let mut values = Vec::new();
        for block in bytes.chunks_exact(BYTE_BLOCK_BYTES) {
            let scale = f16::from_le_bytes([block[0], block[1]]).to_f64();
            values.extend(block[2..].iter().map(|byte| f64::from(*byte as i8) * scale));
        }
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let deviation = (values.iter().map(|x| x * x).sum::<f64>() / values.len() as f64).sqrt();
        assert!(mean.abs() < 0.01 && (deviation - 0.5).abs() < 0.02, "{mean} {deviation}");
    }

    #[test]
    fn tensors_begin_at_multiples_of_the_alignment() {
        let tensors =
            vec![Tensor::new("a", &[3], Fill::Ones), Tensor::new("b", &[1, 32], Fill::Blocks { deviation: 1.0 })];
        let header = Header { metadata: vec![("k".into(), Value::Bool(true))], tensors };
        assert_eq!(header.data_bytes(), 64);
        let mut bytes = Vec::new();
        header.write(&mut bytes).unwrap();
        assert!(bytes.starts_with(b"GGUF") && bytes.len().is_multiple_of(32));
        // the second tensor's offset is the last number before the padding
        let last = bytes.iter().rposition(|byte| *byte != 0).unwrap();
        assert_eq!(bytes[last], 32);
    }
}
