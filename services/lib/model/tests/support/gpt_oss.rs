//! GPT-OSS checkpoints with experts in MXFP4.
use super::noise;
use super::safetensors::{Tensors, golden};
use serde_json::{Value, json};
use std::path::Path;

/// Values of blocks and scales. Of the OCP specification, in f64; the second nibble of a byte is the later value.
pub fn mxfp4(blocks: &[u8], scales: &[u8]) -> Vec<f32> {
    let magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let value = |code: u8| magnitudes[usize::from(code & 7)] * if code & 8 == 0 { 1.0 } else { -1.0 };
    let codes = blocks.iter().flat_map(|byte| [byte & 15, byte >> 4]).enumerate();
    codes.map(|(i, code)| (value(code) * 2f64.powi(i32::from(scales[i / 32]) - 127)) as f32).collect()
}

pub const EXPERTS: usize = 16;
pub const HIDDEN: usize = 64;
pub const INNER: usize = 32;

/// Writes GPT-OSS with experts in MXFP4 (`folder/mxfp4`), and the same in plain f32 as the unquantized checkpoints have it
/// (`folder/plain`); scales from `scale`.
pub fn gpt_oss(folder: &Path, scale: impl Fn(usize) -> u8) -> (Tensors, Value) {
    let (mut tensors, mut config) = golden("gpt_oss");
    config["intermediate_size"] = json!(INNER);
    let mut plain = tensors.clone();
    config["quantization_config"] = json!(null);
    for layer in 0..4 {
        for (name, rows, cols) in [("gate_up_proj", 2 * INNER, HIDDEN), ("down_proj", HIDDEN, INNER)] {
            let name = format!("model.layers.{layer}.mlp.experts.{name}");
            let groups = EXPERTS * rows * cols / 32;
            let codes = noise(layer + rows as u64, groups * 16);
            let scales: Vec<u8> = (0..groups).map(&scale).collect();
            let values = mxfp4(&codes, &scales);
            let turned: Vec<f32> = values
                .chunks_exact(rows * cols)
                .flat_map(|expert| (0..cols * rows).map(|i| expert[i % rows * cols + i / rows]))
                .collect();
            plain.f32(&name, &[EXPERTS, cols, rows], &turned);
            let bias = super::normal(layer, EXPERTS * rows);
            plain.f32(&format!("{name}_bias"), &[EXPERTS, rows], &bias);
            tensors.f32(&format!("{name}_bias"), &[EXPERTS, rows], &bias);
            tensors.0.remove(&name);
            tensors.bytes(&format!("{name}_blocks"), "U8", &[EXPERTS, rows, cols / 32, 16], codes);
            tensors.bytes(&format!("{name}_scales"), "U8", &[EXPERTS, rows, cols / 32], scales);
        }
    }
    plain.write(&folder.join("plain"), &config);
    config["quantization_config"] = json!({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]});
    tensors.write(&folder.join("mxfp4"), &config);
    (tensors, config)
}
