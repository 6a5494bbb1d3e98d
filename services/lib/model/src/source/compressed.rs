//! Safetensors that hold matrices in fewer bits: MXFP4 (`X_blocks` and `X_scales`, as GPT-OSS is published) and FP8
//! with a scale for each block (`X` and `X_scale_inv`, as DeepSeek-V3 is).
//!
//! Each pair is shown as one tensor: MXFP4 as `X` of shape `[.., rows, cols]` (a row is an output, whatever the layout
//! of the unquantized tensor), FP8 under its own name. Values are expanded by the formats' definitions on reading.
use super::safetensors::{Raw, SafetensorsSource};
use super::{Dtype, TensorInfo, WeightSource, check_range, corrupt, elements, fp8, mxfp4, plain_size};
use super::{plain_to_f32, read_json, tensor_error};
use crate::Result;
use half::f16;
use moesaic_types::WeightFormat;
use mxfp4::Order;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

const BLOCKS: &str = "_blocks";
const SCALES: &str = "_scales";
const SCALE_INV: &str = "_scale_inv";
const CONFIG: &str = "config.json";
/// Rows and columns of a block of FP8 at most.
const MAX_BLOCK: u64 = 1 << 20;

/// A folder's tensors, pairs put together.
pub(super) struct CompressedSource {
    plain: SafetensorsSource,
    tensors: Vec<TensorInfo>,
    pairs: BTreeMap<String, Pair>,
}

enum Pair {
    Mxfp4 { blocks: String, scales: String },
    Fp8 { scales: String, rows: usize, cols: usize },
}

/// Puts the pairs of `plain` together; itself, if it has none.
pub(super) fn open(plain: SafetensorsSource) -> Result<Box<dyn WeightSource>> {
    let mut found = BTreeMap::new();
    let mut pairs = BTreeMap::new();
    let mut fp8_block = None;
    for info in plain.tensors() {
        let fail = |reason: String| tensor_error(plain.path(), &info.name, reason);
        let partner = |name: &str| {
            let missing = || fail(format!("has no '{name}' beside it"));
            plain.info(name).ok_or_else(missing)
        };
        match info.dtype {
            Dtype::Unsupported("U8") if info.name.ends_with(BLOCKS) => {
                let stem = info.name.strip_suffix(BLOCKS).unwrap_or_default();
                if plain.info(stem).is_some() {
                    return Err(fail(format!("stands beside '{stem}', which would be the same tensor")));
                }
                let scales = format!("{stem}{SCALES}");
                let shape = mxfp4_shape(info, partner(&scales)?).map_err(fail)?;
                let (name, blocks) = (stem.to_owned(), info.name.clone());
                found.insert(name.clone(), TensorInfo { name: name.clone(), shape, dtype: Dtype::Mxfp4 });
                pairs.insert(name, Pair::Mxfp4 { blocks, scales });
            }
            Dtype::Unsupported("F8_E4M3") => {
                let scales = format!("{}{SCALE_INV}", info.name);
                let (rows, cols) = match fp8_block {
                    Some(block) => block,
                    None => *fp8_block.insert(block_size(plain.path())?),
                };
                check_scales(info, partner(&scales)?, (rows, cols)).map_err(fail)?;
                found.insert(info.name.clone(), TensorInfo { dtype: Dtype::Fp8, ..info.clone() });
                pairs.insert(info.name.clone(), Pair::Fp8 { scales, rows, cols });
            }
            _ => {
                found.entry(info.name.clone()).or_insert_with(|| info.clone());
            }
        }
    }
    if pairs.is_empty() {
        return Ok(Box::new(plain));
    }
    for pair in pairs.values() {
        match pair {
            Pair::Mxfp4 { scales, .. } | Pair::Fp8 { scales, .. } => found.remove(scales),
        };
    }
    Ok(Box::new(CompressedSource { plain, tensors: found.into_values().collect(), pairs }))
}

/// The shape of the values of blocks `[.., rows, groups, 16]` with scales `[.., rows, groups]`.
fn mxfp4_shape(blocks: &TensorInfo, scales: &TensorInfo) -> Result<Vec<usize>, String> {
    let [outer @ .., groups, mxfp4::CODES] = blocks.shape.as_slice() else {
        return Err(format!("has shape {:?}, whose last dimension is not {}", blocks.shape, mxfp4::CODES));
    };
    if scales.dtype != Dtype::Unsupported("U8") || scales.shape[..] != blocks.shape[..blocks.shape.len() - 1] {
        return Err(format!("has shape {:?}, but scales {:?} of {:?}", blocks.shape, scales.shape, scales.dtype));
    }
    let cols = groups.checked_mul(mxfp4::BLOCK);
    let cols = cols.filter(|cols| elements(outer).and_then(|n| n.checked_mul(*cols)).is_some());
    let cols = cols.ok_or_else(|| format!("has an impossible shape {:?}", blocks.shape))?;
    Ok(outer.iter().copied().chain([cols]).collect())
}

/// Rows and columns of FP8's blocks, as the folder's configuration says.
fn block_size(folder: &Path) -> Result<(usize, usize)> {
    let config = folder.join(CONFIG);
    if !config.is_file() {
        return Err(corrupt(folder, format!("holds FP8, whose block size stands in a {CONFIG} that is missing")));
    }
    let json = read_json(&config)?;
    let sizes = json.pointer("/quantization_config/weight_block_size").and_then(Value::as_array);
    let size = |value: &Value| value.as_u64().filter(|n| (1..=MAX_BLOCK).contains(n)).map(|n| n as usize);
    match sizes.map(Vec::as_slice) {
        Some([rows, cols]) if size(rows).is_some() && size(cols).is_some() => {
            Ok((size(rows).unwrap_or(1), size(cols).unwrap_or(1)))
        }
        _ => Err(crate::Error::Config {
            path: config,
            key: "quantization_config.weight_block_size".into(),
            reason: format!("is not two whole numbers from 1 to {MAX_BLOCK}; FP8 is read with block scales only"),
        }),
    }
}

fn check_scales(info: &TensorInfo, scales: &TensorInfo, (rows, cols): (usize, usize)) -> Result<(), String> {
    let &[all_rows, all_cols] = info.shape.as_slice() else {
        return Err(format!("is FP8 of shape {:?}; only matrices are read", info.shape));
    };
    let wanted = [all_rows.div_ceil(rows), all_cols.div_ceil(cols)];
    if plain_size(scales.dtype).is_none() || scales.shape != wanted {
        let (shape, dtype) = (&scales.shape, scales.dtype);
        return Err(format!("needs scales {wanted:?} of floats, but has {shape:?} of {dtype:?}"));
    }
    Ok(())
}

impl CompressedSource {
    /// Blocks `first..first + count` of MXFP4: their codes and their scales.
    fn blocks(
        &self,
        name: &str,
        (blocks, scales): (&str, &str),
        start: usize,
        len: usize,
    ) -> Result<(Raw<'_>, Raw<'_>)> {
        let info = self.info(name).ok_or_else(|| self.fail(name, "is missing"))?;
        check_range(self.path(), info, start, len)?;
        if !start.is_multiple_of(mxfp4::BLOCK) || !len.is_multiple_of(mxfp4::BLOCK) {
            return Err(self.fail(name, format!("elements {start}+{len} are not on bounds of blocks of 32")));
        }
        let (first, count) = (start / mxfp4::BLOCK, len / mxfp4::BLOCK);
        let codes = self.plain.raw(blocks, first * mxfp4::CODES, count * mxfp4::CODES)?;
        Ok((codes, self.plain.raw(scales, first, count)?))
    }

    fn fail(&self, name: &str, reason: impl Into<String>) -> crate::Error {
        tensor_error(self.path(), name, reason)
    }

    fn mxfp4(&self, name: &str, pair: (&str, &str), start: usize, out: &mut [f32]) -> Result<()> {
        let (codes, scales) = self.blocks(name, pair, start, out.len())?;
        let blocks = codes.bytes.chunks_exact(mxfp4::CODES).zip(scales.bytes);
        for (index, ((bytes, scale), out)) in blocks.zip(out.chunks_exact_mut(mxfp4::BLOCK)).enumerate() {
            if !mxfp4::values(Order::Pairs, *scale, bytes, out) {
                let block = start / mxfp4::BLOCK + index;
                return Err(self.fail(name, format!("has scale {scale} at block {block}: no finite values")));
            }
        }
        codes.passed();
        Ok(())
    }

    fn fp8(&self, name: &str, scales: &str, (rows, cols): (usize, usize), start: usize, out: &mut [f32]) -> Result<()> {
        let info = self.info(name).ok_or_else(|| self.fail(name, "is missing"))?;
        check_range(self.path(), info, start, out.len())?;
        let codes = self.plain.raw(name, start, out.len())?;
        let scale_info = self.plain.info(scales).ok_or_else(|| self.fail(scales, "is missing"))?;
        let size = plain_size(scale_info.dtype).ok_or_else(|| self.fail(scales, "is of no plain type"))?;
        let (width, scales_across) = (info.shape[1], scale_info.shape[1]);
        let mut line = vec![0.0; scales_across];
        let mut current = None;
        let mut done = 0;
        while done < out.len() {
            let (row, col) = ((start + done) / width, (start + done) % width);
            if current != Some(row / rows) {
                let raw = self.plain.raw(scales, row / rows * scales_across * size, scales_across * size)?;
                plain_to_f32(scale_info.dtype, raw.bytes, &mut line);
                current = Some(row / rows);
            }
            let part = (cols - col % cols).min(width - col).min(out.len() - done);
            if !fp8::values(&codes.bytes[done..done + part], line[col / cols], &mut out[done..done + part]) {
                return Err(self.fail(name, format!("has values near row {row}, column {col} that are not finite")));
            }
            done += part;
        }
        codes.passed();
        Ok(())
    }
}

impl WeightSource for CompressedSource {
    fn path(&self) -> &Path {
        self.plain.path()
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn read_f32(&self, name: &str, start: usize, out: &mut [f32]) -> Result<()> {
        match self.pairs.get(name) {
            Some(Pair::Mxfp4 { blocks, scales }) => self.mxfp4(name, (blocks, scales), start, out),
            Some(Pair::Fp8 { scales, rows, cols }) => self.fp8(name, scales, (*rows, *cols), start, out),
            None => self.plain.read_f32(name, start, out),
        }
    }

    fn stored(&self, name: &str) -> Result<Vec<&[u8]>> {
        let (codes, scales) = match self.pairs.get(name) {
            Some(Pair::Mxfp4 { blocks, scales }) => (blocks.as_str(), scales),
            Some(Pair::Fp8 { scales, .. }) => (name, scales),
            None => return self.plain.stored(name),
        };
        Ok([self.plain.stored(codes)?, self.plain.stored(scales)?].concat())
    }

    /// q8 if each block's scale can be an f16, else bf16.
    fn exact(&self, name: &str, start: usize, len: usize) -> Result<Option<WeightFormat>> {
        let Some(Pair::Mxfp4 { blocks, scales }) = self.pairs.get(name) else { return Ok(None) };
        let (codes, scales) = self.blocks(name, (blocks, scales), start, len)?;
        let mut blocks = codes.bytes.chunks_exact(mxfp4::CODES).zip(scales.bytes);
        let fit = blocks.all(|(bytes, scale)| mxfp4::codes(Order::Pairs, *scale, bytes, &mut [0; 32]).is_some());
        Ok(Some(if fit { WeightFormat::Q8 } else { WeightFormat::Bf16 }))
    }

    fn read_codes(&self, name: &str, start: usize, scales: &mut [f16], codes: &mut [i8]) -> Result<()> {
        let Some(Pair::Mxfp4 { blocks, scales: stored }) = self.pairs.get(name) else {
            return Err(self.fail(name, "is not stored as codes"));
        };
        let (bytes, powers) = self.blocks(name, (blocks, stored), start, codes.len())?;
        let out = scales.iter_mut().zip(codes.chunks_exact_mut(mxfp4::BLOCK));
        for ((bytes, power), (scale, codes)) in bytes.bytes.chunks_exact(mxfp4::CODES).zip(powers.bytes).zip(out) {
            let fit = mxfp4::codes(Order::Pairs, *power, bytes, codes);
            *scale = fit.ok_or_else(|| self.fail(name, format!("has scale {power}, which f16 cannot hold")))?;
        }
        bytes.passed();
        Ok(())
    }
}
