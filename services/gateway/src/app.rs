//! Composition: the doors are bound first, then the model loads, then they answer.
use crate::config::Config;
use crate::core::Core;
use crate::{connections, grpc, http};
use moesaic_proto::FILE_DESCRIPTOR_SET;
use moesaic_proto::inference::v1::inference_service_server::InferenceServiceServer;
use moesaic_types::{Error, Result};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;
use tonic_health::ServingStatus;

/// How often the gRPC health status follows readiness.
const HEALTH_INTERVAL: Duration = Duration::from_millis(500);

/// The service behind the gRPC door.
const INFERENCE: &str = <InferenceServiceServer<grpc::Inference> as tonic::server::NamedService>::NAME;

/// A gateway whose ports are bound.
pub struct Gateway {
    core: Arc<Core>,
    http: TcpListener,
    grpc: TcpListener,
}

/// Connections that wait to be taken. With the usual 128 a burst of clients is reset. The system may cut it.
const BACKLOG: u32 = 4096;

async fn bind(field: &str, address: &str) -> Result<TcpListener> {
    let mut failure = std::io::Error::from(std::io::ErrorKind::AddrNotAvailable);
    match tokio::net::lookup_host(address).await {
        Ok(resolved) => {
            for address in resolved {
                match listen(address) {
                    Ok(listener) => return Ok(listener),
                    Err(error) => failure = error,
                }
            }
        }
        Err(error) => failure = error,
    }
    let message = format!("{field} is '{address}', which cannot be bound: {failure}; use another ADDR:PORT");
    Err(Error::invalid(field, message))
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // a port that was left a moment ago may be taken again
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Binds the HTTP port.
pub(crate) async fn bind_http(config: &Config) -> Result<TcpListener> {
    bind("gateway.http", &config.http).await
}

fn address(listener: &TcpListener) -> Result<SocketAddr> {
    listener.local_addr().map_err(|error| Error::internal(format!("read the bound address: {error}")))
}

impl Gateway {
    /// Checks the configuration and binds both ports.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field.
    pub async fn bind(config: Config) -> Result<Self> {
        config.validate()?;
        let http = bind_http(&config).await?;
        let grpc = bind("gateway.grpc", &config.grpc).await?;
        Ok(Self::new(Arc::new(Core::new(config)), http, grpc))
    }

    /// A gateway at ports that are bound.
    pub fn new(core: Arc<Core>, http: TcpListener, grpc: TcpListener) -> Self {
        Self { core, http, grpc }
    }

    /// The core; give it the model with [`Core::serve`].
    pub fn core(&self) -> Arc<Core> {
        self.core.clone()
    }

    /// Where HTTP is answered.
    ///
    /// # Errors
    /// `Internal` when the system does not say.
    pub fn http_address(&self) -> Result<SocketAddr> {
        address(&self.http)
    }

    /// Where gRPC is answered.
    ///
    /// # Errors
    /// `Internal` when the system does not say.
    pub fn grpc_address(&self) -> Result<SocketAddr> {
        address(&self.grpc)
    }

    /// Answers until `stop` changes; then takes no more connections and lets running requests finish, up to the drain
    /// timeout.
    ///
    /// # Errors
    /// `Internal` when a door fails.
    pub async fn run(self, mut stop: watch::Receiver<bool>) -> Result<()> {
        let Self { core, http, grpc } = self;
        let drain = core.config.drain_timeout.get();
        let stopped = |mut stop: watch::Receiver<bool>| async move {
            // an error means that the sender is gone, which is a stop too
            let _gone = stop.wait_for(|stop| *stop).await;
        };
        let timeouts = connections::Timeouts::of(&core.config);
        let http = connections::serve(http, http::router(core.clone()), timeouts, stopped(stop.clone()));
        let grpc = serve_grpc(core, grpc, stopped(stop.clone()));
        let http = async {
            http.await;
            Ok(())
        };
        let doors = async { tokio::try_join!(http, grpc).map(|_| ()) };
        tokio::pin!(doors);
        tokio::select! {
            result = &mut doors => return result,
            _ = stop.wait_for(|stop| *stop) => {}
        }
        match tokio::time::timeout(drain, doors).await {
            Ok(result) => result,
            Err(_) => {
                tracing::warn!(drain_s = drain.as_secs_f32(), "requests still ran at the end of the drain; cut off");
                Ok(())
            }
        }
    }
}

async fn serve_grpc(core: Arc<Core>, listener: TcpListener, stopped: impl Future<Output = ()>) -> Result<()> {
    let internal = |what: &str, error: &dyn std::fmt::Display| Error::internal(format!("{what}: {error}"));
    let limit = core.config.body_limit.as_usize();
    let (reporter, health) = tonic_health::server::health_reporter();
    let follow = tokio::spawn(follow_readiness(core.clone(), reporter));
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name(INFERENCE)
            .with_service_name("grpc.health.v1.Health")
    };
    let v1 = reflection().build_v1().map_err(|error| internal("build reflection", &error))?;
    let v1alpha = reflection().build_v1alpha().map_err(|error| internal("build reflection", &error))?;
    let service = InferenceServiceServer::new(grpc::Inference::new(core)).max_decoding_message_size(limit);
    let service = grpc::Refusals::new(service, limit);
    let result = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .add_service(service)
        .add_service(health)
        .add_service(v1)
        .add_service(v1alpha)
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stopped)
        .await;
    follow.abort();
    result.map_err(|error| internal("serve gRPC", &error))
}

/// Keeps the standard health service at what readiness is. Ends with the server; nothing is lost on cancel.
async fn follow_readiness(core: Arc<Core>, reporter: tonic_health::server::HealthReporter) {
    let mut interval = tokio::time::interval(HEALTH_INTERVAL);
    let mut served = core.watch();
    loop {
        // both are cancel-safe
        tokio::select! {
            _ = interval.tick() => {}
            _ = served.changed() => {}
        }
        let status = match core.ready().await {
            Ok(()) => ServingStatus::Serving,
            Err(_) => ServingStatus::NotServing,
        };
        for service in ["", INFERENCE] {
            reporter.set_service_status(service, status).await;
        }
    }
}
