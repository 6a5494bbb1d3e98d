//! Reads a spec's tensors from a source: names, shapes, formats and the layouts that families store them in.
//!
//! Every matrix has a name of its own: its tensor's, or one derived from it where a tensor holds several
//! (`X.query.weight` of `X.weight`). A folder of `moesaic quantize` holds matrices under these names, packed.
mod experts;

use crate::backend::Matrix;
use crate::source::{Dtype, TensorInfo, WeightSource, tensor_error};
use crate::spec::ModelSpec;
use crate::{Error, Result};
use moesaic_kernels::PackedMatrix;
use moesaic_types::WeightFormat;
use std::ops::Range;
use std::sync::Arc;

/// What a matrix is for, which decides how it may be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// An ordinary matrix.
    Body,
    /// A gate: always f32.
    Gate,
    /// The embedding, or a small matrix whose error spreads: never rounded below bf16.
    Precise,
    /// The output matrix: never rounded below q8.
    Output,
}

/// Which row of the stored matrix a row is.
type RowOf<'a> = Arc<dyn Fn(usize) -> usize + Send + Sync + 'a>;

/// A matrix inside a tensor of a file.
struct Stored<'a> {
    /// The matrix's own name.
    name: String,
    tensor: String,
    /// Shape that the file must have.
    shape: Vec<usize>,
    /// Index in a stacked tensor.
    index: usize,
    rows: usize,
    cols: usize,
    /// `None`: the same.
    row_of: Option<RowOf<'a>>,
}

/// Reads tensors of one model.
pub struct Weights<'a> {
    source: &'a dyn WeightSource,
    spec: &'a ModelSpec,
    format: Option<WeightFormat>,
}

impl<'a> Weights<'a> {
    /// Reads `spec`'s tensors; `format` `None` keeps what is stored.
    pub fn new(source: &'a dyn WeightSource, spec: &'a ModelSpec, format: Option<WeightFormat>) -> Self {
        Self { source, spec, format }
    }

    /// The architecture.
    pub fn spec(&self) -> &'a ModelSpec {
        self.spec
    }

    fn fail(&self, tensor: &str, reason: impl Into<String>) -> Error {
        tensor_error(self.source.path(), tensor, reason)
    }

    fn dtype(&self, name: &str, shape: &[usize]) -> Result<Dtype> {
        match self.source.info(name) {
            None => Err(self.fail(name, "is missing")),
            Some(info) if info.shape != shape => {
                let reason = format!("has shape {:?}, but the configuration says {shape:?}", info.shape);
                Err(self.fail(name, reason))
            }
            // before memory is taken for a shape that no bytes stand for
            Some(TensorInfo { dtype: Dtype::Unsupported(dtype), .. }) => {
                Err(self.fail(name, format!("is {dtype}, which cannot be read")))
            }
            Some(info) => Ok(info.dtype),
        }
    }

    /// How a matrix is held: as it was asked for, within its role's bounds; else as it is stored, if that is one of
    /// our formats (`exact`: the one that holds it without rounding), and in q8 if it is not (K blocks, FP8).
    fn format(&self, dtype: Dtype, exact: Option<WeightFormat>, role: Role) -> WeightFormat {
        let asked = match (self.format, exact, dtype) {
            _ if role == Role::Gate => return WeightFormat::F32,
            (None, Some(exact), _) => return exact,
            (Some(asked), ..) => asked,
            (None, None, Dtype::F32 | Dtype::F16) => WeightFormat::F32,
            (None, None, Dtype::Bf16) => WeightFormat::Bf16,
            (None, None, _) => WeightFormat::Q8,
        };
        match (role, asked) {
            (Role::Precise, WeightFormat::Q8 | WeightFormat::Q4 { .. }) => WeightFormat::Bf16,
            (Role::Output, WeightFormat::Q4 { .. }) => WeightFormat::Q8,
            (_, asked) => asked,
        }
    }

    /// A whole tensor of one dimension.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.slice(name, &[len], 0, len)
    }

    /// Values `start..start + len` of a tensor of the given shape.
    fn slice(&self, name: &str, shape: &[usize], start: usize, len: usize) -> Result<Vec<f32>> {
        self.dtype(name, shape)?;
        let mut values = vec![0.0; len];
        self.source.read_f32(name, start, &mut values)?;
        Ok(values)
    }

    /// `name.bias` if `there`.
    pub fn bias(&self, name: &str, len: usize, there: bool) -> Result<Option<Vec<f32>>> {
        if there { self.vector(&format!("{name}.bias"), len).map(Some) } else { Ok(None) }
    }

    /// `name.weight` of shape `[rows, cols]`.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize, role: Role) -> Result<Matrix<'a>> {
        let tensor = format!("{name}.weight");
        let shape = vec![rows, cols];
        self.stored(Stored { name: tensor.clone(), tensor, shape, index: 0, rows, cols, row_of: None }, role)
    }

    /// Rows `row_of(0..rows)` of `name.weight` of shape `[stored_rows, cols]`: the matrix `name.part.weight`.
    pub fn matrix_rows(
        &self,
        (name, part): (&str, &str),
        stored_rows: usize,
        (rows, cols): (usize, usize),
        role: Role,
        row_of: impl Fn(usize) -> usize + Send + Sync + 'a,
    ) -> Result<Matrix<'a>> {
        let (tensor, shape) = (format!("{name}.weight"), vec![stored_rows, cols]);
        let (name, row_of) = (format!("{name}.{part}.weight"), Some(Arc::new(row_of) as RowOf<'a>));
        self.stored(Stored { name, tensor, shape, index: 0, rows, cols, row_of }, role)
    }

    /// `name.weight` of one row, which some files hold as a vector; in f32.
    pub fn row(&self, name: &str, cols: usize) -> Result<Matrix<'a>> {
        let tensor = format!("{name}.weight");
        if self.source.info(&tensor).is_some_and(|info| info.shape == [cols]) {
            let values = self.vector(&tensor, cols)?;
            return Ok(owned(tensor.clone(), tensor, values, (1, cols), WeightFormat::F32));
        }
        self.matrix(name, 1, cols, Role::Gate)
    }

    /// The matrix of that name if the source holds it packed.
    fn ready(&self, name: &str, rows: usize, cols: usize, role: Role) -> Result<Option<Matrix<'a>>> {
        let Some(Dtype::Packed(stored)) = self.source.info(name).map(|info| info.dtype) else { return Ok(None) };
        self.dtype(name, &[rows, cols])?;
        let format = self.format(Dtype::Packed(stored), Some(stored), role);
        let packed: Option<PackedMatrix> = if format == stored { self.source.packed(name)? } else { None };
        let (source, name) = (self.source, name.to_owned());
        let tensor = name.clone();
        let read = move |row: usize, out: &mut [f32]| source.read_f32(&tensor, row * cols, out);
        let tensor = name.clone();
        Ok(Some(Matrix { name, tensor, rows, cols, format, packed, codes: None, read: Box::new(read) }))
    }

    fn stored(&self, stored: Stored<'a>, role: Role) -> Result<Matrix<'a>> {
        if let Some(ready) = self.ready(&stored.name, stored.rows, stored.cols, role)? {
            return Ok(ready);
        }
        let Stored { name, tensor, shape, index, rows, cols, row_of } = stored;
        let dtype = self.dtype(&tensor, &shape)?;
        let stored_rows: usize = shape[shape.len() - 2];
        let first = index * stored_rows;
        let exact = self.source.exact(&tensor, first * cols, stored_rows * cols)?;
        let format = self.format(dtype, exact, role);
        let at = move |row: usize| (first + row_of.as_ref().map_or(row, |row_of| row_of(row))) * cols;
        let at = Arc::new(at);
        let source = self.source;
        let as_codes = matches!(exact, Some(WeightFormat::Q8 | WeightFormat::Q4 { .. }));
        let takes_codes = as_codes && (exact == Some(format) || format == WeightFormat::Q8);
        let codes = takes_codes.then(|| {
            let (tensor, at) = (tensor.clone(), at.clone());
            Box::new(move |row: usize, scales: &mut [_], codes: &mut [_]| {
                source.read_codes(&tensor, at(row), scales, codes)
            }) as _
        });
        let read = {
            let tensor = tensor.clone();
            Box::new(move |row: usize, out: &mut [f32]| source.read_f32(&tensor, at(row), out))
        };
        Ok(Matrix { name, tensor, rows, cols, format, packed: None, codes, read })
    }

    /// Matrix `head` of the stack `name.weight` of shape `[heads, rows, cols]`.
    pub fn head(&self, name: &str, (heads, head): (usize, usize), (rows, cols): (usize, usize)) -> Result<Matrix<'a>> {
        let (tensor, shape) = (format!("{name}.weight"), vec![heads, rows, cols]);
        let name = format!("{name}.{head}.weight");
        self.stored(Stored { name, tensor, shape, index: head, rows, cols, row_of: None }, Role::Precise)
    }

    /// Some rows of `name.weight` of shape `(stored_rows, cols)`: the matrix `name.part.weight`; turned to
    /// `[cols, rows]` when `transpose`, where no group of the file stays one.
    pub fn part(
        &self,
        (name, part): (&str, &str),
        (stored_rows, cols): (usize, usize),
        rows: Range<usize>,
        transpose: bool,
    ) -> Result<Matrix<'a>> {
        let (first, count, role) = (rows.start, rows.len(), Role::Precise);
        if !transpose {
            return self.matrix_rows((name, part), stored_rows, (count, cols), role, move |row| first + row);
        }
        let (name, tensor) = (format!("{name}.{part}.weight"), format!("{name}.weight"));
        if let Some(ready) = self.ready(&name, cols, count, role)? {
            return Ok(ready);
        }
        let shape = [stored_rows, cols];
        let dtype = self.dtype(&tensor, &shape)?;
        let exact = self.source.exact(&tensor, first * cols, count * cols)?;
        let format = self.format(dtype, exact.map(|_| WeightFormat::F32), role);
        let values = self.slice(&tensor, &shape, first * cols, count * cols)?;
        Ok(owned(name, tensor, transposed(&values, count, cols), (cols, count), format))
    }
}

/// A matrix that is held in memory.
fn owned<'a>(
    name: String,
    tensor: String,
    values: Vec<f32>,
    (rows, cols): (usize, usize),
    format: WeightFormat,
) -> Matrix<'a> {
    let read = move |row: usize, out: &mut [f32]| {
        out.copy_from_slice(&values[row * cols..(row + 1) * cols]);
        Ok(())
    };
    Matrix { name, tensor, rows, cols, format, packed: None, codes: None, read: Box::new(read) }
}

/// `[rows, cols]` as `[cols, rows]`.
fn transposed(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut turned = Vec::with_capacity(values.len());
    for col in 0..cols {
        turned.extend((0..rows).map(|row| values[row * cols + col]));
    }
    turned
}
