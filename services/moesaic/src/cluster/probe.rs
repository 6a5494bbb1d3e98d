//! Whether a process does its job, as it says itself.
use moesaic_transport::{Nats, RedisMetadata};
use moesaic_types::boundary::Metadata;
use serde_json::Value;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::OnceCell;
use tokio::time::timeout;

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Bytes of an answer that are read at most.
const MOST: u64 = 64 << 10;

/// How a process is asked.
#[derive(Debug)]
pub enum Probe {
    /// A service, by its admin server.
    Admin(SocketAddr),
    /// Redis.
    Redis(RedisMetadata),
    /// NATS, by its address and its URL; connected once somebody listens there.
    Nats(SocketAddr, String, Box<OnceCell<Nats>>),
}

impl Probe {
    /// Whether it can do its job now.
    ///
    /// # Errors
    /// With the reason, as it says it.
    pub async fn ready(&self) -> Result<(), String> {
        match self {
            Self::Admin(address) => match get(*address, "/ready").await {
                Some((200, _)) => Ok(()),
                Some((_, body)) => Err(reason(&body)),
                None => Err("it does not answer yet".into()),
            },
            Self::Redis(redis) => redis.get("ready").await.map(|_| ()).map_err(|error| error.message),
            Self::Nats(address, url, client) => {
                if client.get().is_none() && TcpStream::connect(address).await.is_err() {
                    return Err("it does not answer yet".into());
                }
                let client = client.get_or_try_init(|| Nats::connect(url, "moesaic-up")).await;
                match client.map_err(|error| error.message)?.connected(PATIENCE).await {
                    true => Ok(()),
                    false => Err("it does not answer".into()),
                }
            }
        }
    }

    /// Whether it says that it cannot recover by itself.
    pub async fn is_lost(&self) -> Option<String> {
        let Self::Admin(address) = self else { return None };
        let (status, body) = get(*address, "/live").await?;
        (status == 503).then(|| reason(&body))
    }
}

fn reason(body: &str) -> String {
    let body: Value = serde_json::from_str(body).unwrap_or_default();
    body["reason"].as_str().unwrap_or("it says no reason").to_owned()
}

/// The status and body of a GET; `None` where there is no answer in time.
async fn get(address: SocketAddr, path: &str) -> Option<(u16, String)> {
    let asked = async {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(MOST).read_to_end(&mut answer).await?;
        std::io::Result::Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    let answer = timeout(PATIENCE, asked).await.ok()?.ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some((status, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    /// Answers once with this.
    async fn answering(answer: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("a client");
            let mut request = [0; 1024];
            let read = stream.read(&mut request).await.expect("a request");
            assert!(request[..read].starts_with(b"GET /"));
            stream.write_all(answer.as_bytes()).await.expect("sent");
        });
        address
    }

    #[tokio::test]
    async fn a_service_says_why_it_is_not_ready() {
        let ready = answering("HTTP/1.1 200 OK\r\nx: y\r\n\r\n{}").await;
        assert_eq!(Probe::Admin(ready).ready().await, Ok(()));
        let loading = answering("HTTP/1.1 503 Service Unavailable\r\n\r\n{\"reason\":\"loading\"}").await;
        assert_eq!(Probe::Admin(loading).ready().await, Err("loading".into()));
        let odd = answering("HTTP/1.1 503 Service Unavailable\r\n\r\nwhat").await;
        assert_eq!(Probe::Admin(odd).ready().await, Err("it says no reason".into()));
        // it answered once
        assert_eq!(Probe::Admin(odd).ready().await, Err("it does not answer yet".into()));
    }

    #[tokio::test]
    async fn only_its_own_word_makes_it_lost() {
        let live = answering("HTTP/1.1 200 OK\r\n\r\n{}").await;
        assert_eq!(Probe::Admin(live).is_lost().await, None);
        let lost = answering("HTTP/1.1 503 Service Unavailable\r\n\r\n{\"reason\":\"a step hangs\"}").await;
        assert_eq!(Probe::Admin(lost).is_lost().await, Some("a step hangs".into()));
        assert_eq!(Probe::Admin(lost).is_lost().await, None, "silence is no such word");
    }
}
