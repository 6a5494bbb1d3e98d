//! Where weights come from: named tensors in files, of whatever format.
//!
//! `open` looks at a path and chooses: a Hugging Face folder (`safetensors`), a `.gguf` file (`gguf`), or a folder
//! that `moesaic quantize` wrote (`packed`).
mod compressed;
mod fp8;
pub mod gguf;
mod gguf_blocks;
mod gguf_metadata;
mod mxfp4;
pub mod packed;
pub mod safetensors;

use crate::{Error, Result};
use half::f16;
use moesaic_kernels::{MappedFile, PackedMatrix, Storage};
use moesaic_types::{Digest, WeightFormat};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Element types that files hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// 16-bit float.
    F16,
    /// bfloat16.
    Bf16,
    /// GGUF block formats, by their ggml name (`Q4_0`, `Q8_0`, `Q4_K`, `MXFP4`, ...).
    Ggml(&'static str),
    /// MXFP4 of safetensors: `X_blocks` and `X_scales`, shown as `X` of shape `[.., rows, cols]`.
    Mxfp4,
    /// FP8 (e4m3) of safetensors with a scale for each block of a matrix (`X_scale_inv`).
    Fp8,
    /// Packed by `moesaic quantize` in a panel layout of `moesaic-kernels`.
    Packed(WeightFormat),
    /// A type that is listed but cannot be read, by the file's name for it (`F8_E5M2`, `I64`, `IQ2_XS`, ...).
    Unsupported(&'static str),
}

/// What a file says of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Its name in the file.
    pub name: String,
    /// Row-major shape, outermost first (GGUF's reversed order is put right by the source).
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: Dtype,
}

/// Named tensors of one model. Reading checks bounds, shapes and types; files are memory-mapped.
pub trait WeightSource: Send + Sync {
    /// The file or folder, for messages.
    fn path(&self) -> &Path;
    /// All tensors, sorted by name.
    fn tensors(&self) -> &[TensorInfo];
    /// One tensor's description.
    fn info(&self, name: &str) -> Option<&TensorInfo> {
        find(self.tensors(), name)
    }
    /// Writes elements `start..start + out.len()` of the tensor in row-major order, converted to f32.
    /// Block formats need `start` and the length on block bounds (a whole row always is).
    fn read_f32(&self, name: &str, start: usize, out: &mut [f32]) -> Result<()>;
    /// The bytes that stand for the tensor in its files, in as many pieces as there are; none for a type that is listed
    /// only.
    fn stored(&self, name: &str) -> Result<Vec<&[u8]>>;
    /// The format that holds elements `start..start + len` without rounding, where they are stored as codes with a
    /// scale for each 32 of them: q4 or q8 if f16 holds the scales, else bf16; `None` for other tensors.
    fn exact(&self, _name: &str, _start: usize, _len: usize) -> Result<Option<WeightFormat>> {
        Ok(None)
    }
    /// Writes elements from `start` as codes, and the scale of each 32 of them: an element is `code * scale`. For
    /// elements that [`Self::exact`] has q4 or q8 for, and on bounds of 32.
    fn read_codes(&self, name: &str, _start: usize, _scales: &mut [f16], _codes: &mut [i8]) -> Result<()> {
        Err(tensor_error(self.path(), name, "is not stored as codes"))
    }
    /// A matrix that is stored packed, by memory map; `None` for any other dtype.
    fn packed(&self, _name: &str) -> Result<Option<PackedMatrix<Storage>>> {
        Ok(None)
    }
    /// A tensor as the model's own files list it, where that is not how this source holds it.
    fn original(&self, name: &str) -> Option<&TensorInfo> {
        self.info(name)
    }
    /// The metadata of a GGUF file; `None` for other sources.
    fn gguf(&self) -> Option<&gguf::Metadata> {
        None
    }
}

/// Opens a Hugging Face folder, a `.safetensors` or `.gguf` file, or a folder of `moesaic quantize`.
pub fn open(path: &Path) -> Result<Box<dyn WeightSource>> {
    if path.is_dir() {
        return Ok(if path.join(packed::INDEX).is_file() {
            Box::new(packed::PackedSource::open(path)?)
        } else {
            compressed::open(safetensors::SafetensorsSource::open(path)?)?
        });
    }
    let mut magic = [0; 4];
    let mut file = std::fs::File::open(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
    let is_gguf = std::io::Read::read_exact(&mut file, &mut magic).is_ok() && &magic == gguf::MAGIC;
    if is_gguf || path.extension().is_some_and(|extension| extension == "gguf") {
        Ok(Box::new(gguf::GgufSource::open(path)?))
    } else if path.extension().is_some_and(|extension| extension == "safetensors") {
        compressed::open(safetensors::SafetensorsSource::open(path)?)
    } else {
        Err(corrupt(path, "is neither a model folder nor a .safetensors or .gguf file"))
    }
}

/// A tensor of a list that is sorted by name.
pub(crate) fn find<'a>(tensors: &'a [TensorInfo], name: &str) -> Option<&'a TensorInfo> {
    tensors.binary_search_by(|t| t.name.as_str().cmp(name)).ok().map(|i| &tensors[i])
}

/// The GGUF file that describes a model, if one does: itself, or what `moesaic quantize` left of it in a folder.
pub(crate) fn gguf_file(model: &Path) -> Option<PathBuf> {
    if !model.is_dir() {
        return Some(model.to_owned());
    }
    Some(model.join(packed::METADATA)).filter(|file| file.is_file())
}

/// A cheap digest of a model's content: names, shapes, types and samples of every tensor's stored bytes, and its
/// configuration. It names the model in KV block hashes; it is no proof against tampering.
pub fn digest(source: &dyn WeightSource) -> Result<Digest> {
    const WINDOW: usize = 1024;
    let mut digest = Digest::of(b"moesaic model v2");
    let mut add = |bytes: &[u8]| {
        let mut chained = digest.0.to_vec();
        chained.extend_from_slice(&Digest::of(bytes).0);
        digest = Digest::of(&chained);
    };
    if let Ok(config) = std::fs::read(source.path().join("config.json")) {
        add(&config);
    }
    if let Some(metadata) = source.gguf() {
        add(metadata.to_json().to_string().as_bytes());
    }
    for info in source.tensors() {
        add(format!("{} {:?} {:?}", info.name, info.shape, info.dtype).as_bytes());
        // bytes and not values: what a value cannot be read from may be of a tensor that the model does not use
        for bytes in source.stored(&info.name)? {
            add(&bytes[..bytes.len().min(WINDOW)]);
            let middle = bytes.len() / 2 / WINDOW * WINDOW;
            add(&bytes[middle..bytes.len().min(middle + WINDOW)]);
        }
    }
    Ok(digest)
}

/// A digest of what tokens mean to a model at a path: its configuration and its tokenizer. Needs no weights.
///
/// # Errors
/// `Io`, naming the file; what a GGUF file's reading says.
pub fn text_digest(path: &Path) -> Result<Digest> {
    if let Some(file) = gguf_file(path) {
        return Ok(Digest::of(gguf::Head::read(&file)?.metadata.to_json().to_string().as_bytes()));
    }
    let mut parts = Vec::new();
    for name in ["config.json", "tokenizer.json"] {
        let path = path.join(name);
        let bytes = std::fs::read(&path).map_err(|source| Error::Io { path, source })?;
        parts.extend_from_slice(&Digest::of(&bytes).0);
    }
    Ok(Digest::of(&parts))
}

pub(crate) fn corrupt(path: &Path, reason: impl Into<String>) -> Error {
    Error::Corrupt { path: path.to_owned(), reason: reason.into() }
}

pub(crate) fn tensor_error(path: &Path, tensor: &str, reason: impl Into<String>) -> Error {
    Error::Tensor { path: path.to_owned(), tensor: tensor.to_owned(), reason: reason.into() }
}

pub(crate) fn map(path: &Path) -> Result<Arc<MappedFile>> {
    MappedFile::open(path).map_err(|source| Error::Io { path: path.to_owned(), source })
}

/// A file's text; an error that names it.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
    String::from_utf8(bytes).map_err(|_| corrupt(path, "is not UTF-8 text"))
}

/// A file's JSON; an error that names it.
pub(crate) fn read_json(path: &Path) -> Result<serde_json::Value> {
    serde_json::from_str(&read_text(path)?).map_err(|error| corrupt(path, format!("is not valid JSON: {error}")))
}

/// Elements of a shape; `None` on overflow.
pub(crate) fn elements(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim))
}

/// Checks that `start..start + len` lies inside `shape`.
pub(crate) fn check_range(path: &Path, info: &TensorInfo, start: usize, len: usize) -> Result<()> {
    let total = elements(&info.shape).unwrap_or(0);
    match start.checked_add(len) {
        Some(end) if end <= total => Ok(()),
        _ => Err(tensor_error(path, &info.name, format!("elements {start}+{len} are outside its {total}"))),
    }
}

/// Converts little-endian plain elements; `bytes` holds `out.len()` of them.
pub(crate) fn plain_to_f32(dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> bool {
    match dtype {
        Dtype::F32 => {
            for (value, bytes) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            }
        }
        Dtype::F16 => {
            for (value, bytes) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *value = f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
            }
        }
        Dtype::Bf16 => {
            for (value, bytes) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *value = half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
            }
        }
        Dtype::Ggml(_) | Dtype::Mxfp4 | Dtype::Fp8 | Dtype::Packed(_) | Dtype::Unsupported(_) => return false,
    }
    true
}

/// Bytes of an element of a plain type.
pub(crate) fn plain_size(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::F32 => Some(4),
        Dtype::F16 | Dtype::Bf16 => Some(2),
        Dtype::Ggml(_) | Dtype::Mxfp4 | Dtype::Fp8 | Dtype::Packed(_) | Dtype::Unsupported(_) => None,
    }
}
