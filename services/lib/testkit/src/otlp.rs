//! A real OTLP receiver on loopback.
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::trace::v1::ResourceSpans;
use std::sync::{Arc, Mutex};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// Keeps the spans that come.
#[derive(Clone, Debug, Default)]
pub struct Receiver(Arc<Mutex<Vec<ResourceSpans>>>);

impl Receiver {
    /// Starts one and tells its endpoint. It has a thread of its own: a flush that blocks the test's thread must not need
    /// the test's runtime to make progress.
    pub fn start() -> (Self, String) {
        let receiver = Self::default();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        listener.set_nonblocking(true).expect("a listener can be set so");
        let endpoint = format!("http://{}", listener.local_addr().expect("it is bound"));
        let service = TraceServiceServer::new(receiver.clone());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).expect("it does not block");
                let server = tonic::transport::Server::builder().add_service(service);
                server.serve_with_incoming(TcpListenerStream::new(listener)).await.expect("it serves");
            });
        });
        (receiver, endpoint)
    }

    /// What came so far.
    pub fn received(&self) -> Vec<ResourceSpans> {
        self.0.lock().expect("no test panics here").clone()
    }
}

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.lock().expect("no test panics here").extend(request.into_inner().resource_spans);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}
