//! Matrices: raw little-endian rows, checked against their shape before they are read.
use crate::tensor::v1::{DType, Tensor};
use bytes::{BufMut, Bytes, BytesMut};
use moesaic_types::Error;

/// How activations travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WireDType {
    /// 32-bit floats: nothing is lost.
    #[default]
    F32,
    /// bfloat16: half the bytes, 8 bits of precision.
    Bf16,
    /// int8 with a scale a row: a quarter of the bytes.
    Int8,
}

impl WireDType {
    /// Bytes of a row of so many values.
    pub fn row_bytes(self, cols: usize) -> usize {
        match self {
            Self::F32 => cols * 4,
            Self::Bf16 => cols * 2,
            Self::Int8 => cols + 4,
        }
    }
}

impl From<WireDType> for DType {
    fn from(dtype: WireDType) -> Self {
        match dtype {
            WireDType::F32 => Self::F32,
            WireDType::Bf16 => Self::Bf16,
            WireDType::Int8 => Self::Int8Rows,
        }
    }
}

impl TryFrom<DType> for WireDType {
    type Error = Error;
    fn try_from(dtype: DType) -> Result<Self, Error> {
        match dtype {
            DType::F32 => Ok(Self::F32),
            DType::Bf16 => Ok(Self::Bf16),
            DType::Int8Rows => Ok(Self::Int8),
            DType::Unspecified => Err(Error::invalid("dtype", "dtype is not given; use f32, bf16 or int8 rows")),
        }
    }
}

/// Rows of `cols` values each (their number is a multiple of `cols`), as they travel.
pub fn encode_tensor<'a>(rows: impl ExactSizeIterator<Item = &'a [f32]>, cols: usize, dtype: WireDType) -> Tensor {
    let count = rows.len();
    let data = match dtype {
        WireDType::F32 => {
            let mut data = BytesMut::with_capacity(count * cols * 4);
            rows.for_each(|row| put_f32(&mut data, row));
            data
        }
        WireDType::Bf16 => {
            let mut data = BytesMut::with_capacity(count * cols * 2);
            rows.for_each(|row| row.iter().for_each(|x| data.put_u16_le(half::bf16::from_f32(*x).to_bits())));
            data
        }
        WireDType::Int8 => {
            let (mut data, mut values) = (BytesMut::with_capacity(count * (cols + 4)), BytesMut::new());
            values.reserve(count * cols);
            for row in rows {
                let largest = row.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
                let scale = largest / 127.0;
                data.put_f32_le(scale);
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                row.iter().for_each(|x| values.put_i8((x * inverse).round() as i8));
            }
            data.unsplit(values);
            data
        }
    };
    Tensor { dtype: DType::from(dtype).into(), rows: count as u32, cols: cols as u32, data: data.freeze() }
}

fn put_f32(data: &mut BytesMut, row: &[f32]) {
    if cfg!(target_endian = "little") {
        data.extend_from_slice(bytemuck::cast_slice(row));
    } else {
        row.iter().for_each(|x| data.put_f32_le(*x));
    }
}

/// The values of a matrix with `cols` columns, row-major.
///
/// # Errors
/// `InvalidArgument` naming `field` when dtype, shape and length do not fit together.
pub fn decode_tensor(field: &str, tensor: &Tensor, cols: usize) -> Result<Vec<f32>, Error> {
    let wrong = |reason: String| Error::invalid(field, format!("{field} {reason}"));
    let dtype = DType::try_from(tensor.dtype).map_err(|_| wrong(format!("has unknown dtype {}", tensor.dtype)))?;
    let dtype = WireDType::try_from(dtype)?;
    let rows = tensor.rows as usize;
    if tensor.cols as usize != cols {
        return Err(wrong(format!("has {} columns; {cols} are expected", tensor.cols)));
    }
    let row_bytes = dtype.row_bytes(cols);
    if rows.checked_mul(row_bytes) != Some(tensor.data.len()) {
        let got = tensor.data.len();
        return Err(wrong(format!("has {got} bytes; {rows} rows of {row_bytes} bytes are expected")));
    }
    Ok(match dtype {
        WireDType::F32 => floats(&tensor.data),
        WireDType::Bf16 => {
            let (pairs, _) = tensor.data.as_chunks::<2>();
            pairs.iter().map(|pair| half::bf16::from_bits(u16::from_le_bytes(*pair)).to_f32()).collect()
        }
        WireDType::Int8 => {
            let (scales, values) = tensor.data.split_at(rows * 4);
            let rows = floats(scales).into_iter().zip(values.chunks_exact(cols.max(1)));
            rows.flat_map(|(scale, row)| row.iter().map(move |&x| scale * f32::from(x as i8))).collect()
        }
    })
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let (quads, _) = bytes.as_chunks::<4>();
    quads.iter().map(|quad| f32::from_le_bytes(*quad)).collect()
}

/// Numbers, little-endian.
pub fn encode_u32(values: impl IntoIterator<Item = u32>) -> Bytes {
    values.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// Numbers, little-endian.
///
/// # Errors
/// `InvalidArgument` naming `field` when the length is no multiple of 4.
pub fn decode_u32(field: &str, bytes: &[u8]) -> Result<Vec<u32>, Error> {
    quads(field, bytes).map(|quads| quads.iter().map(|quad| u32::from_le_bytes(*quad)).collect())
}

/// Weights of experts' outputs, little-endian.
pub fn encode_weights(values: impl IntoIterator<Item = f32>) -> Bytes {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

/// Weights of experts' outputs, little-endian.
///
/// # Errors
/// As [`decode_u32`].
pub fn decode_weights(field: &str, bytes: &[u8]) -> Result<Vec<f32>, Error> {
    quads(field, bytes).map(|quads| quads.iter().map(|quad| f32::from_le_bytes(*quad)).collect())
}

fn quads<'a>(field: &str, bytes: &'a [u8]) -> Result<&'a [[u8; 4]], Error> {
    match bytes.as_chunks::<4>() {
        (quads, []) => Ok(quads),
        _ => Err(Error::invalid(field, format!("{field} has {} bytes; its numbers have 4 bytes each", bytes.len()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(values: &[f32], cols: usize, dtype: WireDType) -> Vec<f32> {
        let tensor = encode_tensor(values.chunks_exact(cols), cols, dtype);
        decode_tensor("x", &tensor, cols).expect("what is encoded is decoded")
    }

    #[test]
    fn f32_is_exact_and_the_others_are_close() {
        let values: Vec<f32> = (0..63).map(|i| (i as f32 - 30.5) * 0.37).chain([f32::MIN_POSITIVE]).collect();
        assert_eq!(round_trip(&values, 8, WireDType::F32), values);
        for (dtype, tolerance) in [(WireDType::Bf16, 1.0 / 256.0), (WireDType::Int8, 1.0 / 254.0)] {
            let largest = 12.0;
            for (got, want) in round_trip(&values, 8, dtype).iter().zip(&values) {
                assert!((got - want).abs() <= tolerance * largest, "{dtype:?}: {got} for {want}");
            }
        }
        assert_eq!(round_trip(&[0.0; 6], 3, WireDType::Int8), [0.0; 6], "a row of zeroes has no scale");
        assert_eq!(round_trip(&[], 3, WireDType::Int8), [0.0; 0]);
    }

    #[test]
    fn a_tensor_that_does_not_fit_names_its_field() {
        let good = encode_tensor([[1.0f32, 2.0].as_slice()].into_iter(), 2, WireDType::F32);
        let broken = [
            Tensor { dtype: 0, ..good.clone() },
            Tensor { dtype: 99, ..good.clone() },
            Tensor { cols: 3, ..good.clone() },
            Tensor { rows: 2, ..good.clone() },
            Tensor { rows: u32::MAX, ..good.clone() },
            Tensor { data: good.data.slice(1..), ..good.clone() },
        ];
        for tensor in broken {
            let error = decode_tensor("x", &tensor, 2).expect_err("it is broken");
            assert!(error.field.is_some(), "{tensor:?}: {error}");
        }
        assert_eq!(decode_u32("offsets", &[1, 0, 0]).unwrap_err().field.as_deref(), Some("offsets"));
        assert_eq!(decode_u32("offsets", &encode_u32([7, 1 << 31])), Ok(vec![7, 1 << 31]));
        assert_eq!(decode_weights("weights", &encode_weights([0.5, -1.0])), Ok(vec![0.5, -1.0]));
    }
}
