//! Packed weight matrices: panels of 32 rows, contiguous along K.
//!
//! | format | bytes of a panel |
//! | --- | --- |
//! | f32, bf16 | for each k: 32 values, one a row |
//! | q8 | for each group of 32 k: 32 f16 scales, then for each 4 k (a quad) two lines: rows 0..16, rows 16..32 |
//! | q4 | for each group of 32, 64 or 128 k: 32 f16 scales, then for each quad one line |
//!
//! A line has 64 bytes: byte 4 r + j is row r's (or row 16 + r's) value at k = 4 quad + j, so that a 32-bit lane holds
//! what one dot product of four 8-bit values takes. A q8 byte is the code + 128; a q4 byte has row r's code + 8 in the
//! low nibble and row 16 + r's in the high one: unsigned, which the 8-bit products want of one side.
//!
//! Rows beyond the last have scales of 0, columns beyond the last code 0. Quantization is to nearest, symmetric: the scale
//! of a q8 group is max|w| / 127; that of a q4 group maps the value of largest magnitude to -8 (as GGUF's Q4_0 does).
//! Codes that a file holds already are taken as they are ([`PackedMatrix::pack_codes`]): there a q8 code may be -128 and
//! a scale negative or subnormal. A weight is `code as f32 * scale as f32`, whatever it came from.
use crate::storage::{AlignedBytes, Storage};
use crate::{Error, isa::for_each_isa};
use half::{bf16, f16};
use std::ops::Range;
use std::sync::Arc;

/// Rows of a panel.
pub const PANEL: usize = 32;
/// Bytes of a line.
pub(crate) const LINE: usize = 64;
/// Bytes of the two lines that a quad has in q8.
pub(crate) const Q8_LINES: usize = 2 * LINE;
/// Values of the longest group that is quantized at load.
const MAX_GROUP: usize = 128;

/// How a matrix is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// int8 in groups of 32.
    Q8,
    /// 4-bit in groups.
    Q4 {
        /// 32, 64 or 128 values along K.
        group: u16,
    },
}

impl Format {
    /// Values along K that share a scale; 1 where there are none.
    pub fn group(self) -> usize {
        match self {
            Self::F32 | Self::Bf16 => 1,
            Self::Q8 => 32,
            Self::Q4 { group } => usize::from(group),
        }
    }

    /// The kernels read groups of these lengths only, without a look at what lies behind them.
    fn check(self) -> Result<(), Error> {
        match self {
            Self::Q4 { group } if !matches!(group, 32 | 64 | 128) => Err(Error::Group { group }),
            _ => Ok(()),
        }
    }

    /// Bytes of one group of one panel.
    pub(crate) fn group_bytes(self) -> usize {
        match self {
            Self::F32 => PANEL * 4,
            Self::Bf16 => PANEL * 2,
            Self::Q8 => PANEL * 2 + 32 * PANEL,
            Self::Q4 { group } => PANEL * 2 + usize::from(group) * PANEL / 2,
        }
    }
}

/// A matrix of `rows` outputs and `cols` inputs.
#[derive(Clone)]
pub struct PackedMatrix<S = Storage> {
    format: Format,
    rows: usize,
    cols: usize,
    storage: S,
}

impl PackedMatrix<Storage> {
    /// Bytes of a packed matrix.
    pub fn packed_len(format: Format, rows: usize, cols: usize) -> usize {
        rows.div_ceil(PANEL) * Self::panel_len(format, cols)
    }

    fn panel_len(format: Format, cols: usize) -> usize {
        cols.div_ceil(format.group()) * format.group_bytes()
    }

    /// Packs a matrix, row by row: `fill(row, out)` writes a row's `cols` values.
    ///
    /// # Panics
    /// When a q4 group is not of 32, 64 or 128 values.
    pub fn pack(format: Format, rows: usize, cols: usize, fill: &mut dyn FnMut(usize, &mut [f32])) -> Self {
        assert_eq!(format.check(), Ok(()), "{format:?} cannot be packed");
        let mut bytes = AlignedBytes::from_zeroed(Self::packed_len(format, rows, cols));
        let panel_len = Self::panel_len(format, cols);
        let mut row = vec![0.0; cols.next_multiple_of(format.group())];
        for r in 0..rows {
            fill(r, &mut row[..cols]);
            let panel = &mut bytes.as_mut_slice()[r / PANEL * panel_len..][..panel_len];
            pack_row(format, panel, r % PANEL, &row);
        }
        Self { format, rows, cols, storage: Storage::Owned(Arc::new(bytes)) }
    }

    /// Packs codes that were quantized elsewhere, row by row, without rounding: `fill(row, scales, codes)` writes a
    /// row's scales, one for each group, and its `cols` codes: for q8 any, for q4 from -8 to 7.
    ///
    /// # Errors
    /// What `fill` says; the first error ends the packing.
    ///
    /// # Panics
    /// When the format has no codes, when a q4 group is not of 32, 64 or 128 values, when `cols` are no whole groups, or
    /// when a q4 code does not fit 4 bits.
    pub fn pack_codes<E, F>(format: Format, rows: usize, cols: usize, mut fill: F) -> Result<Self, E>
    where
        F: FnMut(usize, &mut [f16], &mut [i8]) -> Result<(), E>,
    {
        let group = format.group();
        assert!(matches!(format, Format::Q8 | Format::Q4 { .. }), "{format:?} has no codes");
        assert_eq!(format.check(), Ok(()), "{format:?} cannot be packed");
        assert!(cols.is_multiple_of(group), "{cols} columns are no whole groups of {group}");
        let mut bytes = AlignedBytes::from_zeroed(Self::packed_len(format, rows, cols));
        let panel_len = Self::panel_len(format, cols);
        let (mut scales, mut codes) = (vec![f16::ZERO; cols / group], vec![0i8; cols]);
        for r in 0..rows {
            fill(r, &mut scales, &mut codes)?;
            let panel = &mut bytes.as_mut_slice()[r / PANEL * panel_len..][..panel_len];
            let groups = codes.chunks_exact(group).zip(&scales);
            for ((codes, scale), bytes) in groups.zip(panel.chunks_exact_mut(format.group_bytes())) {
                put_group(format, bytes, r % PANEL, *scale, codes);
            }
        }
        Ok(Self { format, rows, cols, storage: Storage::Owned(Arc::new(bytes)) })
    }

    /// Takes bytes that are packed already.
    ///
    /// # Errors
    /// `Group`, `Length` and `Alignment`, when the bytes cannot be such a matrix.
    pub fn from_storage(format: Format, rows: usize, cols: usize, storage: Storage) -> Result<Self, Error> {
        format.check()?;
        let (expected, actual) = (Self::packed_len(format, rows, cols), storage.bytes().len());
        if expected != actual {
            return Err(Error::Length { rows, cols, expected, actual });
        }
        let offset = storage.bytes().as_ptr() as usize;
        if !offset.is_multiple_of(crate::storage::ALIGNMENT) {
            return Err(Error::Alignment { offset: offset % 4096 });
        }
        Ok(Self { format, rows, cols, storage })
    }

    /// The packed bytes' place.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Panels of 32 rows.
    pub fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// The bytes of one panel.
    pub(crate) fn panel(&self, index: usize) -> &[u8] {
        let len = Self::panel_len(self.format, self.cols);
        &self.storage.bytes()[index * len..][..len]
    }

    /// The bytes of a panel and all that follow.
    pub(crate) fn panels_from(&self, index: usize) -> &[u8] {
        &self.storage.bytes()[index * Self::panel_len(self.format, self.cols)..]
    }

    /// Some rows and columns, exactly as they are packed here: a slice for tensor parallelism. Whole panels of all
    /// columns of a mapped file stay in the file.
    ///
    /// # Panics
    /// When a range lies outside the matrix, or the columns do not start on a group's bound.
    pub fn slice(&self, rows: Range<usize>, cols: Range<usize>) -> Self {
        assert!(rows.end <= self.rows && cols.end <= self.cols, "a slice lies inside its matrix");
        let (group, group_bytes) = (self.format.group(), self.format.group_bytes());
        assert!(cols.start.is_multiple_of(group), "columns of a slice start on a group's bound");
        assert!(cols.end.is_multiple_of(group) || cols.end == self.cols, "and end on one");
        let whole_panels =
            rows.start.is_multiple_of(PANEL) && (rows.end.is_multiple_of(PANEL) || rows.end == self.rows);
        let panel_len = Self::panel_len(self.format, self.cols);
        if cols == (0..self.cols) && whole_panels {
            let (offset, len) = (rows.start / PANEL * panel_len, rows.len().div_ceil(PANEL) * panel_len);
            let storage = self.storage.slice(offset, len);
            return Self { format: self.format, rows: rows.len(), cols: cols.len(), storage };
        }
        let mut bytes = AlignedBytes::from_zeroed(Self::packed_len(self.format, rows.len(), cols.len()));
        let to_len = Self::panel_len(self.format, cols.len());
        let first = cols.start / group * group_bytes;
        for (to, from) in rows.clone().enumerate() {
            let source = &self.panel(from / PANEL)[first..first + to_len];
            let target = &mut bytes.as_mut_slice()[to / PANEL * to_len..][..to_len];
            for (source, target) in source.chunks_exact(group_bytes).zip(target.chunks_exact_mut(group_bytes)) {
                copy_lane(self.format, source, from % PANEL, target, to % PANEL);
            }
        }
        let storage = Storage::Owned(Arc::new(bytes));
        Self { format: self.format, rows: rows.len(), cols: cols.len(), storage }
    }

    /// One row's `cols` values.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        let (panel, lane) = (self.panel(row / PANEL), row % PANEL);
        let (group, group_bytes) = (self.format.group(), self.format.group_bytes());
        for (k, value) in out.iter_mut().enumerate().take(self.cols) {
            let bytes = &panel[k / group * group_bytes..][..group_bytes];
            let scale = |bytes: &[u8]| f16::from_le_bytes([bytes[lane * 2], bytes[lane * 2 + 1]]).to_f32();
            *value = match self.format {
                Format::F32 => f32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[lane * 4 + i])),
                Format::Bf16 => bf16::from_le_bytes([bytes[lane * 2], bytes[lane * 2 + 1]]).to_f32(),
                Format::Q8 => {
                    let byte = bytes[PANEL * 2 + k % group / 4 * Q8_LINES + lane * 4 + k % 4];
                    (f32::from(byte) - 128.0) * scale(bytes)
                }
                Format::Q4 { .. } => {
                    let byte = bytes[PANEL * 2 + k % group / 4 * LINE + lane % 16 * 4 + k % 4];
                    let nibble = if lane < 16 { byte & 15 } else { byte >> 4 };
                    (f32::from(nibble) - 8.0) * scale(bytes)
                }
            };
        }
    }
}

fn pack_row(format: Format, panel: &mut [u8], lane: usize, row: &[f32]) {
    let (group, group_bytes) = (format.group(), format.group_bytes());
    let mut codes = [0i8; MAX_GROUP];
    for (values, bytes) in row.chunks_exact(group).zip(panel.chunks_exact_mut(group_bytes)) {
        match format {
            Format::F32 => bytes[lane * 4..][..4].copy_from_slice(&values[0].to_le_bytes()),
            Format::Bf16 => bytes[lane * 2..][..2].copy_from_slice(&bf16::from_f32(values[0]).to_le_bytes()),
            Format::Q8 => {
                let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
                let scale = f16::from_f32(largest / 127.0);
                let inverse = inverse(scale);
                let code = |v: f32| (v * inverse).round().clamp(-127.0, 127.0) as i8;
                codes.iter_mut().zip(values).for_each(|(c, v)| *c = code(*v));
                put_group(format, bytes, lane, scale, &codes[..group]);
            }
            Format::Q4 { .. } => {
                let extreme = values.iter().fold(0f32, |m, v| if v.abs() > m.abs() { *v } else { m });
                let scale = f16::from_f32(extreme / -8.0);
                let inverse = inverse(scale);
                let code = |v: f32| (v * inverse).round().clamp(-8.0, 7.0) as i8;
                codes.iter_mut().zip(values).for_each(|(c, v)| *c = code(*v));
                put_group(format, bytes, lane, scale, &codes[..group]);
            }
        }
    }
}

/// Writes one row's scale and codes of a group of q8 or q4.
fn put_group(format: Format, bytes: &mut [u8], lane: usize, scale: f16, codes: &[i8]) {
    let (scales, lines) = bytes.split_at_mut(PANEL * 2);
    scales[lane * 2..][..2].copy_from_slice(&scale.to_le_bytes());
    if format == Format::Q8 {
        for (lines, quad) in lines.chunks_exact_mut(Q8_LINES).zip(codes.as_chunks::<4>().0) {
            lines[lane * 4..][..4].copy_from_slice(&quad.map(|code| code as u8 ^ 0x80));
        }
        return;
    }
    let shift = if lane < 16 { 0 } else { 4 };
    for (line, quad) in lines.as_chunks_mut::<LINE>().0.iter_mut().zip(codes.as_chunks::<4>().0) {
        let nibbles = quad.map(|code| code.wrapping_add(8) as u8);
        assert!(nibbles.iter().all(|nibble| *nibble < 16), "a q4 code of {quad:?} does not fit 4 bits");
        let word = &mut line.as_chunks_mut::<4>().0[lane % 16];
        let others = u32::from_le_bytes(*word) & !(0x0f0f_0f0f << shift);
        *word = (others | u32::from_le_bytes(nibbles) << shift).to_le_bytes();
    }
}

/// The byte with a row's nibble put in.
fn with_nibble(byte: u8, lane: usize, nibble: u8) -> u8 {
    if lane < 16 { (byte & 0xf0) | nibble } else { (byte & 0x0f) | nibble << 4 }
}

/// Copies one row's part of a group.
fn copy_lane(format: Format, source: &[u8], from: usize, target: &mut [u8], to: usize) {
    let width = if format == Format::F32 { 4 } else { 2 };
    target[to * width..][..width].copy_from_slice(&source[from * width..][..width]);
    match format {
        Format::F32 | Format::Bf16 => {}
        Format::Q8 => {
            let source = source[PANEL * 2..].chunks_exact(Q8_LINES);
            for (source, target) in source.zip(target[PANEL * 2..].chunks_exact_mut(Q8_LINES)) {
                target[to * 4..][..4].copy_from_slice(&source[from * 4..][..4]);
            }
        }
        Format::Q4 { .. } => {
            let source = source[PANEL * 2..].chunks_exact(LINE);
            for (source, target) in source.zip(target[PANEL * 2..].chunks_exact_mut(LINE)) {
                let source = &source[from % 16 * 4..][..4];
                for (target, byte) in target[to % 16 * 4..][..4].iter_mut().zip(source) {
                    *target = with_nibble(*target, to, if from < 16 { byte & 15 } else { byte >> 4 });
                }
            }
        }
    }
}

fn inverse(scale: f16) -> f32 {
    let scale = scale.to_f32();
    if scale == 0.0 || !scale.is_finite() { 0.0 } else { 1.0 / scale }
}

for_each_isa! {
    /// Expands a panel to f32 lines of 32 rows, one for each of `cols` columns, as the f32 format has them.
    pub(crate) fn expand_panel(format: Format, panel: &[u8], cols: usize, out: &mut [f32]) => expand_body
}

#[inline(always)]
fn expand_body(format: Format, panel: &[u8], cols: usize, out: &mut [f32]) {
    let (group, group_bytes) = (format.group(), format.group_bytes());
    let lines = out.as_chunks_mut::<PANEL>().0;
    match format {
        Format::F32 => {
            for (line, bytes) in lines.iter_mut().zip(panel.as_chunks::<{ PANEL * 4 }>().0).take(cols) {
                for (v, b) in line.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *v = f32::from_le_bytes(*b);
                }
            }
        }
        Format::Bf16 => {
            for (line, bytes) in lines.iter_mut().zip(panel.as_chunks::<{ PANEL * 2 }>().0).take(cols) {
                for (v, b) in line.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *v = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
                }
            }
        }
        Format::Q8 | Format::Q4 { .. } => {
            let q8 = format == Format::Q8;
            let quad_bytes = if q8 { Q8_LINES } else { LINE };
            for (lines, bytes) in lines[..cols].chunks_mut(group).zip(panel.chunks_exact(group_bytes)) {
                let mut scales = [0f32; PANEL];
                for (s, b) in scales.iter_mut().zip(bytes[..PANEL * 2].as_chunks::<2>().0) {
                    *s = f16::from_le_bytes(*b).to_f32();
                }
                for (lines, quad) in lines.chunks_mut(4).zip(bytes[PANEL * 2..].chunks_exact(quad_bytes)) {
                    let words = |i: usize| u32::from_le_bytes(quad.as_chunks::<4>().0[i]);
                    for (j, line) in lines.iter_mut().enumerate() {
                        let (low, high) = line.split_at_mut(16);
                        let (scales_low, scales_high) = scales.split_at(16);
                        for i in 0..16 {
                            let (a, b) = if q8 {
                                let byte = |word: u32| (word >> (8 * j) & 255) as i32 - 128;
                                (byte(words(i)), byte(words(16 + i)))
                            } else {
                                let nibble = |shift: usize| (words(i) >> shift & 15) as i32 - 8;
                                (nibble(8 * j), nibble(8 * j + 4))
                            };
                            low[i] = a as f32 * scales_low[i];
                            high[i] = b as f32 * scales_high[i];
                        }
                    }
                }
            }
        }
    }
}
