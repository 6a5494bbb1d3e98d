//! Packs a model's matrices, one at a time, into a folder that loads by memory map.
use crate::backend::kernel_format;
use crate::source::packed::{DATA, Entry, INDEX, Index, RAW, RAW_BF16, VERSION, stack};
use crate::source::{self, Dtype, WeightSource, corrupt, elements};
use crate::{Error, Result};
use moesaic_kernels::PackedMatrix;
use moesaic_types::WeightFormat;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Values that are read at a time from a tensor that stays plain.
const CHUNK: usize = 1 << 16;
/// The output matrix: its error goes into every logit.
const OUTPUT: &str = "lm_head.weight";

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Tensors in all.
    pub tensors: usize,
    /// Tensors that were packed.
    pub packed: usize,
    /// Bytes of the values read, counted as f32 / 2 (bf16).
    pub bytes_in: u64,
    /// Bytes of the data file.
    pub bytes_out: u64,
}

/// Writes `out`: matrices of attention, networks and experts in `format`, the output matrix in `format` but never below
/// q8, everything else as it is (f16 as f32), and the model's small files. Memory: one matrix at a time. `progress(done, total, tensor)` counts bytes read.
///
/// # Errors
/// `Corrupt` when `out` is not empty or the model is a GGUF file; what the source says; `Io` for the files written.
pub fn quantize(model: &Path, out: &Path, format: WeightFormat, progress: &dyn Fn(u64, u64, &str)) -> Result<Report> {
    let source = source::open(model)?;
    if source.gguf().is_some() {
        return Err(corrupt(model, "is GGUF, which is quantized already; serve it as it is with --weights q4 or q8"));
    }
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Io { path, source }
    };
    std::fs::create_dir_all(out).map_err(io(out))?;
    if std::fs::read_dir(out).map_err(io(out))?.next().is_some() {
        return Err(corrupt(out, "is not empty; name a new folder"));
    }
    let total: u64 = source.tensors().iter().map(|t| elements(&t.shape).unwrap_or(0) as u64 * 2).sum();
    let partial = out.join(format!("{DATA}.partial"));
    let mut writer = Writer { file: BufWriter::new(File::create(&partial).map_err(io(&partial))?), offset: 0 };
    let (mut entries, mut done, mut packed) = (Vec::new(), 0, 0);
    for info in source.tensors() {
        progress(done, total, &info.name);
        let offset = writer.align().map_err(io(&partial))?;
        let stored = if let Some(shape) = matrices(&info.name, &info.shape) {
            packed += 1;
            let format = match format {
                WeightFormat::Q4 { .. } if info.name == OUTPUT => WeightFormat::Q8,
                format => format,
            };
            pack(&*source, &info.name, shape, format, &mut writer, &partial)?;
            format.to_string()
        } else {
            let bf16 = info.dtype == Dtype::Bf16;
            copy(&*source, &info.name, elements(&info.shape).unwrap_or(0), bf16, &mut writer, &partial)?;
            if bf16 { RAW_BF16 } else { RAW }.to_owned()
        };
        let (name, shape) = (info.name.clone(), info.shape.clone());
        entries.push(Entry { name, shape, format: stored, offset, len: writer.offset - offset });
        done += elements(&info.shape).unwrap_or(0) as u64 * 2;
    }
    progress(total, total, "");
    let file = writer.file.into_inner().map_err(|e| io(&partial)(e.into_error()))?;
    file.sync_all().map_err(io(&partial))?;
    copy_small_files(model, out)?;
    std::fs::rename(&partial, out.join(DATA)).map_err(io(&partial))?;
    let report = Report { tensors: entries.len(), packed, bytes_in: total, bytes_out: writer.offset as u64 };
    // the index last: a folder without it is not taken for a model
    let index = serde_json::to_vec(&Index { format: VERSION.into(), tensors: entries });
    let index = index.map_err(|e| corrupt(out, e.to_string()))?;
    std::fs::write(out.join(INDEX), index).map_err(io(out))?;
    Ok(report)
}

/// The matrices of a tensor that is packed: a projection of attention, a network or an expert. Embeddings, norms,
/// gates and the transposed stacks of GPT-OSS stay as they are.
fn matrices(name: &str, shape: &[usize]) -> Option<(usize, usize, usize)> {
    let leaf = name.strip_suffix(".weight")?;
    let plain = ["embed", "norm", "gate", "router", "kv_b_proj"];
    let last = leaf.rsplit('.').next().unwrap_or(leaf);
    let is_gate_proj = last == "gate_proj";
    if !is_gate_proj && plain.iter().any(|word| last.contains(word) || leaf.contains("router")) {
        return None;
    }
    stack(shape).filter(|(_, rows, cols)| *rows > 1 && *cols > 1)
}

struct Writer {
    file: BufWriter<File>,
    offset: usize,
}

impl Writer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.offset += bytes.len();
        self.file.write_all(bytes)
    }

    /// Moves to the next 64-byte bound.
    fn align(&mut self) -> std::io::Result<usize> {
        let gap = self.offset.next_multiple_of(64) - self.offset;
        self.write(&[0; 64][..gap])?;
        Ok(self.offset)
    }
}

fn pack(
    source: &dyn WeightSource,
    name: &str,
    (count, rows, cols): (usize, usize, usize),
    format: WeightFormat,
    writer: &mut Writer,
    path: &Path,
) -> Result<()> {
    for index in 0..count {
        let mut failed = None;
        let matrix = PackedMatrix::pack(kernel_format(format), rows, cols, &mut |row, out| {
            if let Err(error) = source.read_f32(name, (index * rows + row) * cols, out) {
                failed.get_or_insert(error);
            }
        });
        if let Some(error) = failed {
            return Err(error);
        }
        let written = writer.write(matrix.storage().bytes());
        written.map_err(|source| Error::Io { path: path.to_owned(), source })?;
    }
    Ok(())
}

fn copy(source: &dyn WeightSource, name: &str, len: usize, bf16: bool, writer: &mut Writer, path: &Path) -> Result<()> {
    let mut values = vec![0.0; CHUNK.min(len)];
    for start in (0..len).step_by(CHUNK) {
        let values = &mut values[..CHUNK.min(len - start)];
        source.read_f32(name, start, values)?;
        let bytes: Vec<u8> = if bf16 {
            values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()
        } else {
            values.iter().flat_map(|v| v.to_le_bytes()).collect()
        };
        writer.write(&bytes).map_err(|source| Error::Io { path: path.to_owned(), source })?;
    }
    Ok(())
}

/// Configuration, tokenizer and template.
fn copy_small_files(model: &Path, out: &Path) -> Result<()> {
    let io = |path: &Path, source| Error::Io { path: path.to_owned(), source };
    for entry in std::fs::read_dir(model).map_err(|e| io(model, e))? {
        let from = entry.map_err(|e| io(model, e))?.path();
        let name = from.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let kind = from.extension().unwrap_or_default().to_string_lossy().into_owned();
        let wanted = matches!(kind.as_str(), "json" | "jinja" | "model") && !name.ends_with(".index.json");
        if wanted && from.is_file() {
            std::fs::copy(&from, out.join(name)).map_err(|e| io(&from, e))?;
        }
    }
    Ok(())
}
