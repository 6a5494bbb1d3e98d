//! Matrices for the kernels' tests.
use moesaic_kernels::{Format, PackedMatrix};

/// All weight formats.
pub const FORMATS: [Format; 6] = [
    Format::F32,
    Format::Bf16,
    Format::Q8,
    Format::Q4 { group: 32 },
    Format::Q4 { group: 64 },
    Format::Q4 { group: 128 },
];

/// Uniform values in -1..1, the same for one seed.
pub fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Rows `[n, k]` in a format.
pub fn pack(format: Format, n: usize, k: usize, values: &[f32]) -> PackedMatrix {
    PackedMatrix::pack(format, n, k, &mut |row, out| out.copy_from_slice(&values[row * k..(row + 1) * k]))
}
