//! The ports of a process, bound before anything else happens.
use moesaic_transport::{ClusterConfig, SocketListener};
use moesaic_types::cluster::{Service, Socket};
use moesaic_types::{Error, Result};
use std::net::SocketAddr;
use tokio::net::TcpListener;

/// The admin server listens so many ports above gRPC.
const ADMIN_OFFSET: u16 = 1000;

/// Where gRPC is answered: what a service hands to its server.
#[derive(Debug)]
pub struct Doors {
    /// The port.
    pub listener: TcpListener,
    /// The Unix socket, where the cluster has a folder for them.
    pub socket: Option<SocketListener>,
}

/// All that is bound.
#[derive(Debug)]
pub(crate) struct Bound {
    pub(crate) doors: Doors,
    pub(crate) address: SocketAddr,
    pub(crate) socket: Option<Socket>,
    pub(crate) admin: TcpListener,
    pub(crate) admin_address: SocketAddr,
}

/// Binds the gRPC port that `key` sets, the admin port and the Unix socket.
pub(crate) async fn bind(key: &str, address: &str, service: Service, cluster: &ClusterConfig) -> Result<Bound> {
    let refused = |error: std::io::Error| {
        Error::invalid(key, format!("{key} is '{address}', which cannot be bound: {error}; use another ADDR:PORT"))
    };
    let listener = TcpListener::bind(address).await.map_err(refused)?;
    let bound = listener.local_addr().map_err(refused)?;
    let port = bound.port().checked_add(ADMIN_OFFSET).ok_or_else(|| {
        let message = format!("{key} is '{address}'; its port must be below {}", u16::MAX - ADMIN_OFFSET + 1);
        Error::invalid(key, message)
    })?;
    let admin_address = SocketAddr::new(bound.ip(), port);
    let admin = TcpListener::bind(admin_address).await.map_err(|error| {
        let message = format!(
            "{key} is '{address}', so /metrics, /live and /ready are at {admin_address}, which cannot be bound: \
             {error}; use another port"
        );
        Error::invalid(key, message)
    })?;
    let socket = cluster.socket_of(service, bound.port());
    let socket_listener = match &socket {
        Some(socket) => Some(SocketListener::bind(&socket.path)?),
        None => None,
    };
    Ok(Bound { doors: Doors { listener, socket: socket_listener }, address: bound, socket, admin, admin_address })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ports_that_are_taken_name_the_setting() {
        let cluster = ClusterConfig::default();
        let bind = |address: String| {
            let cluster = cluster.clone();
            async move { bind("router.grpc", &address, Service::Router, &cluster).await }
        };
        let port = moesaic_testkit::servers::ports::free_with(&[ADMIN_OFFSET]);
        let first = bind(format!("127.0.0.1:{port}")).await.unwrap();
        assert_eq!(first.admin_address.port(), first.address.port() + 1000);
        let error = bind(first.address.to_string()).await.unwrap_err();
        assert_eq!(error.field.as_deref(), Some("router.grpc"));
        let Bound { doors, address, admin, .. } = first;
        drop(doors);
        let error = bind(address.to_string()).await.unwrap_err();
        assert!(error.message.contains("/metrics") && error.message.contains("router.grpc"), "{error}");
        drop(admin);
        let error = bind("127.0.0.1:65000".into()).await.unwrap_err();
        assert!(error.message.contains("below 64536"), "{error}");
        assert!(bind("nowhere".into()).await.unwrap_err().message.contains("nowhere"));
    }
}
