//! What the machine itself can do: the most that any engine could reach.
use moesaic_kernels::ceilings;
use serde::Serialize;

/// Limits of this machine, in the run in which the engines are measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Ceilings {
    /// Bytes a second that all threads together read from memory.
    pub read_bytes_s: f64,
    /// Operations a second on int8 of all threads, a multiplication and an addition being two; what the command line
    /// said, if it did. `None` where the processor's instructions are not measured.
    pub int8_ops_s: Option<f64>,
}

impl Ceilings {
    /// Of so many threads; `int8_gops`, in 10^9 operations a second, is taken in place of what would be measured.
    pub fn measure(threads: usize, int8_gops: Option<f64>) -> Self {
        let int8_ops_s = int8_gops.map(|gops| gops * 1e9).or_else(|| ceilings::int8_peak(threads));
        Self { read_bytes_s: ceilings::read_bandwidth(threads), int8_ops_s }
    }

    /// The larger of each: what slows the machine for a while is no limit of it.
    pub fn or_larger(self, other: Self) -> Self {
        Self {
            read_bytes_s: self.read_bytes_s.max(other.read_bytes_s),
            int8_ops_s: [self.int8_ops_s, other.int8_ops_s].into_iter().flatten().reduce(f64::max),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_larger_of_two_measurements_is_the_ceiling() {
        let a = Ceilings { read_bytes_s: 2.0, int8_ops_s: Some(4.0) };
        let b = Ceilings { read_bytes_s: 1.0, int8_ops_s: Some(5.0) };
        assert_eq!(a.or_larger(b), Ceilings { read_bytes_s: 2.0, int8_ops_s: Some(5.0) });
        assert_eq!(a.or_larger(Ceilings::default()), a);
        assert_eq!(Ceilings::default().or_larger(a), a);
    }
}
