//! Which host this process is on.
use std::fs;

/// Names the host such that two processes with the same name can reach each other by a Unix socket, and such that a
/// network that is cut between two of its namespaces is not gone around: the machine, its boot, and the network
/// namespace. `None` where the kernel does not say, as outside Linux.
pub fn id() -> Option<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let network = fs::read_link("/proc/self/ns/net").ok()?;
    // missing in many containers; their boot and network still differ from other hosts'
    let machine = fs::read_to_string("/etc/machine-id").unwrap_or_default();
    Some(format!("{}/{}/{}", machine.trim(), boot.trim(), network.display()))
}

/// The host's name, as others may know it; `localhost` where it has none.
pub fn name() -> String {
    let kernel = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let is_name = |name: &&str| !name.is_empty() && *name != "(none)";
    Some(kernel.trim()).filter(is_name).unwrap_or("localhost").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn the_host_s_id_stays_and_has_its_three_parts() {
        let id = id().unwrap();
        assert_eq!(Some(&id), super::id().as_ref());
        let parts: Vec<_> = id.split('/').collect();
        assert_eq!(parts.len(), 3, "{id}");
        assert!(parts[1].len() == 36 && parts[2].starts_with("net:["), "{id}");
        assert!(!name().contains(char::is_whitespace) && !name().is_empty());
    }
}
