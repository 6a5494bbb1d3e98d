//! What tests of file formats share: GGUF files by hand, safetensors by hand, reproducible bytes.
#![allow(clippy::unwrap_used, dead_code, reason = "a test may panic; not every test uses all")]
pub mod converted;
pub mod gguf;
pub mod gpt_oss;
pub mod matrices;
pub mod safetensors;

use serde_json::Value;
use std::path::Path;

pub fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Bytes that look random and are the same for one seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Values that look normally distributed, of variance 1.
pub fn normal(seed: u64, len: usize) -> Vec<f32> {
    let bytes = noise(seed, len * 12);
    // the sum of twelve uniform values
    bytes.chunks_exact(12).map(|twelve| twelve.iter().map(|b| f32::from(*b) / 255.0).sum::<f32>() - 6.0).collect()
}
