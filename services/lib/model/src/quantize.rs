//! Packs a model's matrices, one at a time, into a folder that loads by memory map.
//!
//! The model is loaded as for serving, by a [`Loader`] that writes: every matrix stands in the folder as a backend holds
//! it, under its own name, and loading takes it from the map as it is.
use crate::backend::{FfnMatrices, Loader, Matrix};
use crate::decoder::visit;
use crate::source::gguf::{Head, Metadata};
use crate::source::packed::{DATA, Entry, INDEX, Index, METADATA, RAW, RAW_BF16, VERSION};
use crate::source::{self, Dtype, TensorInfo, WeightSource, corrupt, elements};
use crate::spec::{self, Norm};
use crate::{Error, Result};
use half::{bf16, f16};
use moesaic_kernels::PackedMatrix;
use moesaic_types::WeightFormat;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Values that are read at a time from a tensor that stays plain.
const CHUNK: usize = 1 << 16;
/// Bytes of a value as progress and [`Report::bytes_in`] count it.
const BYTES_IN: u64 = 2;

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Entries of the folder.
    pub tensors: usize,
    /// Those that are packed matrices.
    pub packed: usize,
    /// Bytes of the model's values, two a value (bf16).
    pub bytes_in: u64,
    /// Bytes of the data file.
    pub bytes_out: u64,
}

/// Writes `out`: each matrix as loading with `--weights format` holds it (the embedding in bf16, the output matrix never
/// below q8, gates in f32), vectors as they are (f16 as f32), and the model's small files. Tensors that the model does
/// not use are left out. Without `format` matrices stay as they are stored, where that can be multiplied with. A GGUF
/// file's head becomes a file of its own. Memory: one matrix at a time, or one expert of a transposed stack.
/// `progress(done, total, tensor)` counts bytes.
///
/// # Errors
/// `Corrupt` when `out` is not empty; what the source says; `Io` for the files written.
pub fn quantize(
    model: &Path,
    out: &Path,
    format: Option<WeightFormat>,
    progress: &dyn Fn(u64, u64, &str),
) -> Result<Report> {
    let source = source::open(model)?;
    let watched = Watched { source: &*source, read: Mutex::default() };
    // a GGUF file keeps part of its configuration in tensors; of a folder they are only compared
    let spec = spec::read(model, if source.gguf().is_some() { &watched } else { &*source })?;
    std::fs::create_dir_all(out).map_err(io(out))?;
    if std::fs::read_dir(out).map_err(io(out))?.next().is_some() {
        return Err(corrupt(out, "is not empty; name a new folder"));
    }
    let total = source.tensors().iter().map(|t| elements(&t.shape).unwrap_or(0) as u64 * BYTES_IN).sum();
    let partial = out.join(format!("{DATA}.partial"));
    let file = BufWriter::new(File::create(&partial).map_err(io(&partial))?);
    let state = State { file, offset: 0, entries: Vec::new(), packed: BTreeSet::new(), done: 0 };
    let writer = Writer { state: RefCell::new(state), path: partial.clone(), total, progress };
    visit(&watched, &spec, format, &writer)?;
    let mut state = writer.state.into_inner();
    let packed = state.entries.len();
    let read = watched.read.into_inner().unwrap_or_else(PoisonError::into_inner);
    for name in read.difference(&std::mem::take(&mut state.packed)) {
        progress(state.done, total, name);
        let info = source.info(name).ok_or_else(|| source::tensor_error(model, name, "is missing"))?;
        state.copy(&*source, info, &partial)?;
    }
    progress(total, total, "");
    let file = state.file.into_inner().map_err(|e| io(&partial)(e.into_error()))?;
    file.sync_all().map_err(io(&partial))?;
    match source::gguf_file(model) {
        Some(file) => {
            let len = Head::read(&file)?.len;
            std::fs::write(out.join(METADATA), &source::map(&file)?.bytes()[..len]).map_err(io(out))?;
        }
        None => copy_small_files(model, out)?,
    }
    std::fs::rename(&partial, out.join(DATA)).map_err(io(&partial))?;
    let report = Report { tensors: state.entries.len(), packed, bytes_in: total, bytes_out: state.offset as u64 };
    // the index last: a folder without it is not taken for a model
    let index = serde_json::to_vec(&Index { format: VERSION.into(), tensors: state.entries });
    let index = index.map_err(|e| corrupt(out, e.to_string()))?;
    std::fs::write(out.join(INDEX), index).map_err(io(out))?;
    Ok(report)
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, source }
}

/// A source that remembers what is read from it.
struct Watched<'a> {
    source: &'a dyn WeightSource,
    read: Mutex<BTreeSet<String>>,
}

impl WeightSource for Watched<'_> {
    fn path(&self) -> &Path {
        self.source.path()
    }

    fn tensors(&self) -> &[TensorInfo] {
        self.source.tensors()
    }

    fn read_f32(&self, name: &str, start: usize, out: &mut [f32]) -> Result<()> {
        {
            let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
            if !read.contains(name) {
                read.insert(name.to_owned());
            }
        }
        self.source.read_f32(name, start, out)
    }

    fn stored(&self, name: &str) -> Result<Vec<&[u8]>> {
        self.source.stored(name)
    }

    fn exact(&self, name: &str, start: usize, len: usize) -> Result<Option<WeightFormat>> {
        self.source.exact(name, start, len)
    }

    fn read_codes(&self, name: &str, start: usize, scales: &mut [f16], codes: &mut [i8]) -> Result<()> {
        self.source.read_codes(name, start, scales, codes)
    }

    fn gguf(&self) -> Option<&Metadata> {
        self.source.gguf()
    }

    fn packed(&self, name: &str) -> Result<Option<PackedMatrix>> {
        self.source.packed(name)
    }
}

/// A loader that writes.
struct Writer<'a> {
    state: RefCell<State>,
    path: PathBuf,
    total: u64,
    progress: &'a dyn Fn(u64, u64, &str),
}

struct State {
    file: BufWriter<File>,
    offset: usize,
    entries: Vec<Entry>,
    /// Tensors whose matrices are written.
    packed: BTreeSet<String>,
    done: u64,
}

impl State {
    fn write(&mut self, bytes: &[u8], path: &Path) -> Result<()> {
        self.offset += bytes.len();
        self.file.write_all(bytes).map_err(io(path))
    }

    /// Moves to the next 64-byte bound.
    fn align(&mut self, path: &Path) -> Result<usize> {
        let gap = self.offset.next_multiple_of(64) - self.offset;
        self.write(&[0; 64][..gap], path)?;
        Ok(self.offset)
    }

    fn add(&mut self, name: &str, shape: &[usize], format: String, offset: usize) {
        let len = self.offset - offset;
        self.entries.push(Entry { name: name.to_owned(), shape: shape.to_vec(), format, offset, len });
        self.done += elements(shape).unwrap_or(0) as u64 * BYTES_IN;
    }

    /// A tensor's plain values.
    fn copy(&mut self, source: &dyn WeightSource, info: &TensorInfo, path: &Path) -> Result<()> {
        let (len, as_bf16) = (elements(&info.shape).unwrap_or(0), info.dtype == Dtype::Bf16);
        let offset = self.align(path)?;
        let mut values = vec![0.0; CHUNK.min(len)];
        for start in (0..len).step_by(CHUNK) {
            let values = &mut values[..CHUNK.min(len - start)];
            source.read_f32(&info.name, start, values)?;
            let bytes: Vec<u8> = if as_bf16 {
                values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()
            } else {
                values.iter().flat_map(|v| v.to_le_bytes()).collect()
            };
            self.write(&bytes, path)?;
        }
        let format = if as_bf16 { RAW_BF16 } else { RAW };
        self.add(&info.name, &info.shape, format.to_owned(), offset);
        Ok(())
    }
}

impl Loader for Writer<'_> {
    type Linear = ();
    type Embedding = ();
    type Norm = ();
    type Ffn = ();

    fn load_linear(&self, matrix: Matrix<'_>, _bias: Option<Vec<f32>>) -> Result<()> {
        let state = &mut *self.state.borrow_mut();
        (self.progress)(state.done, self.total, &matrix.name);
        let (name, shape, format) = (matrix.name.clone(), [matrix.rows, matrix.cols], matrix.format);
        if !state.packed.contains(&matrix.tensor) {
            state.packed.insert(matrix.tensor.clone());
        }
        let packed = matrix.pack()?;
        let offset = state.align(&self.path)?;
        state.write(packed.storage().bytes(), &self.path)?;
        state.add(&name, &shape, format.to_string(), offset);
        Ok(())
    }

    fn load_embedding(&self, matrix: Matrix<'_>) -> Result<()> {
        self.load_linear(matrix, None)
    }

    fn tie(&self, _embedding: &()) -> Result<()> {
        Ok(())
    }

    fn load_norm(&self, _norm: Norm, _weight: Vec<f32>, _bias: Option<Vec<f32>>) -> Result<()> {
        Ok(())
    }

    fn load_ffn(&self, matrices: FfnMatrices<'_>) -> Result<()> {
        let FfnMatrices { gate, up, down, .. } = matrices;
        gate.into_iter().chain([up, down]).try_for_each(|matrix| self.load_linear(matrix, None))
    }
}

/// Configuration, tokenizer and template.
fn copy_small_files(model: &Path, out: &Path) -> Result<()> {
    for entry in std::fs::read_dir(model).map_err(io(model))? {
        let from = entry.map_err(io(model))?.path();
        let name = from.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let kind = from.extension().unwrap_or_default().to_string_lossy().into_owned();
        let wanted = matches!(kind.as_str(), "json" | "jinja" | "model") && !name.ends_with(".index.json");
        if wanted && from.is_file() {
            std::fs::copy(&from, out.join(name)).map_err(io(&from))?;
        }
    }
    Ok(())
}
