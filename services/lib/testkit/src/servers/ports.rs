//! Free ports that stay free while their server is down, and that no other test is given.
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::net::TcpListener;
use std::sync::{Mutex, PoisonError};

/// A port of the loopback interface that nobody listens on. It is this process's own until the process ends.
///
/// It lies below the range that the system gives to clients: else a client that connects to it again and again while
/// its server is down would in time be given that very port, and be connected with itself.
///
/// # Panics
/// When there is none.
pub fn free() -> u16 {
    free_with(&[])
}

/// The same, with the ports that lie so many above it.
///
/// # Panics
/// When there are none.
pub fn free_with(offsets: &[u16]) -> u16 {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let first_of_clients = range.split_whitespace().next().and_then(|first| first.parse().ok()).unwrap_or(32_768_u64);
    let first = 10_000_u64;
    let furthest = u64::from(offsets.iter().copied().max().unwrap_or(0));
    let count = first_of_clients.saturating_sub(first + furthest).max(1_000);
    let random = RandomState::new();
    for attempt in 0..10_000_u64 {
        let port = u16::try_from(first + random.hash_one(attempt) % count).expect("below the clients' range");
        let wanted: Vec<u16> = [0].iter().chain(offsets).map(|offset| port + offset).collect();
        if take(&wanted) {
            return port;
        }
    }
    panic!("no loopback port from {first} is free");
}

/// The ports that were handed out, with what keeps other processes from them. None is given back: a server that is down
/// comes back at its port.
static TAKEN: Mutex<BTreeMap<u16, claim::Claim>> = Mutex::new(BTreeMap::new());

/// Takes ports, all or none: those that nobody has, and nobody listens on.
fn take(ports: &[u16]) -> bool {
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut claims = BTreeMap::new();
    for &port in ports {
        let is_free = !taken.contains_key(&port) && TcpListener::bind(("127.0.0.1", port)).is_ok();
        match claim::claim(port).filter(|_| is_free) {
            Some(claim) => claims.insert(port, claim),
            None => return false,
        };
    }
    taken.append(&mut claims);
    true
}

/// Who has a port without listening on it yet: a member of a cluster binds its port long after it was chosen, and other
/// tests' processes choose meanwhile. A name of the abstract socket space is one process's, and is gone with it.
#[cfg(target_os = "linux")]
mod claim {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener};

    pub type Claim = UnixListener;

    /// `None` where another has it.
    pub fn claim(port: u16) -> Option<Claim> {
        let name = SocketAddr::from_abstract_name(format!("moesaic-testkit-port-{port}")).expect("a short name");
        UnixListener::bind_addr(&name).ok()
    }
}

/// Elsewhere ports are one's own within a process.
#[cfg(not(target_os = "linux"))]
mod claim {
    pub type Claim = ();

    pub fn claim(_: u16) -> Option<Claim> {
        Some(())
    }
}
