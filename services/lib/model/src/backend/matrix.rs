//! Weight matrices on their way from a file to a device.
use crate::spec::Activation;
use crate::{Error, Result};
use half::f16;
use moesaic_kernels::{Format, PackedMatrix};
use moesaic_types::WeightFormat;
use std::ops::Range;

/// Writes one row of a matrix; called with each row once, in order.
pub type ReadRow<'a> = Box<dyn FnMut(usize, &mut [f32]) -> Result<()> + 'a>;

/// Writes one row's scales, one for each 32 values, and its codes; called with each row once, in order.
pub type ReadCodes<'a> = Box<dyn FnMut(usize, &mut [f16], &mut [i8]) -> Result<()> + 'a>;

/// Values that share a scale where a file's codes are taken as they are.
const CODE_GROUP: usize = 32;

/// A weight matrix `[rows, cols]` on its way to a device: `y = x Wᵀ`, so `rows` is the output's width.
pub struct Matrix<'a> {
    /// Its own name in a model: that of its tensor, or one derived from it where a tensor holds several matrices.
    pub name: String,
    /// The tensor that it is read from.
    pub tensor: String,
    /// Output width.
    pub rows: usize,
    /// Input width.
    pub cols: usize,
    /// How the device should hold it.
    pub format: WeightFormat,
    /// The matrix as the file holds it already, in `format`.
    pub packed: Option<PackedMatrix>,
    /// Its rows as codes that `format` (q8, or q4 of groups of 32) takes over without rounding.
    pub codes: Option<ReadCodes<'a>>,
    /// Its rows.
    pub read: ReadRow<'a>,
}

impl<'a> Matrix<'a> {
    /// Some rows and columns of it; the columns start and end on bounds of its format's groups, or at its end.
    pub fn slice(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        let Self { name, tensor, cols: all_cols, format, packed, codes, mut read, .. } = self;
        let packed = packed.map(|packed| packed.slice(rows.clone(), cols.clone()));
        let (count, width, first) = (rows.len(), cols.len(), rows.start);
        let codes = codes.map(|mut codes| {
            let (mut scales, mut whole) = (vec![f16::ZERO; all_cols / CODE_GROUP], vec![0; all_cols]);
            let (cols, groups) = (cols.clone(), cols.start / CODE_GROUP..cols.end / CODE_GROUP);
            let part = move |row: usize, to_scales: &mut [f16], to_codes: &mut [i8]| {
                codes(first + row, &mut scales, &mut whole)?;
                to_scales.copy_from_slice(&scales[groups.clone()]);
                to_codes.copy_from_slice(&whole[cols.clone()]);
                Ok(())
            };
            Box::new(part) as ReadCodes<'a>
        });
        let mut whole = vec![0.0; all_cols];
        let read = move |row: usize, out: &mut [f32]| {
            read(first + row, &mut whole)?;
            out.copy_from_slice(&whole[cols.clone()]);
            Ok(())
        };
        Self { name, tensor, rows: count, cols: width, format, packed, codes, read: Box::new(read) }
    }

    /// Bytes of memory that it takes in its format, about; none where the file holds it so.
    pub fn bytes(&self) -> u64 {
        if self.packed.is_some() {
            return 0;
        }
        let values = (self.rows * self.cols) as u64;
        match self.format {
            WeightFormat::F32 => values * 4,
            WeightFormat::Bf16 => values * 2,
            WeightFormat::Q8 => values + values / 16,
            WeightFormat::Q4 { group } => values / 2 + 2 * values / u64::from(group.max(1)),
        }
    }

    /// The matrix in the kernels' panel layout. What the file holds packed stays in the file; codes are copied; only
    /// what is left is rounded to the format, one row in f32 at a time.
    pub fn pack(mut self) -> Result<PackedMatrix> {
        let (format, rows, cols) = (kernel_format(self.format), self.rows, self.cols);
        if let Some(packed) = self.packed {
            return Ok(packed);
        }
        if let Some(codes) = &mut self.codes {
            return PackedMatrix::pack_codes(format, rows, cols, codes);
        }
        let mut failure = None;
        let packed = PackedMatrix::pack(format, rows, cols, &mut |row, out| {
            if failure.is_none() {
                failure = (self.read)(row, out).err();
            }
        });
        match failure {
            None => Ok(packed),
            Some(error) => Err(error),
        }
    }

    /// All rows in f32, with the rounding that the format brings.
    pub fn to_f32(mut self) -> Result<Vec<f32>> {
        let (rows, cols) = (self.rows, self.cols);
        let mut values = vec![0.0; rows * cols];
        let unrounded = self.packed.is_none() && (self.format == WeightFormat::F32 || self.codes.is_some());
        if unrounded {
            for (row, out) in values.chunks_exact_mut(cols).enumerate() {
                (self.read)(row, out)?;
            }
        } else {
            let packed = self.pack()?;
            values.chunks_exact_mut(cols).enumerate().for_each(|(row, out)| packed.dequantize_row(row, out));
        }
        Ok(values)
    }
}

/// The kernels' word for a weight format.
pub fn kernel_format(format: WeightFormat) -> Format {
    match format {
        WeightFormat::F32 => Format::F32,
        WeightFormat::Bf16 => Format::Bf16,
        WeightFormat::Q8 => Format::Q8,
        WeightFormat::Q4 { group } => Format::Q4 { group },
    }
}

/// A feed-forward network on its way to a device.
pub struct FfnMatrices<'a> {
    /// The gate, if the network is gated.
    pub gate: Option<Matrix<'a>>,
    /// Up.
    pub up: Matrix<'a>,
    /// Down.
    pub down: Matrix<'a>,
    /// Bias of the gate.
    pub gate_bias: Option<Vec<f32>>,
    /// Bias of up.
    pub up_bias: Option<Vec<f32>>,
    /// Bias of down.
    pub down_bias: Option<Vec<f32>>,
    /// The nonlinearity.
    pub activation: Activation,
}

impl FfnMatrices<'_> {
    /// Bytes of memory that its matrices take, about; none for what the file holds in their format.
    pub fn bytes(&self) -> u64 {
        self.gate.iter().chain([&self.up, &self.down]).map(Matrix::bytes).sum()
    }

    /// The slice of the intermediate dimension that `slice` names. The slices' outputs add up to the whole network's;
    /// the bias of down is in the first one's.
    ///
    /// # Errors
    /// `Backend` when the dimension has too few groups for so many slices.
    pub fn slice(self, slice: TensorSlice) -> Result<Self> {
        if slice == TensorSlice::WHOLE {
            return Ok(self);
        }
        let (inner, hidden) = (self.up.rows, self.up.cols);
        let group = kernel_format(self.down.format).group();
        let part = slice.of(inner, group).ok_or_else(|| Error::Backend {
            backend: "experts",
            reason: format!(
                "an intermediate width of {inner} in groups of {group} cannot be cut into {} slices",
                slice.ranks
            ),
        })?;
        let cut = |bias: Option<Vec<f32>>| bias.map(|bias| bias[part.clone()].to_vec());
        Ok(Self {
            gate: self.gate.map(|gate| gate.slice(part.clone(), 0..hidden)),
            up: self.up.slice(part.clone(), 0..hidden),
            gate_bias: cut(self.gate_bias),
            up_bias: cut(self.up_bias),
            down: {
                let rows = self.down.rows;
                self.down.slice(0..rows, part.clone())
            },
            down_bias: self.down_bias.filter(|_| slice.rank == 0),
            activation: self.activation,
        })
    }
}

/// Which slice of each expert a device holds (tensor parallelism).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorSlice {
    /// Which one, from 0.
    pub rank: usize,
    /// How many there are; at least 1.
    pub ranks: usize,
}

impl TensorSlice {
    /// No slicing.
    pub const WHOLE: Self = Self { rank: 0, ranks: 1 };

    /// The slice's part of a dimension that is cut on multiples of `group` only; `None` where a slice would be empty.
    fn of(self, width: usize, group: usize) -> Option<Range<usize>> {
        let groups = width.div_ceil(group);
        let bound = |rank: usize| (groups * rank / self.ranks * group).min(width);
        (groups >= self.ranks).then(|| bound(self.rank)..bound(self.rank + 1))
    }
}
