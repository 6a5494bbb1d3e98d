//! `/metrics`, `/live` and `/ready`, apart from what the service itself answers.
use crate::process::Process;
use crate::status::{Look, Status};
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::net::TcpListener;

/// Answers until it is dropped.
pub(crate) async fn serve<P: Process>(listener: TcpListener, status: Arc<Status<P>>) {
    let routes = Router::new()
        .route("/metrics", get(metrics))
        .route("/live", get(live))
        .route("/ready", get(ready))
        .fallback(no_route)
        .with_state(status);
    if let Err(error) = axum::serve(listener, routes).await {
        tracing::error!(%error, "serve /metrics, /live and /ready");
    }
}

async fn metrics() -> Response {
    let text = moesaic_telemetry::metrics::render();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

/// 200 while the process can recover by itself, else 503 with the reason to restart it.
async fn live<P: Process>(State(status): State<Arc<Status<P>>>) -> (StatusCode, Json<Value>) {
    match status.process.live() {
        Ok(()) => (StatusCode::OK, Json(json!({"status": "live"}))),
        Err(error) => {
            (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "must be restarted", "reason": error.message})))
        }
    }
}

/// 200 while the process can do its job, else 503 with the reason; both with what is missing.
async fn ready<P: Process>(State(status): State<Arc<Status<P>>>) -> (StatusCode, Json<Value>) {
    let Look { ready, degraded } = status.look().await;
    match ready {
        Ok(()) => (StatusCode::OK, Json(json!({"status": "ready", "degraded": degraded}))),
        Err(error) => {
            let body = json!({"status": "not ready", "reason": error.message, "degraded": degraded});
            (StatusCode::SERVICE_UNAVAILABLE, Json(body))
        }
    }
}

async fn no_route() -> (StatusCode, &'static str) {
    (StatusCode::NOT_FOUND, "no such route; there are /metrics, /live and /ready\n")
}
