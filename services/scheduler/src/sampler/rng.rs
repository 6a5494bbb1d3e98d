//! Random numbers that depend on a seed and a position only.

/// A number in [0, 1) for the token at `position`. Two rounds of SplitMix64's finalizer (Steele, Lea, Flood 2014).
pub fn uniform(seed: u64, position: u64) -> f64 {
    let mixed = mix(mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)) ^ position.wrapping_mul(0xd134_2543_de82_ef95));
    (mixed >> 11) as f64 / (1u64 << 53) as f64
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_spread_evenly_over_positions_and_seeds() {
        let mut buckets = [0usize; 10];
        for n in 0..20_000u64 {
            buckets[(uniform(n % 4, n) * 10.0) as usize] += 1;
        }
        assert!(buckets.iter().all(|&count| (1800..2200).contains(&count)), "{buckets:?}");
        assert_ne!(uniform(1, 2), uniform(2, 1));
    }
}
