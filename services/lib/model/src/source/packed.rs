//! Folders that `moesaic quantize` wrote: packed matrices and plain tensors in one data file, mapped into memory.
//!
//! `moesaic.index.json` holds `{"format": "moesaic-packed-3", "tensors": [{"name", "shape", "format", "offset",
//! "len"}]}`; each entry lies in `moesaic.pack` on a 64-byte bound. `format` is a weight format for a matrix `[rows,
//! cols]` in the panel layout of `moesaic-kernels`, as a backend runs it (one entry for each expert, and for each part
//! of a fused tensor, under the names of `decoder/weights.rs`), or `raw-f32` or `raw-bf16` for plain values of any
//! shape. A model that was a GGUF file also has `metadata.gguf`: its head, without the bytes of tensors.
use super::gguf::{Head, Metadata};
use super::{Dtype, TensorInfo, WeightSource, check_range, corrupt, elements, find, map, read_json, tensor_error};
use crate::Result;
use crate::backend::kernel_format;
use moesaic_kernels::{MappedFile, PackedMatrix, Storage};
use moesaic_types::WeightFormat;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Name of the index file.
pub const INDEX: &str = "moesaic.index.json";
/// Name of the data file.
pub const DATA: &str = "moesaic.pack";
/// Name of the head of a GGUF file, which describes a model that was one.
pub const METADATA: &str = "metadata.gguf";
/// The version that this build reads and writes.
pub const VERSION: &str = "moesaic-packed-3";
/// The format of plain values.
pub const RAW: &str = "raw-f32";
/// The format of plain bfloat16 values.
pub const RAW_BF16: &str = "raw-bf16";
/// Rows, columns and elements of a tensor at most; keeps the arithmetic of sizes from overflowing.
const MAX_SIZE: usize = 1 << 40;

/// The index file.
#[derive(Debug, Serialize, Deserialize)]
pub struct Index {
    /// [`VERSION`].
    pub format: String,
    /// The tensors.
    pub tensors: Vec<Entry>,
}

/// One tensor of the index.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// A weight format, [`RAW`] or [`RAW_BF16`].
    pub format: String,
    /// First byte in the data file; a multiple of 64.
    pub offset: usize,
    /// Bytes.
    pub len: usize,
}

/// The coarsest format of a folder's matrices, which is what it was packed for; `None` for any other model.
///
/// # Errors
/// As [`PackedSource::open`].
pub fn format_of(model: &Path) -> Result<Option<WeightFormat>> {
    if !model.join(INDEX).is_file() {
        return Ok(None);
    }
    let rank = |format: &WeightFormat| match format {
        WeightFormat::F32 => (0, 0),
        WeightFormat::Bf16 => (1, 0),
        WeightFormat::Q8 => (2, 0),
        WeightFormat::Q4 { group } => (3, *group),
    };
    let source = PackedSource::open(model)?;
    let formats = source.tensors.iter().filter_map(|info| match info.dtype {
        Dtype::Packed(format) => Some(format),
        _ => None,
    });
    Ok(formats.max_by_key(rank))
}

/// An opened folder.
pub struct PackedSource {
    path: PathBuf,
    file: Arc<MappedFile>,
    /// Of a model that was a GGUF file.
    head: Option<Head>,
    tensors: Vec<TensorInfo>,
    places: Vec<(usize, usize)>,
}

impl PackedSource {
    /// Opens a folder and checks every entry against the data file.
    ///
    /// # Errors
    /// `Io`, `Corrupt` or `Tensor`, naming the file and the tensor.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(INDEX);
        let index: Index = serde_json::from_value(read_json(&path)?)
            .map_err(|error| corrupt(&path, format!("is not an index of packed weights: {error}")))?;
        if index.format != VERSION {
            let reason = format!("has format '{}'; this build reads {VERSION}: quantize the model again", index.format);
            return Err(corrupt(&path, reason));
        }
        let file = map(&folder.join(DATA))?;
        let mut entries = index.tensors;
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        let head = super::gguf_file(folder).map(|path| Head::read(&path)).transpose()?;
        let mut source = Self { path: folder.to_owned(), file, head, tensors: Vec::new(), places: Vec::new() };
        for entry in entries {
            source.add(&path, entry)?;
        }
        source.check_overlaps(&path)?;
        Ok(source)
    }

    fn add(&mut self, path: &Path, entry: Entry) -> Result<()> {
        let wrong = |reason: String| tensor_error(path, &entry.name, reason);
        if self.tensors.last().is_some_and(|last| last.name == entry.name) {
            return Err(wrong("stands twice in the index".into()));
        }
        let end = entry.offset.checked_add(entry.len);
        if end.is_none_or(|end| end > self.file.bytes().len()) {
            let have = self.file.bytes().len();
            return Err(wrong(format!("ends after the {have} bytes of {DATA}: the file is truncated")));
        }
        if !entry.offset.is_multiple_of(64) {
            return Err(wrong(format!("starts at byte {}, which is no multiple of 64", entry.offset)));
        }
        let bytes = |size| elements(&entry.shape).and_then(|n| n.checked_mul(size));
        let (dtype, expected) = if entry.format == RAW {
            (Dtype::F32, bytes(4))
        } else if entry.format == RAW_BF16 {
            (Dtype::Bf16, bytes(2))
        } else {
            let format: WeightFormat = entry.format.parse().map_err(wrong)?;
            let &[rows, cols] = entry.shape.as_slice() else {
                return Err(wrong(format!("has shape {:?}, which is no matrix", entry.shape)));
            };
            if elements(&entry.shape).is_none_or(|n| n == 0 || n > MAX_SIZE) {
                return Err(wrong(format!("has an impossible shape {:?}", entry.shape)));
            }
            (Dtype::Packed(format), Some(PackedMatrix::packed_len(kernel_format(format), rows, cols)))
        };
        if expected != Some(entry.len) {
            return Err(wrong(format!("has {} bytes for shape {:?} in {}", entry.len, entry.shape, entry.format)));
        }
        self.places.push((entry.offset, entry.len));
        self.tensors.push(TensorInfo { name: entry.name, shape: entry.shape, dtype });
        Ok(())
    }

    fn check_overlaps(&self, path: &Path) -> Result<()> {
        let mut order: Vec<_> = self.places.iter().zip(&self.tensors).filter(|((_, len), _)| *len > 0).collect();
        order.sort_by_key(|((offset, _), _)| *offset);
        for pair in order.windows(2) {
            let (((offset, len), before), ((next, _), info)) = (pair[0], pair[1]);
            if offset + len > *next {
                return Err(tensor_error(path, &info.name, format!("overlaps '{}'", before.name)));
            }
        }
        Ok(())
    }

    fn find(&self, name: &str) -> Result<(&TensorInfo, usize, usize)> {
        match self.tensors.binary_search_by(|t| t.name.as_str().cmp(name)) {
            Ok(i) => Ok((&self.tensors[i], self.places[i].0, self.places[i].1)),
            Err(_) => Err(tensor_error(&self.path, name, "is missing")),
        }
    }
}

impl WeightSource for PackedSource {
    fn path(&self) -> &Path {
        &self.path
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn read_f32(&self, name: &str, start: usize, out: &mut [f32]) -> Result<()> {
        let (info, offset, len) = self.find(name)?;
        check_range(&self.path, info, start, out.len())?;
        let Some(packed) = self.packed(name)? else {
            let size = super::plain_size(info.dtype).expect("an entry is plain or packed");
            let bytes = &self.file.bytes()[offset..offset + len][start * size..(start + out.len()) * size];
            super::plain_to_f32(info.dtype, bytes, out);
            return Ok(());
        };
        let cols = packed.cols();
        let mut row = vec![0.0; cols];
        let mut done = 0;
        while done < out.len() {
            let (line, col) = ((start + done) / cols, (start + done) % cols);
            packed.dequantize_row(line, &mut row);
            let part = (cols - col).min(out.len() - done);
            out[done..done + part].copy_from_slice(&row[col..col + part]);
            done += part;
        }
        Ok(())
    }

    fn stored(&self, name: &str) -> Result<Vec<&[u8]>> {
        let (_, offset, len) = self.find(name)?;
        Ok(vec![&self.file.bytes()[offset..offset + len]])
    }

    fn gguf(&self) -> Option<&Metadata> {
        self.head.as_ref().map(|head| &head.metadata)
    }

    fn original(&self, name: &str) -> Option<&TensorInfo> {
        find(self.head.as_ref().map_or(&self.tensors, |head| &head.tensors), name)
    }

    fn packed(&self, name: &str) -> Result<Option<PackedMatrix<Storage>>> {
        let (info, offset, len) = self.find(name)?;
        let Dtype::Packed(format) = info.dtype else { return Ok(None) };
        let &[rows, cols] = info.shape.as_slice() else { unreachable!("checked when it was added") };
        let storage = Storage::Mapped { file: self.file.clone(), offset, len };
        let matrix = PackedMatrix::from_storage(kernel_format(format), rows, cols, storage);
        matrix.map(Some).map_err(|error| tensor_error(&self.path, name, error.to_string()))
    }
}
