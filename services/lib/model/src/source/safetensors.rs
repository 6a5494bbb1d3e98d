//! Safetensors: one file, or shards under `model.safetensors.index.json`. Memory-mapped; the header is checked before
//! anything is believed.
use super::tensor_error;
use super::{
    Dtype, TensorInfo, WeightSource, check_range, corrupt, elements, map, plain_size, plain_to_f32, read_json,
};
use crate::Result;
use moesaic_kernels::MappedFile;
use serde_json::Value;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// The longest header that is read, as the format's own library allows.
const MAX_HEADER: usize = 100_000_000;
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

struct Place {
    file: usize,
    /// Bytes in the file.
    start: usize,
    end: usize,
}

/// Tensors of a Hugging Face folder.
pub struct SafetensorsSource {
    path: PathBuf,
    files: Vec<(PathBuf, Arc<MappedFile>)>,
    tensors: Vec<TensorInfo>,
    /// Parallel to `tensors`.
    places: Vec<Place>,
}

impl SafetensorsSource {
    /// Opens a folder or a single file.
    pub fn open(path: &Path) -> Result<Self> {
        let mut source = Self { path: path.to_owned(), files: Vec::new(), tensors: Vec::new(), places: Vec::new() };
        let mut found = BTreeMap::new();
        if path.is_file() {
            source.add_file(path, &mut found)?;
        } else if path.join(INDEX).is_file() {
            source.add_shards(path, &mut found)?;
        } else if path.join(SINGLE).is_file() {
            source.add_file(&path.join(SINGLE), &mut found)?;
        } else {
            let reason = format!("has no {SINGLE} and no {INDEX}; is it a model folder?");
            return Err(corrupt(path, reason));
        }
        for (info, place) in found.into_values() {
            source.tensors.push(info);
            source.places.push(place);
        }
        Ok(source)
    }

    /// Bytes `start..start + len` of a tensor, whatever its type.
    pub(super) fn raw(&self, name: &str, start: usize, len: usize) -> Result<Raw<'_>> {
        let found = self.tensors.binary_search_by(|t| t.name.as_str().cmp(name));
        let place = &self.places[found.map_err(|_| tensor_error(&self.path, name, "is missing"))?];
        let (path, file) = &self.files[place.file];
        let first = place.start.checked_add(start);
        let range = first.and_then(|first| Some(first..first.checked_add(len).filter(|end| *end <= place.end)?));
        let bytes = range.and_then(|range| file.bytes().get(range));
        let bytes = bytes.ok_or_else(|| {
            tensor_error(path, name, format!("has {} bytes, not {start}+{len}", place.end - place.start))
        })?;
        Ok(Raw { bytes, file })
    }

    fn add_shards(&mut self, folder: &Path, found: &mut BTreeMap<String, (TensorInfo, Place)>) -> Result<()> {
        let index = folder.join(INDEX);
        let json = read_json(&index)?;
        let map =
            json.get("weight_map").and_then(Value::as_object).ok_or_else(|| corrupt(&index, "has no 'weight_map'"))?;
        let mut shards = BTreeSet::new();
        for (tensor, shard) in map {
            let shard =
                shard.as_str().ok_or_else(|| corrupt(&index, format!("names no file for tensor '{tensor}'")))?;
            if !is_file_name(shard) {
                return Err(corrupt(&index, format!("tensor '{tensor}' is in '{shard}', which is no file name")));
            }
            shards.insert(shard);
        }
        for shard in shards {
            let file = folder.join(shard);
            if !file.is_file() {
                return Err(corrupt(&file, format!("is missing; {INDEX} names it as a shard")));
            }
            self.add_file(&file, found)?;
        }
        for (tensor, shard) in map {
            let shard = shard.as_str().unwrap_or_default();
            match found.get(tensor) {
                Some((_, place)) if self.files[place.file].0 == folder.join(shard) => {}
                Some(_) => return Err(corrupt(&index, format!("tensor '{tensor}' is not in '{shard}'"))),
                None => {
                    return Err(tensor_error(&folder.join(shard), tensor, format!("is missing; {INDEX} names it")));
                }
            }
        }
        Ok(())
    }

    fn add_file(&mut self, path: &Path, found: &mut BTreeMap<String, (TensorInfo, Place)>) -> Result<()> {
        let file = map(path)?;
        let index = self.files.len();
        for (info, start, end) in parse(path, file.bytes())? {
            let name = info.name.clone();
            if found.insert(name.clone(), (info, Place { file: index, start, end })).is_some() {
                return Err(tensor_error(path, &name, "stands in two files"));
            }
        }
        self.files.push((path.to_owned(), file));
        Ok(())
    }
}

/// Some bytes of a tensor.
pub(super) struct Raw<'a> {
    pub(super) bytes: &'a [u8],
    file: &'a MappedFile,
}

impl Raw<'_> {
    /// Says that they are not needed again soon.
    pub(super) fn passed(&self) {
        self.file.passed(self.bytes.len());
    }
}

/// Whether a name stays inside its folder.
pub(super) fn is_file_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Vec<(TensorInfo, usize, usize)>> {
    let (length, rest) =
        bytes.split_first_chunk::<8>().ok_or_else(|| corrupt(path, format!("is {} bytes long", bytes.len())))?;
    let length = u64::from_le_bytes(*length);
    let header = usize::try_from(length).ok().filter(|&length| length <= MAX_HEADER).and_then(|n| rest.get(..n));
    let header = header.ok_or_else(|| {
        corrupt(path, format!("says its header has {length} bytes, but {} follow (limit {MAX_HEADER})", rest.len()))
    })?;
    let data_start = 8 + header.len();
    let data_len = bytes.len() - data_start;
    let json: Value =
        serde_json::from_slice(header).map_err(|error| corrupt(path, format!("its header is not JSON: {error}")))?;
    let object = json.as_object().ok_or_else(|| corrupt(path, "its header is no JSON object"))?;
    let mut tensors = Vec::with_capacity(object.len());
    for (name, entry) in object.iter().filter(|(name, _)| *name != "__metadata__") {
        let fail = |reason: String| tensor_error(path, name, reason);
        let numbers = |key: &str| -> Option<Vec<usize>> {
            entry.get(key)?.as_array()?.iter().map(|n| n.as_u64().and_then(|n| usize::try_from(n).ok())).collect()
        };
        let dtype = entry.get("dtype").and_then(Value::as_str).ok_or_else(|| fail("has no dtype".into()))?;
        let shape = numbers("shape").ok_or_else(|| fail("has no valid shape".into()))?;
        let offsets = numbers("data_offsets").ok_or_else(|| fail("has no valid data_offsets".into()))?;
        let &[start, end] = offsets.as_slice() else {
            return Err(fail(format!("has {} data_offsets, not 2", offsets.len())));
        };
        if start > end || end > data_len {
            return Err(fail(format!("lies at {start}..{end}, but the file has {data_len} bytes of data")));
        }
        let (dtype, size) = dtype_of(dtype);
        let count = elements(&shape).ok_or_else(|| fail(format!("has an impossible shape {shape:?}")))?;
        if let Some(size) = size
            && count.checked_mul(size) != Some(end - start)
        {
            return Err(fail(format!("has shape {shape:?} of {dtype:?}, but {} bytes", end - start)));
        }
        tensors.push((TensorInfo { name: name.clone(), shape, dtype }, data_start + start, data_start + end));
    }
    covers(path, &tensors, data_start, bytes.len())?;
    Ok(tensors)
}

/// Checks that the tensors lie one after another and fill the data, as the format demands: a file with holes or with
/// more behind could say one thing to one reader and another to the next.
fn covers(path: &Path, tensors: &[(TensorInfo, usize, usize)], first: usize, last: usize) -> Result<()> {
    let mut order: Vec<_> = tensors.iter().collect();
    order.sort_by_key(|(_, start, end)| (*start, *end));
    let (mut at, mut before) = (first, None);
    for (info, start, end) in order {
        match (start.cmp(&at), before) {
            (Ordering::Equal, _) => {}
            (Ordering::Less, Some(before)) => {
                return Err(tensor_error(path, &info.name, format!("overlaps '{before}'")));
            }
            _ => {
                let hole = start - at;
                return Err(tensor_error(path, &info.name, format!("has {hole} bytes before it that are no tensor's")));
            }
        }
        (at, before) = (*end, Some(&info.name));
    }
    match last - at {
        0 => Ok(()),
        more => Err(corrupt(path, format!("has {more} bytes after its last tensor"))),
    }
}

/// The type of a safetensors name, and its bytes where they are whole.
fn dtype_of(name: &str) -> (Dtype, Option<usize>) {
    match name {
        "F32" => (Dtype::F32, Some(4)),
        "F16" => (Dtype::F16, Some(2)),
        "BF16" => (Dtype::Bf16, Some(2)),
        "F64" => (Dtype::Unsupported("F64"), Some(8)),
        "I64" => (Dtype::Unsupported("I64"), Some(8)),
        "U64" => (Dtype::Unsupported("U64"), Some(8)),
        "I32" => (Dtype::Unsupported("I32"), Some(4)),
        "U32" => (Dtype::Unsupported("U32"), Some(4)),
        "I16" => (Dtype::Unsupported("I16"), Some(2)),
        "U16" => (Dtype::Unsupported("U16"), Some(2)),
        "I8" => (Dtype::Unsupported("I8"), Some(1)),
        "U8" => (Dtype::Unsupported("U8"), Some(1)),
        "BOOL" => (Dtype::Unsupported("BOOL"), Some(1)),
        "F8_E4M3" => (Dtype::Unsupported("F8_E4M3"), Some(1)),
        "F8_E5M2" => (Dtype::Unsupported("F8_E5M2"), Some(1)),
        _ => (Dtype::Unsupported("an unknown type"), None),
    }
}

impl WeightSource for SafetensorsSource {
    fn path(&self) -> &Path {
        &self.path
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn stored(&self, name: &str) -> Result<Vec<&[u8]>> {
        let found = self.tensors.binary_search_by(|t| t.name.as_str().cmp(name));
        let place = &self.places[found.map_err(|_| tensor_error(&self.path, name, "is missing"))?];
        Ok(vec![self.raw(name, 0, place.end - place.start)?.bytes])
    }

    fn read_f32(&self, name: &str, start: usize, out: &mut [f32]) -> Result<()> {
        let info = self.info(name).ok_or_else(|| tensor_error(&self.path, name, "is missing"))?;
        check_range(&self.path, info, start, out.len())?;
        let Some(size) = plain_size(info.dtype) else {
            let Dtype::Unsupported(dtype) = info.dtype else {
                return Err(tensor_error(&self.path, name, "is of no plain type"));
            };
            let reason = format!("is {dtype}, which cannot be read; use F32, F16 or BF16");
            return Err(tensor_error(&self.path, name, reason));
        };
        let raw = self.raw(name, start * size, out.len() * size)?;
        plain_to_f32(info.dtype, raw.bytes, out);
        raw.passed();
        Ok(())
    }
}
