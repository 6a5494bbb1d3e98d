//! Norms, rotary positions, activations and sums over rows. All f32; every row on its own.
use crate::isa::for_each_isa;

for_each_isa! {
    /// `x / rms(x) · weight` for each row of `weight.len()` values; `eps` is added to the mean square.
    pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) => rms_norm_body
}

#[inline(always)]
fn rms_norm_body(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let mean = sum(x, |v| v * v) / x.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        for ((o, v), w) in out.iter_mut().zip(x).zip(weight) {
            *o = v * scale * w;
        }
    }
}

for_each_isa! {
    /// `(x - mean) / deviation · weight + bias` for each row.
    pub fn layer_norm(x: &[f32], weight: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]) => layer_norm_body
}

#[inline(always)]
fn layer_norm_body(x: &[f32], weight: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let mean = sum(x, |v| v) / x.len() as f32;
        let variance = sum(x, |v| (v - mean) * (v - mean)) / x.len() as f32;
        let scale = 1.0 / (variance + eps).sqrt();
        for ((o, v), w) in out.iter_mut().zip(x).zip(weight) {
            *o = (v - mean) * scale * w;
        }
        if let Some(bias) = bias {
            out.iter_mut().zip(bias).for_each(|(o, b)| *o += b);
        }
    }
}

/// Lanes of a sum: four vectors of the widest registers, so that additions do not wait for each other.
const LANES: usize = 64;

/// Sums `term` of all values in lanes, then pairwise: a fixed order that depends on the length only.
#[inline(always)]
fn sum(values: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += term(*v);
        }
    }
    for (lane, v) in lanes.iter_mut().zip(rest) {
        *lane += term(*v);
    }
    let mut width = LANES / 2;
    while width > 0 {
        let (low, high) = lanes.split_at_mut(width);
        low.iter_mut().zip(high).for_each(|(low, high)| *low += *high);
        width /= 2;
    }
    lanes[0]
}

for_each_isa! {
    /// Rotates pairs of one head's values by the angles whose cosines and sines are given (one each a pair).
    /// `interleaved`: pairs are (0, 1), (2, 3), ...; otherwise (0, p), (1, p + 1), ... with p pairs.
    pub fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32], interleaved: bool) => rotate_body
}

#[inline(always)]
fn rotate_body(head: &mut [f32], cos: &[f32], sin: &[f32], interleaved: bool) {
    let turn = |x: &mut f32, y: &mut f32, cos: f32, sin: f32| (*x, *y) = (*x * cos - *y * sin, *y * cos + *x * sin);
    let angles = cos.iter().zip(sin);
    if interleaved {
        for (pair, (cos, sin)) in head.as_chunks_mut::<2>().0.iter_mut().zip(angles) {
            let [x, y] = pair;
            turn(x, y, *cos, *sin);
        }
    } else {
        let (first, second) = head.split_at_mut(cos.len());
        for ((x, y), (cos, sin)) in first.iter_mut().zip(second).zip(angles) {
            turn(x, y, *cos, *sin);
        }
    }
}

for_each_isa! {
    /// `x + factor · y`, in place.
    pub fn add(x: &mut [f32], y: &[f32], factor: f32) => add_body
}

#[inline(always)]
fn add_body(x: &mut [f32], y: &[f32], factor: f32) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += factor * y;
    }
}

/// The index of the largest value, the first of equals; `None` for an empty slice or where all are NaN.
pub fn argmax(x: &[f32]) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (i, v) in x.iter().enumerate() {
        if !v.is_nan() && best.is_none_or(|b| *v > x[b]) {
            best = Some(i);
        }
    }
    best
}
