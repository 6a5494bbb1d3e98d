//! Numbers that look random and are the same for one seed, on every machine and in every version.

/// xoshiro256++ (Blackman and Vigna, 2019), seeded by SplitMix64.
#[derive(Clone, Debug)]
pub struct Random {
    state: [u64; 4],
}

fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

impl Random {
    /// A sequence of its own for each seed.
    pub fn new(seed: u64) -> Self {
        let mut state = seed;
        Self { state: std::array::from_fn(|_| split_mix(&mut state)) }
    }

    /// A sequence of its own for each name under a seed, whatever else is drawn.
    pub fn named(seed: u64, name: &str) -> Self {
        // FNV-1a
        let hash = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        Self::new(seed.rotate_left(32) ^ hash)
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        let [a, b, c, d] = &mut self.state;
        let result = a.wrapping_add(*d).rotate_left(23).wrapping_add(*a);
        let shifted = *b << 17;
        *c ^= *a;
        *d ^= *b;
        *b ^= *c;
        *a ^= *d;
        *c ^= shifted;
        *d = d.rotate_left(45);
        result
    }

    /// At least 0 and below 1.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A number below `bound`, which is above 0.
    pub fn below(&mut self, bound: usize) -> usize {
        // the bias is below 2^-32 for every bound that is used here
        ((u128::from(self.bits()) * bound as u128) >> 64) as usize
    }

    /// Normally distributed, of variance 1 (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// Exponentially distributed, of mean 1: the gaps of arrivals that know nothing of each other.
    pub fn exponential(&mut self) -> f64 {
        -(1.0 - self.unit()).ln()
    }

    /// Gamma distributed, of mean 1 and variance `1 / shape`; `shape` is above 0. At 1 it is the exponential
    /// distribution.
    ///
    /// Source: Marsaglia and Tsang, "A Simple Method for Generating Gamma Variables", 2000.
    pub fn gamma(&mut self, shape: f64) -> f64 {
        // below 1 the method does not hold: one of a shape that is larger by 1, made smaller
        let (at_least_one, factor) = match shape {
            small if small < 1.0 => (small + 1.0, (1.0 - self.unit()).powf(1.0 / small)),
            shape => (shape, 1.0),
        };
        let d = at_least_one - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let x = self.normal();
            let v = (1.0 + c * x).powi(3);
            if v > 0.0 && (1.0 - self.unit()).ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                return d * v * factor / shape;
            }
        }
    }

    /// So many tokens below `vocab`.
    pub fn tokens(&mut self, count: usize, vocab: usize) -> Vec<u32> {
        (0..count).map(|_| self.below(vocab) as u32).collect()
    }
}

/// Draws ranks 0.. of which rank `r` is as likely as `1 / (r + 1) ^ exponent`.
#[derive(Clone, Debug)]
pub struct Zipf {
    cumulative: Vec<f64>,
}

impl Zipf {
    /// Over so many ranks, at least one.
    pub fn new(ranks: usize, exponent: f64) -> Self {
        let mut total = 0.0;
        let cumulative = (0..ranks.max(1)).map(|rank| {
            total += 1.0 / ((rank + 1) as f64).powf(exponent);
            total
        });
        Self { cumulative: cumulative.collect() }
    }

    /// A rank.
    pub fn draw(&self, random: &mut Random) -> usize {
        let total = self.cumulative.last().copied().unwrap_or(1.0);
        let at = random.unit() * total;
        self.cumulative.partition_point(|sum| *sum <= at).min(self.cumulative.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_s_sequence_never_changes() {
        // the model's file and the traces of recorded results depend on it
        let mut random = Random::new(42);
        let first: Vec<u64> = (0..3).map(|_| random.bits()).collect();
        assert_eq!(first, [0xd076_4d4f_4476_689f, 0x519e_4174_576f_3791, 0xfbe0_7cfb_0c24_ed8c]);
        assert_ne!(Random::named(42, "a").bits(), Random::named(42, "b").bits());
        assert_ne!(Random::named(42, "a").bits(), Random::named(43, "a").bits());
    }

    #[test]
    fn distributions_have_their_moments() {
        let mut random = Random::new(1);
        let count = 100_000;
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let normal: Vec<f64> = (0..count).map(|_| random.normal()).collect();
        let squares: Vec<f64> = normal.iter().map(|x| x * x).collect();
        assert!(mean(&normal).abs() < 0.02 && (mean(&squares) - 1.0).abs() < 0.03);
        let gaps: Vec<f64> = (0..count).map(|_| random.exponential()).collect();
        assert!((mean(&gaps) - 1.0).abs() < 0.02 && gaps.iter().all(|gap| *gap >= 0.0));
        assert!((0..count).all(|_| random.below(7) < 7));
    }

    #[test]
    fn gamma_has_the_mean_and_variance_of_its_shape() {
        let count = 200_000;
        for shape in [0.25, 0.5, 1.0, 4.0] {
            let mut random = Random::new(9);
            let values: Vec<f64> = (0..count).map(|_| random.gamma(shape)).collect();
            let mean = values.iter().sum::<f64>() / count as f64;
            let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count as f64;
            assert!((mean - 1.0).abs() < 0.02, "shape {shape}: mean {mean}");
            assert!((variance * shape - 1.0).abs() < 0.05, "shape {shape}: variance {variance}");
            // the third moment tells it from other distributions of these two: skewness 2 / sqrt(shape)
            let third = values.iter().map(|x| (x - mean).powi(3)).sum::<f64>() / count as f64 / variance.powf(1.5);
            assert!((third / (2.0 / shape.sqrt()) - 1.0).abs() < 0.1, "shape {shape}: skewness {third}");
        }
    }

    #[test]
    fn zipf_s_ranks_are_as_likely_as_it_says() {
        let (zipf, mut random) = (Zipf::new(4, 1.0), Random::new(5));
        let mut counts = [0usize; 4];
        (0..25_000).for_each(|_| counts[zipf.draw(&mut random)] += 1);
        // 1, 1/2, 1/3, 1/4 of 25/12
        for (count, expected) in counts.iter().zip([12_000.0, 6_000.0, 4_000.0, 3_000.0]) {
            assert!((*count as f64 / expected - 1.0).abs() < 0.05, "{counts:?}");
        }
    }
}
