//! GGUF v2 and v3, little-endian: metadata, and tensors by memory map. Every count and length is checked against the
//! file's size before anything is allocated. Format: ggml's `docs/gguf.md`.
pub use super::gguf_metadata::{Metadata, Value};
use super::{Dtype, TensorInfo, WeightSource, check_range, corrupt, elements, gguf_blocks, map, plain_size};
use super::{plain_to_f32, tensor_error};
use crate::{Error, Result};
use half::f16;
use moesaic_kernels::MappedFile;
use moesaic_types::WeightFormat;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Tensors by name, each with its first byte.
type Places = BTreeMap<String, (TensorInfo, usize)>;

/// First bytes of a file.
pub const MAGIC: &[u8; 4] = b"GGUF";
/// Elements of a metadata array at most; vocabularies have some hundred thousand.
const MAX_ARRAY: usize = 1 << 22;
const MAX_DEPTH: usize = 4;
const MAX_DIMS: usize = 4;

/// What stands in a file before its tensors' bytes, which need not be there.
pub struct Head {
    /// The metadata.
    pub metadata: Metadata,
    /// The tensors, sorted by name.
    pub tensors: Vec<TensorInfo>,
    /// Bytes of the file that it takes.
    pub len: usize,
}

impl Head {
    /// Reads a file's head.
    ///
    /// # Errors
    /// `Io`, `Config`, `Corrupt` or `Tensor`, naming the file.
    pub fn read(path: &Path) -> Result<Self> {
        let file = map(path)?;
        let mut parser = Parser { path, bytes: file.bytes(), at: 0 };
        let (metadata, listed) = parser.head()?;
        let mut tensors: Vec<_> = listed.into_iter().map(|(info, _)| info).collect();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { metadata, tensors, len: parser.at })
    }
}

/// Tensors of a `.gguf` file.
pub struct GgufSource {
    path: PathBuf,
    file: Arc<MappedFile>,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    /// First byte of each tensor, parallel to `tensors`.
    starts: Vec<usize>,
}

impl GgufSource {
    /// Opens a file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = map(path)?;
        let mut parser = Parser { path, bytes: file.bytes(), at: 0 };
        let (metadata, listed) = parser.head()?;
        let (tensors, starts) = parser.places(&metadata, listed)?.into_values().unzip();
        Ok(Self { path: path.to_owned(), metadata, tensors, starts, file })
    }

    /// The file's metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// A tensor, and the bytes of its elements `start..start + len`, which are whole blocks.
    fn blocks(&self, name: &str, start: usize, len: usize) -> Result<(&TensorInfo, &[u8])> {
        let found = self.tensors.binary_search_by(|t| t.name.as_str().cmp(name));
        let index = found.map_err(|_| tensor_error(&self.path, name, "is missing"))?;
        let (info, first) = (&self.tensors[index], self.starts[index]);
        check_range(&self.path, info, start, len)?;
        let (values, size) = layout(info.dtype)
            .ok_or_else(|| tensor_error(&self.path, name, format!("is {:?}, which cannot be read", info.dtype)))?;
        if !start.is_multiple_of(values) || !len.is_multiple_of(values) {
            let reason = format!("elements {start}+{len} are not on bounds of blocks of {values}");
            return Err(tensor_error(&self.path, name, reason));
        }
        // inside the tensor, whose bytes were found inside the file when it was opened
        let range = first + start / values * size..first + (start + len) / values * size;
        let bytes = self.file.bytes().get(range);
        bytes.map(|bytes| (info, bytes)).ok_or_else(|| tensor_error(&self.path, name, "lies outside its file"))
    }
}

impl WeightSource for GgufSource {
    fn path(&self) -> &Path {
        &self.path
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn stored(&self, name: &str) -> Result<Vec<&[u8]>> {
        match self.info(name) {
            Some(TensorInfo { dtype: Dtype::Unsupported(_), .. }) => Ok(Vec::new()),
            info => {
                let len = info.and_then(|info| elements(&info.shape)).unwrap_or(0);
                Ok(vec![self.blocks(name, 0, len)?.1])
            }
        }
    }

    fn read_f32(&self, name: &str, start: usize, out: &mut [f32]) -> Result<()> {
        let (info, bytes) = self.blocks(name, start, out.len())?;
        let read = match info.dtype {
            Dtype::Ggml(format) => gguf_blocks::dequantize(format, bytes, out),
            dtype => plain_to_f32(dtype, bytes, out),
        };
        if !read {
            let reason = format!("elements {start}+{} of {:?} are not finite", out.len(), info.dtype);
            return Err(tensor_error(&self.path, name, reason));
        }
        self.file.passed(bytes.len());
        Ok(())
    }

    fn exact(&self, name: &str, start: usize, len: usize) -> Result<Option<WeightFormat>> {
        match self.info(name).map(|info| info.dtype) {
            Some(Dtype::Ggml(format)) => Ok(gguf_blocks::exact(format, self.blocks(name, start, len)?.1)),
            _ => Ok(None),
        }
    }

    fn read_codes(&self, name: &str, start: usize, scales: &mut [f16], codes: &mut [i8]) -> Result<()> {
        let (info, bytes) = self.blocks(name, start, codes.len())?;
        let read = matches!(info.dtype, Dtype::Ggml(format) if gguf_blocks::codes(format, bytes, scales, codes));
        if !read {
            return Err(tensor_error(&self.path, name, format!("is {:?}, which is not stored as codes", info.dtype)));
        }
        self.file.passed(bytes.len());
        Ok(())
    }

    fn gguf(&self) -> Option<&Metadata> {
        Some(&self.metadata)
    }
}

/// `(values, bytes)` of the smallest readable part; `None` for types that cannot be read.
fn layout(dtype: Dtype) -> Option<(usize, usize)> {
    match dtype {
        Dtype::Ggml(name) => gguf_blocks::block(name),
        dtype => plain_size(dtype).map(|size| (1, size)),
    }
}

fn dtype_of(number: u32) -> Dtype {
    match number {
        0 => Dtype::F32,
        1 => Dtype::F16,
        2 => Dtype::Ggml("Q4_0"),
        3 => Dtype::Ggml("Q4_1"),
        6 => Dtype::Ggml("Q5_0"),
        7 => Dtype::Ggml("Q5_1"),
        8 => Dtype::Ggml("Q8_0"),
        10 => Dtype::Ggml("Q2_K"),
        11 => Dtype::Ggml("Q3_K"),
        12 => Dtype::Ggml("Q4_K"),
        13 => Dtype::Ggml("Q5_K"),
        14 => Dtype::Ggml("Q6_K"),
        30 => Dtype::Bf16,
        39 => Dtype::Ggml("MXFP4"),
        16..=23 | 29 => Dtype::Unsupported("an IQ type"),
        24..=28 => Dtype::Unsupported("an integer or F64 type"),
        34 | 35 => Dtype::Unsupported("a ternary type"),
        _ => Dtype::Unsupported("an unknown type"),
    }
}

struct Parser<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Parser<'a> {
    fn fail(&self, reason: impl std::fmt::Display) -> Error {
        corrupt(self.path, format!("{reason} (at byte {})", self.at))
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8]> {
        let part = usize::try_from(len).ok().and_then(|len| self.bytes[self.at..].get(..len));
        let part = part.ok_or_else(|| self.fail(format!("{what} needs {len} bytes, but {} are left", self.left())))?;
        self.at += part.len();
        Ok(part)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let part = self.take(N as u64, what)?;
        Ok(std::array::from_fn(|i| part[i]))
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn text(&mut self, what: &str) -> Result<String> {
        let len = self.u64(what)?;
        let bytes = self.take(len, what)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| self.fail(format!("{what} is not UTF-8")))
    }

    /// A count of things of `least` bytes each, which must fit in what is left.
    fn count(&mut self, least: usize, what: &str) -> Result<usize> {
        let count = self.u64(what)?;
        let fits = usize::try_from(count).ok().filter(|&count| count <= self.left() / least);
        fits.ok_or_else(|| self.fail(format!("{what} is {count}, but only {} bytes are left", self.left())))
    }

    fn value(&mut self, kind: u32, depth: usize, key: &str) -> Result<Value> {
        Ok(match kind {
            0 => Value::Uint(self.array::<1>(key)?[0].into()),
            1 => Value::Int(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Uint(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Int(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Uint(self.u32(key)?.into()),
            5 => Value::Int(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(key)?).into()),
            7 => match self.array::<1>(key)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => return Err(self.fail(format!("'{key}' is {other}, no truth value"))),
            },
            8 => Value::Text(self.text(key)?),
            9 if depth < MAX_DEPTH => {
                let kind = self.u32(key)?;
                let least = match kind {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    9 => 12,
                    _ => 8,
                };
                let count = self.count(least, key)?;
                if count > MAX_ARRAY {
                    return Err(self.fail(format!("'{key}' has {count} elements; the limit is {MAX_ARRAY}")));
                }
                let mut values = Vec::with_capacity(count);
                for _ in 0..count {
                    values.push(self.value(kind, depth + 1, key)?);
                }
                Value::Array(values)
            }
            9 => return Err(self.fail(format!("'{key}' nests arrays deeper than {MAX_DEPTH}"))),
            10 => Value::Uint(self.u64(key)?),
            11 => Value::Int(i64::from_le_bytes(self.array(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            other => return Err(self.fail(format!("'{key}' has the unknown type {other}"))),
        })
    }

    /// The metadata, and the tensors with their offsets.
    fn head(&mut self) -> Result<(Metadata, Vec<(TensorInfo, u64)>)> {
        if &self.array::<4>("the magic number")? != MAGIC {
            return Err(corrupt(self.path, "is no GGUF file"));
        }
        let version = self.u32("the version")?;
        if version.swap_bytes() <= 3 && version > 3 {
            return Err(corrupt(self.path, "is big-endian GGUF, which is not supported"));
        }
        if !(2..=3).contains(&version) {
            return Err(corrupt(self.path, format!("is GGUF version {version}; supported are 2 and 3")));
        }
        let tensor_count = self.count(24, "the number of tensors")?;
        let value_count = self.count(13, "the number of metadata values")?;
        let mut metadata = Metadata::default();
        for _ in 0..value_count {
            let key = self.text("a metadata key")?;
            let kind = self.u32(&key)?;
            let value = self.value(kind, 0, &key)?;
            if metadata.values.insert(key.clone(), value).is_some() {
                return Err(self.fail(format!("'{key}' stands twice")));
            }
        }
        let mut listed = Vec::new();
        for _ in 0..tensor_count {
            listed.push(self.tensor()?);
        }
        Ok((metadata, listed))
    }

    /// Where the tensors' bytes are; the head is read.
    fn places(&self, metadata: &Metadata, listed: Vec<(TensorInfo, u64)>) -> Result<Places> {
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(value) => {
                value.as_u64().filter(|n| n.is_power_of_two() && (8..=1 << 20).contains(n)).ok_or_else(|| {
                    Error::Config {
                        path: self.path.to_owned(),
                        key: "general.alignment".into(),
                        reason: "is no power of two from 8 to 1048576".into(),
                    }
                })? as usize
            }
        };
        let data = self.at.checked_next_multiple_of(alignment).unwrap_or(usize::MAX);
        let mut found = BTreeMap::new();
        let mut ranges = Vec::new();
        for (info, offset) in listed {
            let (start, end) = self.place(&info, offset, data, alignment)?;
            ranges.push((start, end, info.name.clone()));
            let name = info.name.clone();
            if found.insert(name.clone(), (info, start)).is_some() {
                return Err(tensor_error(self.path, &name, "stands twice"));
            }
        }
        ranges.sort();
        for pair in ranges.windows(2) {
            if pair[0].1 > pair[1].0 {
                return Err(tensor_error(self.path, &pair[1].2, format!("overlaps '{}'", pair[0].2)));
            }
        }
        Ok(found)
    }

    fn tensor(&mut self) -> Result<(TensorInfo, u64)> {
        let name = self.text("a tensor's name")?;
        let dims = self.u32(&name)? as usize;
        if dims > MAX_DIMS {
            return Err(tensor_error(self.path, &name, format!("has {dims} dimensions; the limit is {MAX_DIMS}")));
        }
        let mut shape = Vec::with_capacity(dims);
        for _ in 0..dims {
            let dim = self.u64(&name)?;
            shape.push(usize::try_from(dim).map_err(|_| self.fail(format!("'{name}' has dimension {dim}")))?);
        }
        shape.reverse();
        let dtype = dtype_of(self.u32(&name)?);
        let offset = self.u64(&name)?;
        Ok((TensorInfo { name, shape, dtype }, offset))
    }

    /// First byte and end of a tensor.
    fn place(&self, info: &TensorInfo, offset: u64, data: usize, alignment: usize) -> Result<(usize, usize)> {
        let fail = |reason: String| tensor_error(self.path, &info.name, reason);
        let count = elements(&info.shape).ok_or_else(|| fail(format!("has an impossible shape {:?}", info.shape)))?;
        if !offset.is_multiple_of(alignment as u64) {
            return Err(fail(format!("starts at {offset}, which is no multiple of {alignment}")));
        }
        let start = usize::try_from(offset).ok().and_then(|offset| data.checked_add(offset));
        let len = match layout(info.dtype) {
            None => Some(0),
            Some((values, _)) if info.shape.last().is_some_and(|row| row % values != 0) => {
                return Err(fail(format!(
                    "has rows of {:?}, which are no whole blocks of {values}",
                    info.shape.last()
                )));
            }
            Some((values, size)) => count.div_ceil(values).checked_mul(size),
        };
        let end = start.zip(len).and_then(|(start, len)| start.checked_add(len));
        match start.zip(end) {
            Some((start, end)) if end <= self.bytes.len() => Ok((start, end)),
            _ => Err(fail(format!(
                "of shape {:?} at {offset} reaches beyond the file's {} bytes",
                info.shape,
                self.bytes.len()
            ))),
        }
    }
}
