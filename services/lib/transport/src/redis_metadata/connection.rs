//! One connection that all calls share, replaced as soon as it fails or falls silent.
use moesaic_types::{Error, Result};
use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ErrorKind, IntoConnectionInfo, RedisError, ServerErrorKind,
};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// How long a call may take, connecting included.
pub const DEADLINE: Duration = Duration::from_secs(1);

/// A call that Redis leaves unanswered ends the connection: one that a partition broke would else be tried until the
/// kernel gives up, minutes later.
#[derive(Debug)]
pub struct Connection {
    client: Client,
    /// Without the password.
    address: String,
    current: Mutex<Current>,
    /// Held while connecting: one at a time is enough.
    connecting: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Current {
    live: Option<MultiplexedConnection>,
    /// How often it was replaced.
    number: u64,
}

impl Connection {
    pub fn new(url: &str) -> Result<Self> {
        let refused = |error: RedisError| {
            // the URL itself may hold a password
            let reason = error.detail().unwrap_or("write redis://[user:password@]host[:port][/database]").to_owned();
            Error::invalid("cluster.redis_url", format!("cluster.redis_url cannot be used: {reason}"))
        };
        let info = url.into_connection_info().map_err(refused)?;
        let address = match info.addr() {
            ConnectionAddr::Unix(path) => path.display().to_string(),
            ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. } => format!("{host}:{port}"),
            other => other.to_string(),
        };
        let client = Client::open(info.set_tcp_settings(TcpSettings::default().set_nodelay(true))).map_err(refused)?;
        Ok(Self { client, address, current: Mutex::default(), connecting: tokio::sync::Mutex::default() })
    }

    /// Makes a call, within [`DEADLINE`].
    pub async fn call<T>(&self, call: impl AsyncFnOnce(MultiplexedConnection) -> redis::RedisResult<T>) -> Result<T> {
        let deadline = Instant::now() + DEADLINE;
        let silent = |_| Error::unavailable(format!("redis at {} did not answer within {DEADLINE:?}", self.address));
        let (connection, number) =
            timeout_at(deadline, self.live()).await.map_err(silent)?.map_err(|error| self.explain(&error))?;
        match timeout_at(deadline, call(connection)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                // a replica that takes no writes: the name may lead to the new master by now
                let is_replica = error.kind() == ErrorKind::Server(ServerErrorKind::ReadOnly);
                if error.is_unrecoverable_error() || error.is_io_error() || is_replica {
                    self.forget(number);
                }
                Err(self.explain(&error))
            }
            Err(elapsed) => {
                self.forget(number);
                Err(silent(elapsed))
            }
        }
    }

    /// Where Redis is, without the password.
    pub fn address(&self) -> &str {
        &self.address
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn found(&self) -> Option<(MultiplexedConnection, u64)> {
        let current = self.current();
        current.live.clone().map(|live| (live, current.number))
    }

    /// The connection, made where there is none.
    async fn live(&self) -> redis::RedisResult<(MultiplexedConnection, u64)> {
        if let Some(found) = self.found() {
            return Ok(found);
        }
        let _one_at_a_time = self.connecting.lock().await;
        if let Some(found) = self.found() {
            return Ok(found);
        }
        // the call's own deadline holds for both
        let config = AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None);
        let made = self.client.get_multiplexed_async_connection_with_config(&config).await?;
        tracing::info!(redis = self.address, "connected to redis");
        let mut current = self.current();
        current.number += 1;
        current.live = Some(made.clone());
        Ok((made, current.number))
    }

    /// Drops the connection, unless another took its place.
    fn forget(&self, number: u64) {
        let mut current = self.current();
        if current.number == number {
            current.live = None;
        }
    }

    fn explain(&self, error: &RedisError) -> Error {
        let message = format!("redis at {}: {error}", self.address);
        match error.kind() {
            // our script or what it found is wrong; everything else is Redis not being able to serve
            ErrorKind::Server(ServerErrorKind::ResponseError) | ErrorKind::UnexpectedReturnType | ErrorKind::Parse => {
                Error::internal(message)
            }
            _ => Error::unavailable(message),
        }
    }
}
