//! The nonlinearity between the two products of a feed-forward network.
//!
//! Over whole tiles the sigmoid is made of one polynomial exponential in f32, the same lanes and operations on every
//! instruction set. Largest relative error of the exponential against f64: 1.2e-7 for -87 <= x <= 88; beyond, the bound's
//! value is taken. Source: Cephes' expf (S. L. Moshier).
use crate::activations::ROUND;
use crate::isa::for_each_isa;

/// What stands between the two products of a feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `silu(gate) · up`.
    Silu,
    /// `gelu(gate) · up`, by the error function.
    Gelu,
    /// `gelu(gate) · up`, by the hyperbolic tangent.
    GeluTanh,
    /// `relu(gate) · up`.
    Relu,
    /// GPT-OSS: `(clamp(up) + 1) · gate · sigmoid(alpha · gate)`, gate clamped from above, up on both sides.
    ClampedSwiGlu {
        /// Factor in the sigmoid.
        alpha: f32,
        /// Bound of gate and up.
        limit: f32,
    },
}

impl Activation {
    /// The activation alone, for a network without a gate.
    pub fn apply(self, x: f32) -> f32 {
        match self {
            Self::Silu => x / (1.0 + (-x).exp()),
            Self::Gelu => 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)),
            Self::GeluTanh => {
                let inner = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
                0.5 * x * (1.0 + inner.tanh())
            }
            Self::Relu => x.max(0.0),
            Self::ClampedSwiGlu { alpha, limit } => {
                let x = x.min(limit);
                x / (1.0 + (-alpha * x).exp())
            }
        }
    }

    /// The activation with its gate.
    pub fn gated(self, gate: f32, up: f32) -> f32 {
        match self {
            Self::ClampedSwiGlu { limit, .. } => (up.clamp(-limit, limit) + 1.0) * self.apply(gate),
            _ => self.apply(gate) * up,
        }
    }
}

/// The error function; largest error 1.2e-7 (W. J. Cody's form as a Chebyshev fit, Numerical Recipes 6.2).
fn erf(x: f32) -> f32 {
    let z = f64::from(x.abs());
    let t = 1.0 / (1.0 + 0.5 * z);
    let poly = [
        0.170_872_77,
        -0.822_152_23,
        1.488_515_87,
        -1.135_203_98,
        0.278_868_07,
        -0.186_288_06,
        0.096_784_18,
        0.374_091_96,
        1.000_023_68,
    ];
    let sum = poly.iter().fold(0.0, |sum, c| sum * t + c);
    let tail = t * (-z * z - 1.265_512_23 + t * sum).exp();
    let value = (1.0 - tail) as f32;
    if x < 0.0 { -value } else { value }
}

/// `exp(x)` for -87.3 <= x <= 88.3, else that of the bound; NaN for NaN.
#[inline(always)]
fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.3, 88.3);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let power = shifted.to_bits().wrapping_sub(ROUND.to_bits());
    let n = shifted - ROUND;
    // ln 2 in two parts, the first with few bits, so that n times it is exact
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut sum = 1.987_569_1e-4f32;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5, 1.0, 1.0] {
        sum = sum.mul_add(r, c);
    }
    sum * f32::from_bits(power.wrapping_add(127) << 23)
}

/// `x · sigmoid(factor · x)`.
#[inline(always)]
fn swish(x: f32, factor: f32) -> f32 {
    x / (1.0 + exp(-factor * x))
}

for_each_isa! {
    /// Puts the activation with its gate in the gate's place.
    pub(crate) fn gate_all(activation: Activation, gate: &mut [f32], up: &[f32]) => gate_body
}

#[inline(always)]
fn gate_body(activation: Activation, gate: &mut [f32], up: &[f32]) {
    let pairs = gate.iter_mut().zip(up);
    match activation {
        Activation::Silu => pairs.for_each(|(gate, up)| *gate = swish(*gate, 1.0) * up),
        Activation::GeluTanh => {
            // 1 + tanh(u) = 2 sigmoid(2 u)
            let factor = 2.0 * (2.0 / std::f32::consts::PI).sqrt();
            pairs.for_each(|(gate, up)| {
                let x = *gate;
                *gate = x / (1.0 + exp(-factor * (x + 0.044_715 * x * x * x))) * up;
            });
        }
        Activation::ClampedSwiGlu { alpha, limit } => {
            pairs.for_each(|(gate, up)| *gate = swish(gate.min(limit), alpha) * (up.clamp(-limit, limit) + 1.0));
        }
        Activation::Relu => pairs.for_each(|(gate, up)| *gate = gate.max(0.0) * up),
        Activation::Gelu => pairs.for_each(|(gate, up)| *gate = activation.gated(*gate, *up)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    #[test]
    fn erf_is_exact_to_single_precision() {
        for (x, y) in [(0.0, 0.0), (0.5, 0.520_499_9), (1.0, 0.842_700_8), (-2.0, -0.995_322_3), (4.0, 1.0)] {
            assert!((erf(x) - y).abs() < 3e-7, "erf({x})");
        }
    }

    #[test]
    fn the_exponential_is_exact_to_single_precision() {
        let mut worst = 0f64;
        for i in 0..2_000_000 {
            let x = -87.0 + i as f32 * (175.0 / 2e6);
            worst = worst.max((f64::from(exp(x)) / f64::from(x).exp() - 1.0).abs());
        }
        assert!(worst < 1.2e-7, "{worst}");
        assert!(exp(-1e30) > 0.0 && exp(1e30).is_finite() && exp(f32::NAN).is_nan());
    }

    #[test]
    fn tiles_equal_the_definition_on_every_instruction_set() {
        let clamped = Activation::ClampedSwiGlu { alpha: 1.702, limit: 7.0 };
        let all = [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, clamped];
        let gates: Vec<f32> = (-1000..1000).map(|i| i as f32 * 0.03).chain([1e30, -1e30, 1e-40, f32::NAN]).collect();
        let ups: Vec<f32> = (0..gates.len()).map(|i| (i % 17) as f32 - 8.0).collect();
        for activation in all {
            let results: Vec<Vec<f32>> = Isa::available()
                .into_iter()
                .map(|isa| {
                    let mut out = gates.clone();
                    gate_all(isa, activation, &mut out, &ups);
                    out
                })
                .collect();
            for (i, got) in results[0].iter().enumerate() {
                let want = activation.gated(gates[i], ups[i]);
                let error = (got - want).abs();
                assert!(error <= 1e-6 + 1e-6 * want.abs() || want.is_nan() || error.is_nan(), "{activation:?} {i}");
                assert!(results.iter().all(|r| r[i].to_bits() == got.to_bits() || r[i].is_nan() && got.is_nan()));
            }
        }
    }
}
