//! Serving gRPC at a port and at a Unix socket, until told to stop.
use crate::channel::server;
use futures::Stream;
use moesaic_types::{Error, Result};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::watch;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;

/// A Unix socket that is bound; its file goes with it.
#[derive(Debug)]
pub struct SocketListener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file.
    file: (u64, u64),
}

impl SocketListener {
    /// Makes the folder and the socket; one that an earlier process left there is replaced.
    ///
    /// # Errors
    /// `InvalidArgument` naming `cluster.socket_folder` when it cannot be made, or something else has its name.
    pub fn bind(path: &Path) -> Result<Self> {
        let refused = |reason: &dyn std::fmt::Display| {
            let message = format!("cluster.socket_folder: {} cannot be bound: {reason}", path.display());
            Error::invalid("cluster.socket_folder", message)
        };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|error| refused(&error))?;
        }
        match std::fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => return Err(refused(&"it is there and no socket")),
            Ok(_) => std::fs::remove_file(path).map_err(|error| refused(&error))?,
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(refused(&error)),
        }
        let listener = UnixListener::bind(path).map_err(|error| refused(&error))?;
        let file = identity(path).map_err(|error| refused(&error))?;
        Ok(Self { listener, path: path.to_owned(), file })
    }
}

fn identity(path: &Path) -> std::io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

impl Drop for SocketListener {
    fn drop(&mut self) {
        // it may be gone, or a later process's by now: then there is nothing to do
        if identity(&self.path).is_ok_and(|file| file == self.file) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Connections that clients make at a Unix socket, as long as its listener lives.
struct SocketIncoming(SocketListener);

impl Stream for SocketIncoming {
    type Item = std::io::Result<UnixStream>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.listener.poll_accept(context).map(|accepted| Some(accepted.map(|(stream, _)| stream)))
    }
}

/// Serves until `stop` is true or its sender is gone; then takes no more calls and returns when the running ones have
/// ended. Drop it to end those as well.
///
/// # Errors
/// `Unavailable` when a listener fails.
pub async fn serve(
    routes: Routes,
    listener: TcpListener,
    socket: Option<SocketListener>,
    stop: watch::Receiver<bool>,
) -> Result<()> {
    let failed = |error: tonic::transport::Error| Error::unavailable(format!("serve gRPC: {error}"));
    // the server's own setting holds for ports that it binds itself
    let connections = TcpIncoming::from(listener).with_nodelay(Some(true));
    let at_port = server().add_routes(routes.clone()).serve_with_incoming_shutdown(connections, stopped(stop.clone()));
    let Some(socket) = socket else { return at_port.await.map_err(failed) };
    let connections = SocketIncoming(socket);
    let at_socket = server().add_routes(routes).serve_with_incoming_shutdown(connections, stopped(stop));
    tokio::try_join!(at_port, at_socket).map_err(failed)?;
    Ok(())
}

/// Waits until `stop` is true or its sender is gone. Cancel-safe.
pub async fn stopped(mut stop: watch::Receiver<bool>) {
    // an error: the sender is gone
    let _ = stop.wait_for(|stop| *stop).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_that_was_left_is_replaced_and_a_file_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/s.sock");
        let left = SocketListener::bind(&path).unwrap();
        let again = SocketListener::bind(&path).unwrap();
        drop(left);
        assert!(path.exists(), "it is another's by now");
        drop(again);
        assert!(!path.exists());
        let file = folder.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        let error = SocketListener::bind(&file).unwrap_err();
        assert_eq!(error.field.as_deref(), Some("cluster.socket_folder"));
        assert!(error.message.contains("no socket"), "{error}");
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    }
}
