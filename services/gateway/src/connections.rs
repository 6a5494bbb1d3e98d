//! The HTTP door's connections: a client that sends nothing, or takes nothing, for too long does not hold one.
use crate::config::Config;
use axum::Router;
use axum::serve::Listener;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use std::io;
use std::pin::pin;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_io_timeout::TimeoutStream;

/// How an HTTP/2 connection begins.
const HTTP2: &[u8] = b"PRI";
/// HTTP/2 connections are asked for a sign of life so often.
const PING_INTERVAL: Duration = Duration::from_secs(30);

/// How long a client is waited for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timeouts {
    read: Duration,
    write: Duration,
}

impl Timeouts {
    pub(crate) fn of(config: &Config) -> Self {
        Self { read: config.read_timeout.get(), write: config.write_timeout.get() }
    }
}

/// Serves until `stopped`; then takes no more connections and ends when those that are open have ended. On cancel all
/// connections of requests that run go on by themselves until their clients or the process are gone.
pub(crate) async fn serve(
    mut listener: TcpListener,
    router: Router,
    timeouts: Timeouts,
    stopped: impl Future<Output = ()>,
) {
    let open = GracefulShutdown::new();
    let (closing, closed) = watch::channel(());
    let mut stopped = pin!(stopped);
    loop {
        // both are cancel-safe
        let (stream, _) = tokio::select! {
            accepted = Listener::accept(&mut listener) => accepted,
            () = &mut stopped => break,
        };
        let (router, watcher, mut closed) = (router.clone(), open.watcher(), closed.clone());
        // ends with its connection
        tokio::spawn(async move {
            // both are cancel-safe; what has not begun a request is not waited for
            let http2 = tokio::select! {
                known = timeout(timeouts.read, is_http2(&stream)) => known,
                _ = closed.changed() => return,
            };
            let Ok(Ok(http2)) = http2 else { return };
            if let Err(error) = connection(stream, http2, router, timeouts, watcher).await {
                tracing::debug!(%error, "connection ended");
            }
        });
    }
    drop((listener, closing));
    open.shutdown().await;
}

async fn connection(
    stream: TcpStream,
    http2: bool,
    router: Router,
    timeouts: Timeouts,
    watcher: Watcher,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    // A client that closes its sending side looks just as one that went away: both send FIN, and only a write would tell
    // them apart. As most servers do, this one takes it for gone: what runs for a client that left is worth more than an
    // answer to one that half-closes, so hyper's `half_close` stays off.
    // a token must not wait for the next one
    let _best_effort = stream.set_nodelay(true);
    let builder = Builder::new(TokioExecutor::new());
    let mut builder = match http2 {
        true => builder.http2_only(),
        false => builder.http1_only(),
    };
    builder.http1().timer(TokioTimer::new()).header_read_timeout(timeouts.read);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(PING_INTERVAL);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(timeouts.write));
    let connection = builder.serve_connection(TokioIo::new(Box::pin(stream)), TowerToHyperService::new(router));
    watcher.watch(connection.into_owned()).await
}

/// What the first bytes tell. hyper itself would wait for them for ever.
async fn is_http2(stream: &TcpStream) -> io::Result<bool> {
    let mut start = [0; HTTP2.len()];
    let len = stream.peek(&mut start).await?;
    Ok(&start[..len] == HTTP2)
}
