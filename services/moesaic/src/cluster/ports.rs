//! Free ports of the loopback interface.
use anyhow::{Result, bail};
use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Mutex, PoisonError};

/// The admin server of a service listens so many ports above its gRPC.
pub const ADMIN_OFFSET: u16 = 1000;

/// Ports below are other services' by custom.
const FIRST: u16 = 10_000;

/// Where the system gives ports to clients, unless it says otherwise.
const CLIENTS: u16 = 32_768;

/// The ports that were given to processes, which may not listen on them yet.
#[derive(Debug, Default)]
pub struct Ports(Mutex<BTreeSet<u16>>);

impl Ports {
    /// A port that nobody has, with the one [`ADMIN_OFFSET`] above it.
    ///
    /// It lies below the range that the system gives to clients: a client that connects to it again and again while its
    /// server is down would in time be given that very port, and be connected with itself.
    ///
    /// # Errors
    /// When there is none.
    pub fn take(&self) -> Result<SocketAddr> {
        let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
        let clients = range.split_whitespace().next().and_then(|first| first.parse().ok()).unwrap_or(CLIENTS);
        let count = u64::from(clients.saturating_sub(FIRST + ADMIN_OFFSET).max(ADMIN_OFFSET));
        let random = RandomState::new();
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for attempt in 0..10_000_u32 {
            // the remainder is below u16::MAX, as count is
            let port = FIRST + u16::try_from(random.hash_one(attempt) % count).unwrap_or_default();
            let address = SocketAddr::from(([127, 0, 0, 1], port));
            let both = [port, port + ADMIN_OFFSET];
            if both.iter().all(|port| !taken.contains(port)) && is_free(address) {
                taken.extend(both);
                return Ok(address);
            }
        }
        bail!("no two ports of the loopback interface that are {ADMIN_OFFSET} apart are free")
    }

    /// Keeps a port, and that of its admin server, for who is to listen there.
    pub fn reserve(&self, address: SocketAddr) {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        taken.extend([address.port()].into_iter().chain(address.port().checked_add(ADMIN_OFFSET)));
    }
}

/// Whether nobody listens at this address, nor at its admin server's.
pub fn is_free(address: SocketAddr) -> bool {
    let admin = address.port().checked_add(ADMIN_OFFSET).map(|port| SocketAddr::new(address.ip(), port));
    TcpListener::bind(address).is_ok() && admin.is_some_and(|admin| TcpListener::bind(admin).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_free_and_nobody_elses() {
        let ports = Ports::default();
        let taken: Vec<SocketAddr> = (0..50).map(|_| ports.take().expect("some are free")).collect();
        let mut all: Vec<u16> = taken.iter().flat_map(|address| [address.port(), address.port() + 1000]).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 100);
        let reserving = Ports::default();
        for port in FIRST..CLIENTS {
            reserving.reserve(SocketAddr::from(([127, 0, 0, 1], port)));
        }
        assert!(reserving.take().is_err(), "all are reserved");
        let held = TcpListener::bind(taken[0]).expect("it is free");
        assert!(!is_free(taken[0]));
        drop(held);
        let admin = SocketAddr::new(taken[0].ip(), taken[0].port() + ADMIN_OFFSET);
        let held = TcpListener::bind(admin).expect("it is free");
        assert!(!is_free(taken[0]));
        drop(held);
        assert!(!is_free(SocketAddr::from(([127, 0, 0, 1], u16::MAX))), "its admin server has no port");
    }
}
