//! What memory the machine has for this process.
use std::path::Path;

/// Bytes in all and bytes that can still be had; `u64::MAX` where the system does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// In all, or what the control group allows where that is less.
    pub total: u64,
    /// Without swapping, within what the control group allows.
    pub available: u64,
}

impl Memory {
    /// As the system says now.
    pub fn now() -> Self {
        let read = |path: &str| std::fs::read_to_string(Path::new(path)).unwrap_or_default();
        let group = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat");
        Self::of(&read("/proc/meminfo"), &read(group.0), &read(group.1), &read(group.2))
    }

    /// `/proc/meminfo`, and `memory.max`, `memory.current` and `memory.stat` of a control group (version 2).
    fn of(meminfo: &str, max: &str, current: &str, stat: &str) -> Self {
        let kib = |key: &str| field(meminfo, key).map_or(u64::MAX, |kib| kib.saturating_mul(1024));
        let (total, available) = (kib("MemTotal:"), kib("MemAvailable:"));
        let Ok(limit) = max.trim().parse::<u64>() else { return Self { total, available } };
        // what files hold in memory can be taken back
        let files = field(stat, "inactive_file").unwrap_or(0).saturating_add(field(stat, "active_file").unwrap_or(0));
        let used = current.trim().parse::<u64>().unwrap_or(0).saturating_sub(files);
        Self { total: total.min(limit), available: available.min(limit.saturating_sub(used)) }
    }
}

fn field(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The largest resident set of a process, by its number or `self`, in bytes, as Linux tells it.
///
/// # Errors
/// When the system does not tell.
pub fn peak_rss_bytes(process: &str) -> std::io::Result<u64> {
    let path = format!("/proc/{process}/status");
    let peak = field(&std::fs::read_to_string(&path)?, "VmHWM:").and_then(|kib| kib.checked_mul(1024));
    peak.ok_or_else(|| std::io::Error::other(format!("{path} has no VmHWM")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smaller_of_machine_and_group_counts() {
        let meminfo = "MemTotal:       16000 kB\nMemFree:  1 kB\nMemAvailable:    9000 kB\n";
        let machine = Memory { total: 16_384_000, available: 9_216_000 };
        assert_eq!(Memory::of(meminfo, "max\n", "5", ""), machine);
        assert_eq!(Memory::of(meminfo, "", "", ""), machine);
        let stat = "anon 3000\ninactive_file 1000\nactive_file 500\n";
        let group = Memory { total: 8_000_000, available: 8_000_000 - 4_500 };
        assert_eq!(Memory::of(meminfo, "8000000\n", "6000\n", stat), group);
        assert_eq!(Memory::of("", "", "", ""), Memory { total: u64::MAX, available: u64::MAX });
        let full = Memory::of(meminfo, "1000", "9000000", "");
        assert_eq!(full, Memory { total: 1000, available: 0 });
    }
}
