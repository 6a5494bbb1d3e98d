//! GGUF files of made-up models: every matrix in one block format, its bytes as the test chooses them.
use super::noise;
use half::f16;
use std::collections::BTreeMap;
use std::path::Path;

/// A block format of 32 values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Blocks {
    Q4_0,
    Q5_0,
    Q8_0,
    Mxfp4,
}

impl Blocks {
    /// Its number in a file, and the bytes of a block.
    fn layout(self) -> (u32, usize) {
        match self {
            Self::Q4_0 => (2, 18),
            Self::Q5_0 => (6, 22),
            Self::Q8_0 => (8, 34),
            Self::Mxfp4 => (39, 17),
        }
    }

    /// Blocks for so many values, any code in them, with scales of both signs near `1 / 64` of the largest code's.
    fn random(self, seed: u64, values: usize) -> Vec<u8> {
        let size = self.layout().1;
        let mut bytes = noise(seed, values / 32 * size);
        for (i, block) in bytes.chunks_exact_mut(size).enumerate() {
            if self == Self::Mxfp4 {
                block[0] = 117 + (i % 4) as u8;
                continue;
            }
            let largest = [8.0, 16.0, 128.0][self as usize];
            let scale = (1.0 + (i % 7) as f32) / 64.0 / largest * if i % 3 == 0 { -1.0 } else { 1.0 };
            block[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
        }
        bytes
    }

    /// ggml's formula.
    pub fn values(self, bytes: &[u8]) -> Vec<f32> {
        let mut out = Vec::new();
        for block in bytes.chunks_exact(self.layout().1) {
            let d = match self {
                Self::Mxfp4 => 2f32.powi(i32::from(block[0]) - 128),
                _ => f16::from_le_bytes([block[0], block[1]]).to_f32(),
            };
            let nibbles = |bytes: &[u8]| -> Vec<i32> {
                let low = bytes.iter().map(|b| i32::from(b & 15));
                low.chain(bytes.iter().map(|b| i32::from(b >> 4))).collect()
            };
            let codes: Vec<i32> = match self {
                Self::Q4_0 => nibbles(&block[2..]).into_iter().map(|code| code - 8).collect(),
                Self::Q5_0 => {
                    let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
                    let fifth = |i: usize| (high >> i & 1) as i32 * 16;
                    nibbles(&block[6..]).into_iter().enumerate().map(|(i, code)| code + fifth(i) - 16).collect()
                }
                Self::Mxfp4 => {
                    let twice = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];
                    nibbles(&block[1..]).into_iter().map(|code| twice[code as usize]).collect()
                }
                Self::Q8_0 => block[2..].iter().map(|b| i32::from(*b as i8)).collect(),
            };
            out.extend(codes.into_iter().map(|code| code as f32 * d));
        }
        out
    }
}

/// A tensor: shape, the type's number, bytes.
type Tensor = (Vec<usize>, u32, Vec<u8>);

/// A file in the making.
#[derive(Clone, Default)]
pub struct Gguf {
    /// The type's number and the value's bytes of each key.
    metadata: BTreeMap<String, Vec<u8>>,
    pub tensors: BTreeMap<String, Tensor>,
}

fn text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

impl Gguf {
    /// A key that is there already gets the new value.
    fn value(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.metadata.insert(key.to_owned(), [&kind.to_le_bytes(), value].concat());
    }

    pub fn text(&mut self, key: &str, value: &str) {
        let mut bytes = Vec::new();
        text(&mut bytes, value);
        self.value(key, 8, &bytes);
    }

    pub fn number(&mut self, key: &str, value: u32) {
        self.value(key, 4, &value.to_le_bytes());
    }

    pub fn float(&mut self, key: &str, value: f32) {
        self.value(key, 6, &value.to_le_bytes());
    }

    pub fn flag(&mut self, key: &str, value: bool) {
        self.value(key, 7, &[value.into()]);
    }

    /// A tensor of f32.
    pub fn plain(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensors.insert(name.to_owned(), (shape.to_vec(), 0, bytes));
    }

    /// A tensor of blocks.
    pub fn blocks(&mut self, name: &str, shape: &[usize], blocks: Blocks, bytes: Vec<u8>) {
        self.tensors.insert(name.to_owned(), (shape.to_vec(), blocks.layout().0, bytes));
    }

    /// A tensor of random blocks.
    pub fn random(&mut self, name: &str, shape: &[usize], blocks: Blocks) {
        let seed = name.bytes().fold(1, |seed: u64, b| seed.wrapping_mul(31).wrapping_add(b.into()));
        self.blocks(name, shape, blocks, blocks.random(seed, shape.iter().product()));
    }

    /// The file's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(&mut out, key);
            out.extend(value);
        }
        let mut data: Vec<u8> = Vec::new();
        for (name, (shape, kind, bytes)) in &self.tensors {
            text(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|dim| out.extend((*dim as u64).to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }

    pub fn write(&self, path: &Path) {
        std::fs::write(path, self.bytes()).unwrap();
    }
}

/// Widths of the made-up models; none of those that count rows is a multiple of a panel's.
pub const HIDDEN: usize = 64;
pub const INNER: usize = 96;
pub const VOCAB: usize = 70;
pub const EXPERTS: usize = 5;

/// A model of two layers: `llama` (dense or with experts), `qwen2moe` (a shared expert) or `qwen3` (tied).
pub fn model(architecture: &str, experts: bool, stacked: bool, blocks: Blocks) -> Gguf {
    let mut file = Gguf::default();
    file.text("general.architecture", architecture);
    let key = |name: &str| format!("{architecture}.{name}");
    for (name, value) in [
        ("block_count", 2),
        ("context_length", 128),
        ("embedding_length", HIDDEN as u32),
        ("feed_forward_length", INNER as u32),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
    ] {
        file.number(&key(name), value);
    }
    file.random("token_embd.weight", &[VOCAB, HIDDEN], blocks);
    file.plain("output_norm.weight", &[HIDDEN], &[1.0; HIDDEN]);
    if architecture != "qwen3" {
        file.random("output.weight", &[VOCAB, HIDDEN], blocks);
    }
    if experts {
        file.number(&key("expert_count"), EXPERTS as u32);
        file.number(&key("expert_used_count"), 2);
        file.number(&key("expert_feed_forward_length"), INNER as u32);
    }
    for layer in 0..2 {
        let at = |name: &str| format!("blk.{layer}.{name}.weight");
        for norm in ["attn_norm", "ffn_norm"] {
            file.plain(&at(norm), &[HIDDEN], &[1.0; HIDDEN]);
        }
        if architecture == "qwen3" {
            file.plain(&at("attn_q_norm"), &[HIDDEN / 4], &[1.0; HIDDEN / 4]);
            file.plain(&at("attn_k_norm"), &[HIDDEN / 4], &[1.0; HIDDEN / 4]);
        }
        for (name, rows) in
            [("attn_q", HIDDEN), ("attn_k", HIDDEN / 2), ("attn_v", HIDDEN / 2), ("attn_output", HIDDEN)]
        {
            file.random(&at(name), &[rows, HIDDEN], blocks);
        }
        let networks = [("gate", INNER, HIDDEN), ("up", INNER, HIDDEN), ("down", HIDDEN, INNER)];
        for (part, rows, cols) in networks {
            match (experts, stacked) {
                (false, _) => file.random(&at(&format!("ffn_{part}")), &[rows, cols], blocks),
                (true, true) => file.random(&at(&format!("ffn_{part}_exps")), &[EXPERTS, rows, cols], blocks),
                (true, false) => {
                    (0..EXPERTS).for_each(|e| file.random(&at(&format!("ffn_{part}.{e}")), &[rows, cols], blocks));
                }
            }
            if architecture == "qwen2moe" {
                file.random(&at(&format!("ffn_{part}_shexp")), &[rows, cols], blocks);
            }
        }
        if experts {
            file.plain(&at("ffn_gate_inp"), &[EXPERTS, HIDDEN], &super::normal(layer + 7, EXPERTS * HIDDEN));
        }
        if architecture == "qwen2moe" {
            file.plain(&at("ffn_gate_inp_shexp"), &[HIDDEN], &super::normal(layer + 9, HIDDEN));
        }
    }
    file
}
