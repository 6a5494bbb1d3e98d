//! How the gateway reaches the router and the replicas: over gRPC servers on loopback ports.
use moesaic_transport::channel::to_address;
use moesaic_transport::grpc::{placer_service, replica_service};
use moesaic_transport::{GrpcPlacer, GrpcReplica};
use moesaic_types::boundary::{Placer, Replica};
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::service::Routes;
use tonic::transport::Channel;

pub fn replica(replica: Arc<dyn Replica>) -> Arc<dyn Replica> {
    Arc::new(GrpcReplica::new("replica", serve(Routes::new(replica_service(replica)))))
}

pub fn placer(placer: Arc<dyn Placer>) -> Arc<dyn Placer> {
    Arc::new(GrpcPlacer::new("router", serve(Routes::new(placer_service(placer)))))
}

/// Serves until the test's runtime ends.
fn serve(routes: Routes) -> Channel {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let listener = TcpListener::from_std(listener).unwrap();
    tokio::spawn(async move {
        let (_never, stop) = watch::channel(false);
        moesaic_transport::serve(routes, listener, None, stop).await
    });
    to_address(&format!("http://{address}")).unwrap()
}
