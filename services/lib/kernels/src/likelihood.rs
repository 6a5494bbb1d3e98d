//! `{isa}-exp-weights`: what the tokens of a row of logits weigh in a draw.
//!
//! Shapes: logits `[n]` f32, weights `[n]` f64, sums `[n / 256, rounded up]` f64. Weight = e^((logit - largest) /
//! temperature), in f64: the exponent is a multiple of ln 2 and a rest of at most half of it, for which there is a
//! polynomial (Cody and Waite, Software Manual for the Elementary Functions, 1980). Relative error below 2⁻⁵¹, and 2⁻⁵² of
//! the exponent, which is rounded; 0 where the weight is below 2⁻¹⁰²¹. Sums have 8 lanes and one order, the same on all
//! instruction sets.
use crate::isa::{Isa, for_each_isa};

/// Weights that one sum is of.
pub const RUN: usize = 256;
/// Lanes of a sum.
const LANES: usize = 8;
/// Adding it to a number of less than 2⁵¹ rounds it to an integer, which then stands in the low bits.
const ROUND: f64 = 6_755_399_441_055_744.0;
/// ln 2 in two parts: the first has zeros at its end, so that its multiples with integers are exact.
const LN_2: [f64; 2] = [0.693_147_180_369_123_8, 1.908_214_929_270_587_7e-10];
/// 1 / n! for n from 13 down to 0.
const COEFFICIENTS: [f64; 14] = [
    1.605_904_383_682_161_3e-10,
    2.087_675_698_786_81e-9,
    2.505_210_838_544_172e-8,
    2.755_731_922_398_589e-7,
    2.755_731_922_398_589_3e-6,
    2.480_158_730_158_73e-5,
    1.984_126_984_126_984e-4,
    1.388_888_888_888_889e-3,
    8.333_333_333_333_333e-3,
    4.166_666_666_666_666_4e-2,
    0.166_666_666_666_666_66,
    0.5,
    1.0,
    1.0,
];

/// Weights of a row's tokens and the sums of each [`RUN`] of them; their total. No logit is above `largest`, which is
/// finite; `temperature` is above zero.
///
/// # Panics
/// When a slice has another length than the logits say.
pub fn weigh(isa: Isa, logits: &[f32], largest: f64, temperature: f64, weights: &mut [f64], sums: &mut [f64]) -> f64 {
    assert!(weights.len() == logits.len() && sums.len() == logits.len().div_ceil(RUN), "a weight a logit, a sum a run");
    weigh_runs(isa, logits, largest, 1.0 / temperature, weights, sums);
    sums.iter().sum()
}

for_each_isa! {
    /// As [`weigh`], of the temperature's inverse.
    fn weigh_runs(logits: &[f32], largest: f64, inverse: f64, weights: &mut [f64], sums: &mut [f64]) => weigh_body
}

#[inline(always)]
fn weigh_body(logits: &[f32], largest: f64, inverse: f64, weights: &mut [f64], sums: &mut [f64]) {
    for ((logits, weights), sum) in logits.chunks(RUN).zip(weights.chunks_mut(RUN)).zip(sums) {
        for (weight, logit) in weights.iter_mut().zip(logits) {
            *weight = exp((f64::from(*logit) - largest) * inverse);
        }
        let mut lanes = [0.0; LANES];
        let (whole, rest) = weights.as_chunks::<LANES>();
        for weights in whole {
            lanes.iter_mut().zip(weights).for_each(|(lane, weight)| *lane += weight);
        }
        lanes.iter_mut().zip(rest).for_each(|(lane, weight)| *lane += weight);
        *sum = lanes.into_iter().sum();
    }
}

/// `e^x` for x up to 0.
#[inline(always)]
fn exp(x: f64) -> f64 {
    let shifted = x.mul_add(std::f64::consts::LOG2_E, ROUND);
    let whole = shifted - ROUND;
    let rest = whole.mul_add(-LN_2[1], whole.mul_add(-LN_2[0], x));
    let mut power = 0.0f64;
    for coefficient in COEFFICIENTS {
        power = power.mul_add(rest, coefficient);
    }
    let power = f64::from_bits(power.to_bits().wrapping_add(shifted.to_bits() << 52));
    // 2^-1021, and below it no bits of an exponent are left
    if x < -707.7 { 0.0 } else { power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_those_of_the_exponential_on_every_instruction_set() {
        let logits: Vec<f32> = (0..5000)
            .map(|i| match i % 97 {
                0 => f32::NEG_INFINITY,
                1 => 3.5,
                _ => 3.5 - (i as f32 * 0.37) % 800.0,
            })
            .collect();
        for temperature in [1.0, 0.3, 1.7, 1e-30, 50.0] {
            for count in [1, 7, 8, 255, 256, 257, 5000] {
                let logits = &logits[5000 - count..];
                let mut all = Isa::available().into_iter().map(|isa| {
                    let (mut weights, mut sums) = (vec![f64::NAN; count], vec![f64::NAN; count.div_ceil(RUN)]);
                    let total = weigh(isa, logits, 3.5, temperature, &mut weights, &mut sums);
                    (weights, sums, total)
                });
                let first = all.next().expect("there is portable code");
                assert!(all.all(|other| other == first), "instruction sets differ");
                let (weights, sums, total) = first;
                for (weight, logit) in weights.iter().zip(logits) {
                    let exponent = (f64::from(*logit) - 3.5) / temperature;
                    let want = exponent.exp();
                    let error = (weight - want).abs();
                    let is_near = match *logit {
                        3.5 => *weight == 1.0,
                        f32::NEG_INFINITY => *weight == 0.0,
                        _ if want < 4.5e-308 => (0.0..4.6e-308).contains(weight),
                        _ => error <= want * (4.5e-16 - 2.3e-16 * exponent),
                    };
                    assert!(is_near, "{logit} {temperature}: {weight} for {want}");
                }
                for (sum, weights) in sums.iter().zip(weights.chunks(RUN)) {
                    let want: f64 = weights.iter().sum();
                    assert!((sum - want).abs() <= 1e-13 * want);
                }
                assert!((total - weights.iter().sum::<f64>()).abs() <= 1e-13 * total);
            }
        }
    }
}
