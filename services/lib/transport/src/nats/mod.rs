//! NATS: events over its core, jobs over JetStream.
//!
//! One connection serves both. It is made in the background and again for ever, with pauses that grow, so that a
//! service can start before NATS does and outlives it; a call meanwhile is refused at once or after its deadline, it
//! never waits for NATS to come back.
mod bus;
mod jobs;
mod lease;
mod namespace;

pub use bus::NatsBus;
pub use jobs::{JetStreamQueue, JobLimits, dead_letters};

use async_nats::connection::State;
use async_nats::{Client, ConnectOptions, Event, ServerAddr};
use moesaic_types::{Error, ErrorCode, Result};
use namespace::Namespace;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// The largest payload of an event or a job: larger things go by gRPC.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// How long a call may take.
pub const DEADLINE: Duration = Duration::from_secs(2);

/// Longest wait for a server to accept a connection and greet.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// A server that says nothing is asked so often, and given up after three questions.
const PING_INTERVAL: Duration = Duration::from_secs(1);

/// Commands that wait for the connection to be written; with [`MAX_PAYLOAD`] they take 16 MiB at most.
const COMMANDS: usize = 256;

/// Messages of one subscription that wait to be looked at.
const MESSAGES: usize = 4096;

/// A connection; cheap to clone.
#[derive(Clone, Debug)]
pub struct Nats {
    client: Client,
    /// Without user and password.
    address: Arc<str>,
    namespace: Namespace,
}

impl Nats {
    /// Starts to connect; `name` is what the server's own tools show.
    ///
    /// # Errors
    /// `InvalidArgument` when the URL cannot be used. It may be several, separated by commas.
    pub async fn connect(url: &str, name: &str) -> Result<Self> {
        let servers = servers(url)?;
        let hosts: Vec<String> = servers.iter().map(|server| format!("{}:{}", server.host(), server.port())).collect();
        let options = ConnectOptions::new()
            .name(name)
            .retry_on_initial_connect()
            .connection_timeout(CONNECT_TIMEOUT)
            .ping_interval(PING_INTERVAL)
            .request_timeout(Some(DEADLINE))
            .client_capacity(COMMANDS)
            .subscription_capacity(MESSAGES)
            .reconnect_delay_callback(pause)
            .event_callback(tell);
        // the client itself passes over those of the URL
        let options = match credentials(&servers) {
            Some((user, password)) => options.user_and_password(user, password),
            None => options,
        };
        let refused = |error: async_nats::ConnectError| invalid(&error.kind().to_string());
        let client = options.connect(servers).await.map_err(refused)?;
        Ok(Self { client, address: hosts.join(",").into(), namespace: Namespace::default() })
    }

    /// The same connection for the cluster of this name, `cluster.key_prefix`: what clusters of other names publish and
    /// push is not seen here, and the other way round.
    #[must_use]
    pub fn of_cluster(self, name: &str) -> Self {
        Self { namespace: Namespace::new(name), ..self }
    }

    /// Whether the connection stands, as far as is known.
    pub fn is_connected(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// Waits until the connection stands; false when it does not within the time.
    pub async fn connected(&self, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        while !self.is_connected() {
            if Instant::now() >= deadline {
                return false;
            }
            sleep(Duration::from_millis(5)).await;
        }
        true
    }

    fn unavailable(&self, reason: impl std::fmt::Display) -> Error {
        Error::unavailable(format!("nats at {}: {reason}", self.address))
    }

    /// Makes a call within [`DEADLINE`], waiting for the connection included.
    async fn call<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        let connected = async {
            while !self.connected(DEADLINE).await {}
            call.await
        };
        timeout(DEADLINE, connected)
            .await
            .unwrap_or_else(|_| Err(self.unavailable(format!("no answer within {DEADLINE:?}"))))
    }
}

/// The log hears of a connection that is lost or made; not of each attempt, which may go on for days.
async fn tell(event: Event) {
    match event {
        Event::Connected | Event::Disconnected => tracing::info!(%event, "nats"),
        event => tracing::debug!(%event, "nats"),
    }
}

fn invalid(reason: &str) -> Error {
    // the URL itself may hold a password
    Error::invalid("cluster.nats_url", format!("cluster.nats_url cannot be used: {reason}"))
}

fn servers(url: &str) -> Result<Vec<ServerAddr>> {
    let parse = |one: &str| {
        let server = one.trim().parse::<ServerAddr>().ok();
        let usable = server.filter(|server| !server.host().is_empty() && !server.is_websocket());
        usable.ok_or_else(|| invalid("write nats://[user:password@]host[:port], several separated by commas"))
    };
    url.split(',').map(parse).collect()
}

/// User and password of the first server that has them: the servers of one URL are one cluster.
fn credentials(servers: &[ServerAddr]) -> Option<(String, String)> {
    servers.iter().find_map(|server| Some((decoded(server.username()?), decoded(server.password()?))))
}

/// A part of a URL, in which `%40` stands for `@`, and so on.
fn decoded(part: &str) -> String {
    let mut bytes = Vec::with_capacity(part.len());
    let mut rest = part.as_bytes();
    while let [first, after @ ..] = rest {
        let code = after.get(..2).and_then(|code| u8::from_str_radix(std::str::from_utf8(code).ok()?, 16).ok());
        let code = code.filter(|_| *first == b'%');
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The pause before an attempt to connect: it doubles from 50 milliseconds to 2 seconds, and up to half of it is left
/// out at random, so that not all services come at once.
fn pause(attempts: usize) -> Duration {
    if attempts <= 1 {
        return Duration::ZERO;
    }
    let doublings = u32::try_from(attempts - 2).unwrap_or(u32::MAX).min(6);
    let longest = (Duration::from_millis(50) * 2_u32.pow(doublings)).min(Duration::from_secs(2));
    let left_out = RandomState::new().hash_one(attempts) % 512;
    longest - longest * u32::try_from(left_out).unwrap_or(0) / 1024
}

fn check_payload(what: &str, bytes: usize) -> Result<()> {
    if bytes > MAX_PAYLOAD {
        let message = format!("the payload of {what} has {bytes} bytes; NATS carries {MAX_PAYLOAD} at most");
        return Err(Error { field: Some("payload".into()), ..Error::new(ErrorCode::PayloadTooLarge, message) });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_their_limit() {
        assert_eq!(pause(1), Duration::ZERO);
        for (attempts, longest) in [(2, 50), (3, 100), (7, 1600), (8, 2000), (usize::MAX, 2000)] {
            let longest = Duration::from_millis(longest);
            for _ in 0..50 {
                let pause = pause(attempts);
                assert!(longest / 2 <= pause && pause <= longest, "{attempts}: {pause:?}");
            }
        }
    }

    #[test]
    fn servers_are_read_and_wrong_ones_name_the_field_and_no_password() {
        let hosts = |url: &str| servers(url).unwrap().iter().map(|s| s.host().to_owned()).collect::<Vec<_>>();
        assert_eq!(hosts("nats://a, tls://u:p@b:4333,c"), ["a", "b", "c"]);
        for url in ["", "http://host", "nats://u:hunter2@host:99999", "a,,b", "nats://"] {
            let error = servers(url).unwrap_err();
            assert_eq!((error.code, error.field.as_deref()), (ErrorCode::InvalidArgument, Some("cluster.nats_url")));
            assert!(!error.message.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn user_and_password_are_read_from_the_url() {
        let found = |url: &str| credentials(&servers(url).unwrap());
        assert_eq!(found("nats://a,nats://u:p%40s%3A%25x@b"), Some(("u".into(), "p@s:%x".into())));
        assert_eq!(found("nats://a"), None);
        assert_eq!(decoded("100%"), "100%");
    }

    #[test]
    fn a_large_payload_is_refused_with_its_limit() {
        assert_eq!(check_payload("an event", MAX_PAYLOAD), Ok(()));
        let error = check_payload("an event", MAX_PAYLOAD + 1).unwrap_err();
        assert_eq!(error.code, ErrorCode::PayloadTooLarge);
        assert!(error.message.contains("65537") && error.message.contains("65536"), "{error}");
    }
}
