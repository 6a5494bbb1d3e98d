//! Values with units: bytes and durations.
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A number of bytes: `"256MiB"`, `"1.5GB"` or a plain integer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

const BYTE_UNITS: &[(&str, u64)] = &[
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("B", 1),
];

impl ByteSize {
    /// So many KiB.
    pub const fn kib(count: u64) -> Self {
        Self(count << 10)
    }
    /// So many MiB.
    pub const fn mib(count: u64) -> Self {
        Self(count << 20)
    }
    /// So many GiB.
    pub const fn gib(count: u64) -> Self {
        Self(count << 30)
    }
    /// Bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
    /// Bytes, at most what the address space holds.
    pub fn as_usize(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The largest unit that is exact, so that reading it back gives the same number.
        let exact = BYTE_UNITS
            .iter()
            .filter(|(_, size)| self.0 > 0 && self.0.is_multiple_of(*size))
            .max_by_key(|(_, size)| size);
        let (unit, size) = exact.unwrap_or(&("B", 1));
        write!(f, "{}{unit}", self.0 / size)
    }
}

impl FromStr for ByteSize {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("'{text}' is no size; write a number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB");
        let trimmed = text.trim();
        let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.' && c != '_').unwrap_or(trimmed.len());
        let (number, unit) = (trimmed[..split].replace('_', ""), trimmed[split..].trim());
        let size = match unit {
            "" => 1,
            unit => BYTE_UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).ok_or_else(refuse)?.1,
        };
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(size).map(Self).ok_or_else(|| format!("'{text}' is over {} bytes", u64::MAX));
        }
        let bytes = number.parse::<f64>().map_err(|_| refuse())? * size as f64;
        // Below 2^53 every integer is exact in f64.
        if bytes.fract() == 0.0 && (0.0..9_007_199_254_740_992.0).contains(&bytes) {
            Ok(Self(bytes as u64))
        } else {
            Err(format!("'{text}' is no whole number of bytes"))
        }
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl Visitor<'_> for Read {
            type Value = ByteSize;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"256MiB\" or a number of bytes")
            }
            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(bytes))
            }
            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<ByteSize, E> {
                u64::try_from(bytes).map(ByteSize).map_err(|_| E::custom("a size is not negative"))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Read)
    }
}

/// A duration with its unit: `"30s"`, `"500ms"`, `"1h30m"`; or `0`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HumanDuration(pub Duration);

/// Units by nanoseconds, largest first.
const TIME_UNITS: &[(&str, u128)] = &[
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

impl HumanDuration {
    /// So many seconds.
    pub const fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }
    /// So many milliseconds.
    pub const fn from_millis(milliseconds: u64) -> Self {
        Self(Duration::from_millis(milliseconds))
    }
    /// The duration.
    pub const fn get(self) -> Duration {
        self.0
    }
}

impl From<Duration> for HumanDuration {
    fn from(duration: Duration) -> Self {
        Self(duration)
    }
}

impl From<HumanDuration> for Duration {
    fn from(duration: HumanDuration) -> Self {
        duration.0
    }
}

impl fmt::Display for HumanDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.as_nanos();
        if rest == 0 {
            return f.write_str("0s");
        }
        for (unit, nanos) in TIME_UNITS {
            if rest >= *nanos {
                write!(f, "{}{unit}", rest / nanos)?;
                rest %= nanos;
            }
        }
        Ok(())
    }
}

impl FromStr for HumanDuration {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("'{text}' is no duration; write a number with ns, us, ms, s, m, h or d");
        let mut rest = text.trim();
        if rest == "0" {
            return Ok(Self::default());
        }
        if rest.is_empty() {
            return Err(refuse());
        }
        let mut total = 0f64;
        let mut exact = 0u128;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
            let (number, after) = rest.split_at(digits);
            let letters = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
            let (unit, after) = after.split_at(letters);
            rest = after;
            let (_, nanos) = TIME_UNITS.iter().find(|(name, _)| *name == unit.trim()).ok_or_else(refuse)?;
            match number.parse::<u64>() {
                Ok(whole) => exact += u128::from(whole) * nanos,
                Err(_) => total += number.parse::<f64>().map_err(|_| refuse())? * *nanos as f64,
            }
        }
        let nanos = exact + total.round() as u128;
        let seconds = u64::try_from(nanos / 1_000_000_000).map_err(|_| format!("'{text}' is too long"))?;
        Ok(Self(Duration::new(seconds, (nanos % 1_000_000_000) as u32)))
    }
}

impl Serialize for HumanDuration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for HumanDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl Visitor<'_> for Read {
            type Value = HumanDuration;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a duration with its unit, such as \"30s\" or \"500ms\"")
            }
            fn visit_u64<E: de::Error>(self, number: u64) -> Result<HumanDuration, E> {
                match number {
                    0 => Ok(HumanDuration::default()),
                    _ => Err(E::custom(format!(
                        "the duration {number} has no unit; write \"{number}s\" or \"{number}ms\""
                    ))),
                }
            }
            fn visit_i64<E: de::Error>(self, number: i64) -> Result<HumanDuration, E> {
                u64::try_from(number)
                    .map_err(|_| E::custom("a duration is not negative"))
                    .and_then(|n| self.visit_u64(n))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<HumanDuration, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("0", 0), ("17", 17), ("256MiB", 256 << 20), ("1.5 GiB", 3 << 29), ("2gb", 2_000_000_000), ("1_000", 1000)]
        {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "x", "-1", "1.5", "1PiB", "99999999999TiB", "1 2"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
        assert_eq!(ByteSize::mib(256).to_string(), "256MiB");
        assert_eq!(ByteSize(1_000_000).to_string(), "1MB");
        assert_eq!(ByteSize(0).to_string(), "0B");
    }

    #[test]
    fn durations() {
        for (text, millis) in
            [("0", 0), ("30s", 30_000), ("500ms", 500), ("1h30m", 5_400_000), ("1.5s", 1500), ("2d", 172_800_000)]
        {
            assert_eq!(text.parse(), Ok(HumanDuration::from_millis(millis)), "{text}");
        }
        for text in ["", "30", "s", "1x", "-1s", "1s2", "1..2s"] {
            assert!(text.parse::<HumanDuration>().is_err(), "{text}");
        }
        assert_eq!(HumanDuration::from_millis(90_500).to_string(), "1m30s500ms");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(bytes: u64, seconds in 0..u64::MAX / 2, nanos in 0..1_000_000_000u32) {
            let size = ByteSize(bytes);
            prop_assert_eq!(size.to_string().parse(), Ok(size));
            let duration = HumanDuration(Duration::new(seconds, nanos));
            prop_assert_eq!(duration.to_string().parse(), Ok(duration));
        }

        #[test]
        fn no_text_panics(text in ".{0,12}") {
            let _ = text.parse::<ByteSize>();
            let _ = text.parse::<HumanDuration>();
        }
    }
}
