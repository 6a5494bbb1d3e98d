//! Norms, rotary positions, activations and sums over rows. All f32; every row on its own.

/// `x / rms(x) · weight` for each row of `weight.len()` values; `eps` is added to the mean square.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let mean = sum(x.iter().map(|v| v * v)) / x.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        for ((o, v), w) in out.iter_mut().zip(x).zip(weight) {
            *o = v * scale * w;
        }
    }
}

/// `(x - mean) / deviation · weight + bias` for each row.
pub fn layer_norm(x: &[f32], weight: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let mean = sum(x.iter().copied()) / x.len() as f32;
        let variance = sum(x.iter().map(|v| (v - mean) * (v - mean))) / x.len() as f32;
        let scale = 1.0 / (variance + eps).sqrt();
        for (i, o) in out.iter_mut().enumerate() {
            *o = (x[i] - mean) * scale * weight[i] + bias.map_or(0.0, |b| b[i]);
        }
    }
}

/// Sums in eight lanes, then pairwise: a fixed order that depends on the length only.
fn sum(values: impl ExactSizeIterator<Item = f32>) -> f32 {
    let mut lanes = [0f32; 8];
    for (i, v) in values.enumerate() {
        lanes[i % 8] += v;
    }
    ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]))
}

/// Rotates pairs of one head's values by the angles whose cosines and sines are given (one each a pair).
/// `interleaved`: pairs are (0, 1), (2, 3), ...; otherwise (0, p), (1, p + 1), ... with p pairs.
pub fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32], interleaved: bool) {
    let pairs = cos.len();
    for i in 0..pairs {
        let (a, b) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + pairs) };
        let (x, y) = (head[a], head[b]);
        head[a] = x * cos[i] - y * sin[i];
        head[b] = y * cos[i] + x * sin[i];
    }
}

/// `x + factor · y`, in place.
pub fn add(x: &mut [f32], y: &[f32], factor: f32) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += factor * y;
    }
}

/// Multiplies in place.
pub fn scale(x: &mut [f32], factor: f32) {
    for x in x {
        *x *= factor;
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
