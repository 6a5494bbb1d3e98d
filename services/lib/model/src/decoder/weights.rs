//! Reads a spec's tensors from a source: names, shapes, formats and the layouts that families store them in.
use crate::backend::{FfnMatrices, Matrix};
use crate::source::{Dtype, WeightSource};
use crate::spec::names::{ExpertNames, at_expert, at_layer};
use crate::spec::{Dense, ModelSpec};
use crate::{Error, Result};
use moesaic_types::WeightFormat;

/// What a matrix is for, which decides how it may be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// An ordinary matrix.
    Body,
    /// A gate: always f32.
    Gate,
    /// The embedding, or a small matrix whose error spreads: never below bf16.
    Precise,
    /// The output matrix: never below q8.
    Output,
}

/// A matrix inside a tensor of a file.
struct Stored<'a> {
    name: String,
    /// Shape that the file must have.
    shape: Vec<usize>,
    /// Index in a stacked tensor.
    index: usize,
    rows: usize,
    cols: usize,
    /// Which row of the stored matrix row `i` is; `None`: the same.
    row_of: Option<Box<dyn Fn(usize) -> usize + Send + 'a>>,
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

    fn dtype(&self, name: &str, shape: &[usize]) -> Result<Dtype> {
        let fail = |reason: String| {
            Err(Error::Tensor { path: self.source.path().to_owned(), tensor: name.to_owned(), reason })
        };
        match self.source.info(name) {
            None => fail("is missing".into()),
            Some(info) if info.shape != shape => {
                fail(format!("has shape {:?}, but the configuration says {shape:?}", info.shape))
            }
            Some(info) => Ok(info.dtype),
        }
    }

    fn format(&self, dtype: Dtype, role: Role) -> WeightFormat {
        let stored = || match dtype {
            Dtype::F32 | Dtype::F16 => WeightFormat::F32,
            Dtype::Bf16 => WeightFormat::Bf16,
            Dtype::Ggml("Q4_0") => WeightFormat::Q4 { group: 32 },
            Dtype::Ggml(_) | Dtype::Unsupported(_) => WeightFormat::Q8,
            Dtype::Packed(format) => format,
        };
        let format = self.format.unwrap_or_else(stored);
        match (role, format) {
            (Role::Gate, _) => WeightFormat::F32,
            (Role::Precise, WeightFormat::Q8 | WeightFormat::Q4 { .. }) => WeightFormat::Bf16,
            (Role::Output, WeightFormat::Q4 { .. }) => WeightFormat::Q8,
            (_, format) => format,
        }
    }

    /// A whole tensor of one dimension.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.dtype(name, &[len])?;
        let mut values = vec![0.0; len];
        self.source.read_f32(name, 0, &mut values)?;
        Ok(values)
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
        let stored =
            Stored { name: format!("{name}.weight"), shape: vec![rows, cols], index: 0, rows, cols, row_of: None };
        self.stored(stored, role)
    }

    /// Rows `row_of(0..rows)` of `name.weight` of shape `[stored_rows, cols]`.
    pub fn matrix_rows(
        &self,
        name: &str,
        stored_rows: usize,
        (rows, cols): (usize, usize),
        role: Role,
        row_of: impl Fn(usize) -> usize + Send + 'a,
    ) -> Result<Matrix<'a>> {
        let (name, shape) = (format!("{name}.weight"), vec![stored_rows, cols]);
        self.stored(Stored { name, shape, index: 0, rows, cols, row_of: Some(Box::new(row_of)) }, role)
    }

    /// `name.weight` of one row, which some files hold as a vector; in f32.
    pub fn row(&self, name: &str, cols: usize) -> Result<Matrix<'a>> {
        let vector = format!("{name}.weight");
        if self.source.info(&vector).is_some_and(|info| info.shape == [cols]) {
            return Ok(self.owned(self.vector(&vector, cols)?, 1, cols, WeightFormat::F32));
        }
        self.matrix(name, 1, cols, Role::Gate)
    }

    fn stored(&self, stored: Stored<'a>, role: Role) -> Result<Matrix<'a>> {
        let Stored { name, shape, index, rows, cols, row_of } = stored;
        let dtype = self.dtype(&name, &shape)?;
        let format = self.format(dtype, role);
        let source = self.source;
        let packed = match dtype {
            Dtype::Packed(stored) if stored == format && row_of.is_none() => source.packed(&name, index)?,
            _ => None,
        };
        if let Some(packed) = &packed
            && (packed.rows() != rows || packed.cols() != cols)
        {
            let reason = format!("holds [{}, {}], not [{rows}, {cols}]", packed.rows(), packed.cols());
            return Err(Error::Tensor { path: source.path().to_owned(), tensor: name, reason });
        }
        let stored_rows: usize = shape[shape.len() - 2];
        let first = index * stored_rows;
        let read = move |row: usize, out: &mut [f32]| {
            let row = row_of.as_ref().map_or(row, |row_of| row_of(row));
            source.read_f32(&name, (first + row) * cols, out)
        };
        Ok(Matrix { rows, cols, format, packed, read: Box::new(read) })
    }

    /// A matrix that is held in memory, row by row.
    fn owned(&self, values: Vec<f32>, rows: usize, cols: usize, format: WeightFormat) -> Matrix<'a> {
        let read = move |row: usize, out: &mut [f32]| {
            out.copy_from_slice(&values[row * cols..(row + 1) * cols]);
            Ok(())
        };
        Matrix { rows, cols, format, packed: None, read: Box::new(read) }
    }

    /// Some rows of `name.weight` of shape `(stored_rows, cols)`; turned to `[cols, rows]` when `transpose`.
    pub fn part(
        &self,
        name: &str,
        (stored_rows, cols): (usize, usize),
        rows: std::ops::Range<usize>,
        transpose: bool,
    ) -> Result<Matrix<'a>> {
        let name = format!("{name}.weight");
        let format = self.format(self.dtype(&name, &[stored_rows, cols])?, Role::Precise);
        let count = rows.len();
        let values = self.slice(&name, &[stored_rows, cols], rows.start * cols, count * cols)?;
        Ok(if transpose {
            self.owned(transposed(&values, count, cols), cols, count, format)
        } else {
            self.owned(values, count, cols, format)
        })
    }

    /// A dense network under names gate, up, down.
    pub fn network(&self, names: &[&str; 3], layer: usize, form: Dense) -> Result<FfnMatrices<'a>> {
        let [gate, up, down] = names.map(|name| at_layer(name, layer));
        self.separate(&[gate, up, down], form)
    }

    fn separate(&self, [gate, up, down]: &[String; 3], form: Dense) -> Result<FfnMatrices<'a>> {
        let (hidden, inner) = (self.spec.hidden, form.intermediate);
        Ok(FfnMatrices {
            gate: if form.gated { Some(self.matrix(gate, inner, hidden, Role::Body)?) } else { None },
            up: self.matrix(up, inner, hidden, Role::Body)?,
            down: self.matrix(down, hidden, inner, Role::Body)?,
            gate_bias: self.bias(gate, inner, form.bias && form.gated)?,
            up_bias: self.bias(up, inner, form.bias)?,
            down_bias: self.bias(down, hidden, form.bias)?,
            activation: form.activation,
        })
    }

    /// One expert of a layer that has `experts`.
    pub fn expert(&self, layer: usize, expert: usize, experts: usize, form: Dense) -> Result<FfnMatrices<'a>> {
        let (hidden, inner) = (self.spec.hidden, form.intermediate);
        let stacked = |name: &str, (stored_rows, rows): (usize, usize), cols, first: usize| {
            let row_of: Option<Box<dyn Fn(usize) -> usize + Send>> =
                if stored_rows == rows { None } else { Some(Box::new(move |row| first + row)) };
            let name = format!("{}.weight", at_layer(name, layer));
            let shape = vec![experts, stored_rows, cols];
            self.stored(Stored { name, shape, index: expert, rows, cols, row_of }, Role::Body)
        };
        let plain = |gate, up, down| FfnMatrices {
            gate: Some(gate),
            up,
            down,
            gate_bias: None,
            up_bias: None,
            down_bias: None,
            activation: form.activation,
        };
        match self.spec.names.experts {
            ExpertNames::Separate(names) => self.separate(&names.map(|name| at_expert(name, layer, expert)), form),
            ExpertNames::Stacked([gate, up, down]) => Ok(plain(
                stacked(gate, (inner, inner), hidden, 0)?,
                stacked(up, (inner, inner), hidden, 0)?,
                stacked(down, (hidden, hidden), inner, 0)?,
            )),
            ExpertNames::Fused([gate_up, down]) => Ok(plain(
                stacked(gate_up, (2 * inner, inner), hidden, 0)?,
                stacked(gate_up, (2 * inner, inner), hidden, inner)?,
                stacked(down, (hidden, hidden), inner, 0)?,
            )),
            ExpertNames::Interleaved([gate_up, down]) => {
                self.interleaved(&at_layer(gate_up, layer), &at_layer(down, layer), expert, experts, form)
            }
        }
    }

    fn interleaved(
        &self,
        gate_up: &str,
        down: &str,
        expert: usize,
        experts: usize,
        form: Dense,
    ) -> Result<FfnMatrices<'a>> {
        let (hidden, inner) = (self.spec.hidden, form.intermediate);
        let format = |name: &str, shape: &[usize]| Ok::<_, Error>(self.format(self.dtype(name, shape)?, Role::Body));
        let gate_up_shape = [experts, hidden, 2 * inner];
        let gate_up_format = format(gate_up, &gate_up_shape)?;
        let size = 2 * inner * hidden;
        let rows = transposed(&self.slice(gate_up, &gate_up_shape, expert * size, size)?, hidden, 2 * inner);
        let every_second = |first: usize| rows.chunks_exact(hidden).skip(first).step_by(2).flatten().copied().collect();
        let down_shape = [experts, inner, hidden];
        let down_format = format(down, &down_shape)?;
        let size = inner * hidden;
        let down_rows = transposed(&self.slice(down, &down_shape, expert * size, size)?, inner, hidden);
        let (mut gate_bias, mut up_bias, mut down_bias) = (None, None, None);
        if form.bias {
            let name = format!("{gate_up}_bias");
            let both = self.slice(&name, &[experts, 2 * inner], expert * 2 * inner, 2 * inner)?;
            gate_bias = Some(both.iter().step_by(2).copied().collect());
            up_bias = Some(both.iter().skip(1).step_by(2).copied().collect());
            down_bias = Some(self.slice(&format!("{down}_bias"), &[experts, hidden], expert * hidden, hidden)?);
        }
        Ok(FfnMatrices {
            gate: Some(self.owned(every_second(0), inner, hidden, gate_up_format)),
            up: self.owned(every_second(1), inner, hidden, gate_up_format),
            down: self.owned(down_rows, hidden, inner, down_format),
            gate_bias,
            up_bias,
            down_bias,
            activation: form.activation,
        })
    }
}

/// `[rows, cols]` as `[cols, rows]`.
fn transposed(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut turned = Vec::with_capacity(values.len());
    for col in 0..cols {
        turned.extend((0..rows).map(|row| values[row * cols + col]));
    }
    turned
}
