//! Where weights come from: named tensors in files, of whatever format.
//!
//! `open` looks at a path and chooses: a Hugging Face folder (`safetensors`), a `.gguf` file (`gguf`), or a folder
//! that `moesaic quantize` wrote (`packed`).
use crate::Result;
use moesaic_kernels::{PackedMatrix, Storage};
use std::path::Path;

/// Element types that files hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// 16-bit float.
    F16,
    /// bfloat16.
    Bf16,
    /// GGUF block formats, by their ggml name (`Q4_0`, `Q8_0`, `Q4_K`, ...).
    Ggml(&'static str),
    /// Packed by `moesaic quantize` in a panel layout of `moesaic-kernels`.
    Packed(moesaic_types::WeightFormat),
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
        self.tensors().binary_search_by(|t| t.name.as_str().cmp(name)).ok().map(|i| &self.tensors()[i])
    }
    /// Writes elements `start..start + out.len()` of the tensor in row-major order, converted to f32.
    /// Block formats need `start` and the length on block bounds (a whole row always is).
    fn read_f32(&self, name: &str, start: usize, out: &mut [f32]) -> Result<()>;
    /// A matrix that is stored packed, by memory map; `None` for any other dtype. `index` selects a matrix of a
    /// stacked tensor of shape `[count, rows, cols]`; 0 for a plain matrix.
    fn packed(&self, _name: &str, _index: usize) -> Result<Option<PackedMatrix<Storage>>> {
        Ok(None)
    }
}
