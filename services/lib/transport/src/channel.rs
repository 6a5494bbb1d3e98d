//! Connections to members, and the servers that take them.
//!
//! A peer that is not there, or stops to answer, is noticed within three seconds: connecting takes one at most, and a
//! connection that is silent for one is asked and given two to answer.
use moesaic_types::cluster::Member;
use moesaic_types::{Error, Result};
use std::path::Path;
use std::time::Duration;
use tonic::transport::{Channel, Endpoint, Server};

/// The largest message between services.
pub const MAX_MESSAGE: usize = 64 << 20;

/// The largest piece of a stream's tokens, rows or blocks, in bytes: a peer is heard when a message of it has come whole,
/// and its pulses wait behind it. A longer one would make a peer behind a slow link look lost.
pub const MAX_PIECE: usize = 4 << 20;

/// Bytes of tensors or of a block in one message of a stream, at least 1; the rest is for what goes with them.
pub fn payload(max_message: usize) -> usize {
    let most = max_message.min(MAX_PIECE);
    (most - most / 16).max(1)
}

/// Longest wait for a peer to accept.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// A connection that is silent for so long is asked.
pub const KEEP_ALIVE: Duration = Duration::from_secs(1);

/// How long a peer may take to answer that.
pub const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(2);

/// What a peer may send in one stream before we have read it: pieces of answers, which are small and which clients
/// may be slow to take.
const STREAM_WINDOW: u32 = 64 << 10;

/// The same for streams of tensors and blocks.
const BULK_STREAM_WINDOW: u32 = 4 << 20;

/// What a peer may send on one connection before we have read it: streams alone limit it. h2 also breaks a connection
/// on which too many small frames are unread, by half of this as if each had 256 bytes: 64 KiB of one stream must not
/// take the others with it.
const CONNECTION_WINDOW: u32 = i32::MAX as u32;

/// The largest HTTP/2 frame that is taken: tensors come in few frames, and on a slow link a ping still passes between two.
const FRAME: u32 = 64 << 10;

/// A channel to a member; by its Unix socket where it is on this host. It connects when it is first used, and again
/// when the connection broke: a call meanwhile fails with `Unavailable` in the time that connecting may take.
///
/// # Errors
/// `InvalidArgument` when the member's address is no `http://host:port`.
pub fn channel(member: &Member) -> Result<Channel> {
    connect(member, STREAM_WINDOW)
}

/// The same, for streams of tensors and blocks.
///
/// # Errors
/// As [`channel()`].
pub fn bulk_channel(member: &Member) -> Result<Channel> {
    connect(member, BULK_STREAM_WINDOW)
}

fn connect(member: &Member, stream_window: u32) -> Result<Channel> {
    let own_host = crate::host::id();
    let target = target(member, own_host.as_deref(), Path::exists);
    open(&target, stream_window).map_err(|error| {
        let Error { message, .. } = error;
        Error::invalid("address", format!("{} {}: {message}", member.service, member.id))
    })
}

/// A channel to `http://host:port` or `unix:///path`.
///
/// # Errors
/// `InvalidArgument` when it is neither.
pub fn to_address(address: &str) -> Result<Channel> {
    open(address, STREAM_WINDOW)
}

fn open(address: &str, stream_window: u32) -> Result<Channel> {
    let is_usable = crate::config::is_address(address) || address.starts_with("unix:///");
    let endpoint = Endpoint::from_shared(address.to_owned()).ok().filter(|_| is_usable);
    let endpoint = endpoint.ok_or_else(|| Error::invalid("address", format!("{address:?} is no http://host:port")))?;
    let endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(stream_window)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME);
    Ok(endpoint.connect_lazy())
}

/// A server for the other end: it notices lost clients as they notice it, so that their calls are cancelled.
pub fn server() -> Server {
    Server::builder()
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .initial_stream_window_size(BULK_STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
}

/// Where to reach a member. Its socket may be on this host and still out of reach, in another container.
fn target(member: &Member, own_host: Option<&str>, exists: impl FnOnce(&Path) -> bool) -> String {
    match &member.socket {
        Some(socket) if own_host == Some(&*socket.host) && socket.path.is_absolute() && exists(&socket.path) => {
            format!("unix://{}", socket.path.display())
        }
        _ => member.address.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moesaic_types::ErrorCode;
    use moesaic_types::cluster::{MemberState, Role, Service, Socket};

    fn member(socket: Option<Socket>) -> Member {
        Member {
            service: Service::Scheduler,
            id: "s0".into(),
            generation: 1,
            address: "http://10.0.0.1:9020".into(),
            socket,
            state: MemberState::Ready,
            role: Role::Plain,
        }
    }

    #[test]
    fn a_socket_is_used_on_its_own_host_where_it_is_in_reach() {
        let socket = Socket { host: "here".into(), path: "/run/m/s.sock".into() };
        let with = member(Some(socket.clone()));
        assert_eq!(target(&with, Some("here"), |_| true), "unix:///run/m/s.sock");
        let tcp = "http://10.0.0.1:9020";
        assert_eq!(target(&with, Some("here"), |_| false), tcp);
        assert_eq!(target(&with, Some("there"), |_| true), tcp);
        assert_eq!(target(&with, None, |_| true), tcp);
        assert_eq!(target(&member(None), Some("here"), |_| true), tcp);
        let relative = member(Some(Socket { path: "s.sock".into(), ..socket }));
        assert_eq!(target(&relative, Some("here"), |_| true), tcp);
    }

    #[tokio::test]
    async fn an_address_that_is_none_is_refused() {
        for address in ["", "10.0.0.1:9020", "ftp://h:1", "http://h", "unix:relative"] {
            let error = channel(&Member { address: address.into(), ..member(None) }).unwrap_err();
            assert_eq!(
                (error.code, error.field.as_deref()),
                (ErrorCode::InvalidArgument, Some("address")),
                "{address}"
            );
            assert!(error.message.contains("scheduler s0"), "{error}");
        }
        assert!(channel(&member(None)).is_ok());
    }
}
