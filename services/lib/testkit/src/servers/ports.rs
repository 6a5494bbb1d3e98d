//! Free ports that stay free while their server is down.
use std::hash::{BuildHasher, RandomState};
use std::net::TcpListener;

/// A port of the loopback interface that nobody listens on.
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
    let random = RandomState::new();
    for attempt in 0..10_000_u64 {
        let count = first_of_clients.saturating_sub(first).max(1_000);
        let port = u16::try_from(first + random.hash_one(attempt) % count).expect("below the clients' range");
        let is_free = |offset: &u16| TcpListener::bind(("127.0.0.1", port + offset)).is_ok();
        if is_free(&0) && offsets.iter().all(is_free) {
            return port;
        }
    }
    panic!("no loopback port from {first} is free");
}
